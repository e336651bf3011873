"""Whether the host has the memory for a slab, and the errors if it does not."""

from __future__ import annotations

from dcp_hf_writer.errors import StagingError
from dcp_hf_writer.storage.host_memory import free_memory


def check_free_memory(nbytes: int) -> None:
    """Refuse a slab that does not fit: filling it, the kernel would kill a process of the host.

    Args:
        nbytes: Size of the slab.

    Raises:
        StagingError: If less memory than that is free.
    """
    free = free_memory()
    if free is not None and free.nbytes < nbytes:
        raise StagingError(
            "there is not enough free memory for the staged copy",
            phase="stage",
            expected=f"{nbytes} bytes free ({nbytes / (1 << 30):.2f} GiB)",
            found=f"{free.nbytes} bytes ({free.nbytes / (1 << 30):.2f} GiB) by {free.limit}",
            hint="free host memory, raise the memory limit of the container, or save fewer tensors "
            "from this rank",
        )


def no_memory(nbytes: int, error: Exception) -> StagingError:
    """Make the error for a slab that could not be allocated or mapped.

    Args:
        nbytes: Size of the slab.
        error: What the system raised.
    """
    return StagingError(
        "host memory for the staged copy could not be allocated",
        phase="stage",
        expected=f"{nbytes} bytes of shared memory",
        found=str(error),
        hint="free host memory, or save fewer tensors from this rank",
    )
