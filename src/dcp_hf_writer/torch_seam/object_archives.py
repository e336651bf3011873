"""Find the pickle that `torch.load` would unpickle in the archive of an object.

The zip format lets a file show one pickle to torch and another to a second parser. So this
module asks the reader that `torch.load` itself uses.

Mechanism: `torch.load` takes data for an archive if it begins with the signature of a zip file, and
for an old pickle otherwise. From an archive it unpickles the record `data.pkl`, unless the archive
has a record `constants.pkl`: that is a TorchScript program.

Looked at: torch 2.10 to 2.15, `torch.load` and `_is_torchscript_zip`. When torch changes: without
`PyTorchFileReader` the import fails; without its methods, the object is refused.
"""

from __future__ import annotations

import io

from torch._C import PyTorchFileReader

_SIGNATURE = b"PK\x03\x04"


class NotAnArchiveError(ValueError):
    """Data that `torch.load` would not read as the archive of one object."""


def pickle_of_archive(data: bytes) -> bytes:
    """Return the pickle that `torch.load` would unpickle.

    Args:
        data: What `torch.save` wrote.

    Raises:
        NotAnArchiveError: If `torch.load` would run a TorchScript program or read an old format, or
            if the archive is damaged.
    """
    if not data.startswith(_SIGNATURE):
        raise NotAnArchiveError("data that is not an archive of torch.save")
    try:
        reader = PyTorchFileReader(io.BytesIO(data))
        if "constants.pkl" in reader.get_all_records():
            raise NotAnArchiveError("a TorchScript program")
        found: bytes = reader.get_record("data.pkl")
    except RuntimeError as error:
        raise NotAnArchiveError(str(error).splitlines()[0][:200]) from error
    return found
