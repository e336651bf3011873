"""The key-value store that the ranks of a process group have in common.

Mechanism: `torch.distributed.distributed_c10d._get_default_store`. torch has no public name for the
store that `init_process_group` was given, or made itself.

Looked at: torch 2.9 to 2.13. When torch changes: `default_store` raises, and with it every save of
several ranks.
"""

from __future__ import annotations

from typing import Any

from torch.distributed import distributed_c10d

from dcp_hf_writer.torch_seam.unsupported import unsupported_torch


def default_store() -> Any:
    """Return the store of the default process group, which must be initialised.

    Raises:
        UnsupportedTorchError: If torch does not give it.
    """
    find = getattr(distributed_c10d, "_get_default_store", None)
    if find is None:
        raise unsupported_torch(
            "the store of the process group",
            phase="plan",
            expected="_get_default_store in torch.distributed.distributed_c10d",
            hint="use a version of torch that this package was tested with",
        )
    return find()
