"""Between bytes and values, without I/O: the formats that a checkpoint consists of."""
