"""The bytes that `torch.save` writes around the data of one tensor.

`torch.save` computes a CRC over all data, which torch's reader does not check. The switch that
turns the CRC off is process-wide, so this module does not use `torch.save`. Apart from its data,
the archive of a tensor depends only on dtype, shape, strides and `requires_grad`. So torch's own
archive writer makes each kind of archive once, with the CRC off, and this module keeps the bytes
before and after the data. It never copies or reads the data.
"""

from __future__ import annotations

import functools
import pickle
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.serialization import _save

from dcp_hf_writer.errors import WriteError

if TYPE_CHECKING:
    from typing_extensions import Buffer

# The default alignment of storages in an archive of torch.save, in bytes.
_STORAGE_ALIGNMENT = 64

# Most models have few kinds of tensors; this limits the memory for one with thousands of shapes.
_KEPT = 4096


class _Capture:
    """A stream that keeps everything written to it, except the tensor's data."""

    def __init__(self, address: int, nbytes: int) -> None:
        self._address = address
        self._nbytes = nbytes
        self._before = bytearray()
        self._after = bytearray()
        self._seen = False

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        is_data = (
            not self._seen
            and view.nbytes == self._nbytes
            and self._nbytes > 0
            and np.frombuffer(view, dtype=np.uint8).ctypes.data == self._address
        )
        if is_data:
            self._seen = True
        else:
            (self._after if self._seen else self._before).extend(view)
        return view.nbytes

    def flush(self) -> None:
        """Do nothing, because nothing is buffered."""

    def parts(self) -> tuple[bytes, bytes]:
        """Return the bytes before and after the data.

        Raises:
            WriteError: If this version of torch writes archives differently, so that `write` never
                saw the data.
        """
        if self._nbytes and not self._seen:
            msg = "torch's archive writer did not write the data of a tensor in one call"
            raise WriteError(
                msg,
                phase="write",
                expected="the archive format of torch 2.10 to 2.15",
                found=f"torch {torch.__version__}",
                hint="pass dcp_writer=FileSystemWriter(path), which is slower",
            )
        return bytes(self._before), bytes(self._after)


def tensor_archive(tensor: torch.Tensor) -> tuple[bytes, bytes]:
    """Return the bytes that `torch.save` writes before and after the data of a tensor.

    Args:
        tensor: A CPU tensor that fills its whole storage.

    Returns:
        Two byte strings. The archive is the first string, then the bytes of the storage, then the
        second string. `torch.load` reads it, also with `weights_only=True` and `mmap=True`.

    Source:
        torch.serialization: the zip archive that `torch.save` writes.
    """
    return _archive_of(
        tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.requires_grad
    )


@functools.lru_cache(maxsize=_KEPT)
def _archive_of(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,  # noqa: FBT001 - part of the cache key
) -> tuple[bytes, bytes]:
    # Nothing reads this memory: the archive writer passes on its address, and the CRC is off.
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
    if requires_grad:
        tensor.requires_grad_()
    storage = tensor.untyped_storage()
    capture = _Capture(storage.data_ptr(), storage.nbytes())
    # `False` turns the CRC off. Both are private in torch; `torch.save` lacks this option.
    writer = torch._C.PyTorchFileWriter(capture, False, _STORAGE_ALIGNMENT)  # type: ignore[call-overload] # noqa: SLF001, FBT003
    _save(tensor, writer, pickle, 2, False)  # noqa: FBT003
    writer.write_end_of_file()
    return capture.parts()
