"""Copy many small tensors of a GPU into pinned host memory by a few kernels.

A copy engine takes one call of the driver for each tensor, and processes that share a GPU wait for
each other in these calls. A kernel that writes to the host memory copies hundreds of tensors in one
call. Large tensors stay with the copy engine, which leaves the GPU's processors to training.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

# torch copies lists of these dtypes by one kernel. In some versions, others raise an error.
KERNEL_DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)


# CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, in cuda.h.
_CAN_USE_HOST_POINTER = 91


class _PinnedMemory:
    """Memory at an address, as `torch.as_tensor` takes it; keeps its owner alive."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def view_on_device(address: int, nbytes: int, owner: object) -> torch.Tensor | None:
    """Return pinned host memory as a GPU tensor over the same bytes.

    Args:
        address: Start of memory that is registered with CUDA.
        nbytes: Its size.
        owner: What keeps the memory mapped.

    Returns:
        uint8 of shape `(nbytes,)`; `None` if kernels cannot use the address of the host.
    """
    view = torch.as_tensor(_PinnedMemory(address, nbytes, owner))
    return view if view.is_cuda and _uses_host_addresses(view.device.index) else None


@functools.lru_cache
def _uses_host_addresses(device: int) -> bool:
    """Whether kernels of a GPU reach registered host memory by the address that it has there.

    `False` also where the driver is not CUDA's, so that nobody can say.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    handle, answer = ctypes.c_int(), ctypes.c_int()
    failed = driver.cuDeviceGet(ctypes.byref(handle), device) or driver.cuDeviceGetAttribute(
        ctypes.byref(answer), _CAN_USE_HOST_POINTER, handle
    )
    return not failed and answer.value == 1


def mapped_over(target: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Return the GPU tensor over the bytes of a contiguous host tensor.

    Args:
        target: Lies in the memory of `view`, at a multiple of its item size.
        view: From `view_on_device`.

    Returns:
        A tensor of the shape and dtype of `target`.
    """
    start = target.data_ptr() - view.data_ptr()
    return view[start : start + target.nbytes].view(target.dtype).view(target.shape)


def copy_by_kernel(pairs: Sequence[tuple[torch.Tensor, torch.Tensor, int]]) -> None:
    """Start the copies of GPU tensors of one device on its current stream.

    Args:
        pairs: Target, source, bytes; targets from `mapped_over`, dtypes of `KERNEL_DTYPES`.
    """
    for dtype in dict.fromkeys(source.dtype for _, source, _ in pairs):
        of_dtype = [pair for pair in pairs if pair[1].dtype == dtype]
        torch._foreach_copy_([pair[0] for pair in of_dtype], [pair[1] for pair in of_dtype])
