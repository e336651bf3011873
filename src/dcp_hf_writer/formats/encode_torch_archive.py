"""The bytes that `torch.save` writes for one tensor, without copying or summing its data.

`torch.save` computes a CRC of every byte, which torch's reader does not check, and the switch that
turns it off is process-wide. The archive of a tensor depends on its dtype, shape, strides and
`requires_grad` alone, but for the data: so it is made once by torch's own archive writer with the
CRC off, and kept as what stands before and after the data.
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

# The alignment of storages within an archive that torch.save uses by default.
_STORAGE_ALIGNMENT = 64

# Kinds of tensors of a model are few; this bounds what a model with thousands of shapes keeps.
_KEPT = 4096


class _Capture:
    """A stream that keeps what is written, but for the one write that is the tensor's data."""

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
        """Nothing is buffered."""

    def parts(self) -> tuple[bytes, bytes]:
        """Return what was written before and after the data.

        Raises:
            WriteError: If this torch writes archives in another way, so that it was not seen.
        """
        if self._nbytes and not self._seen:
            msg = "torch's archive writer does not pass a tensor's data on in one piece"
            raise WriteError(
                msg,
                phase="write",
                expected="the archive format of torch 2.10 to 2.15",
                found=f"torch {torch.__version__}",
                hint="pass dcp_writer=FileSystemWriter(path), which is slower",
            )
        return bytes(self._before), bytes(self._after)


def tensor_archive(tensor: torch.Tensor) -> tuple[bytes, bytes]:
    """Return what `torch.save` writes before and after the data of a tensor.

    Args:
        tensor: A CPU tensor whose storage holds its own bytes and no others.

    Returns:
        Two byte strings; the file is the first, the storage's bytes, the second. `torch.load` reads
        it, also with `weights_only=True` and `mmap=True`.

    Source:
        torch.serialization, the zip archive of `torch.save`.
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
    # Never touched: the archive writer passes the data on by address, and the CRC is off.
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
    if requires_grad:
        tensor.requires_grad_()
    storage = tensor.untyped_storage()
    capture = _Capture(storage.data_ptr(), storage.nbytes())
    # Positional in torch: no CRC. Private, as is `_save`; `torch.save` has no such option.
    writer = torch._C.PyTorchFileWriter(capture, False, _STORAGE_ALIGNMENT)  # type: ignore[call-overload] # noqa: SLF001, FBT003
    _save(tensor, writer, pickle, 2, False)  # noqa: FBT003
    writer.write_end_of_file()
    return capture.parts()
