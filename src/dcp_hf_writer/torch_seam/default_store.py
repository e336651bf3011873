"""Find the default process group, and the key-value store that all of its ranks share.

Mechanism: `torch.distributed.distributed_c10d._get_default_store`. `init_process_group` gets or
makes this store. torch has no public function that returns it.

Looked at: torch 2.10 to 2.15. When torch changes: `default_store` raises, so every save of several
ranks fails.
"""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dcp_hf_writer.torch_seam.unsupported_torch import unsupported_torch

_log = logging.getLogger(__name__)


def has_default_group() -> bool:
    """Whether `torch.distributed` is initialised in this process."""
    return dist.is_available() and dist.is_initialized()


def default_store() -> Any:
    """Return the store of the default process group, which must be initialised.

    Raises:
        UnsupportedTorchError: If torch no longer has `_get_default_store`.
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


def own_store_client() -> Any:
    """Return a client of the default store with a connection of its own, if it can be cloned.

    A wait on the default store would block the trainer's own use of it. All groups share the
    default group's store. A group's own store only adds a prefix to the keys, and torch itself uses
    the keys under that prefix.

    Raises:
        UnsupportedTorchError: As `default_store`.
    """
    store = default_store()
    clone = getattr(store, "clone", None)
    if clone is None:
        return store
    try:
        return clone()
    except (RuntimeError, NotImplementedError) as error:
        _log.debug("the store cannot be cloned (%s); using the trainer's store", error)
        return store
