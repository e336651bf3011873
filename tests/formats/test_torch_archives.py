"""The archive around a tensor, compared with that of `torch.save` and read by `torch.load`."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dcp_hf_writer.formats.encode_torch_archive import _archive_of, tensor_archive
from support.compare import bits

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.bfloat16, torch.float16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
]


def numbered(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Make a tensor whose storage is exactly its own bytes."""
    count = torch.Size(shape).numel()
    raw = torch.arange(count * dtype.itemsize, dtype=torch.int64) % 251
    raw = (raw % 2 if dtype is torch.bool else raw).to(torch.uint8)
    return raw.clone().view(dtype).reshape(shape)


def archive_of(tensor: torch.Tensor) -> bytes:
    before, after = tensor_archive(tensor)
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return before + storage.numpy().tobytes() + after


def assert_loads(content: bytes, tensor: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(content)
    for options in ({"weights_only": True}, {"weights_only": True, "mmap": True}):
        assert_same(torch.load(path, **options), tensor)
    assert_same(torch.load(io.BytesIO(content), weights_only=True), tensor)


def assert_same(found: Any, expected: torch.Tensor) -> None:
    assert type(found) is torch.Tensor
    assert (found.dtype, found.shape, found.stride()) == (
        expected.dtype,
        expected.shape,
        expected.stride(),
    )
    assert found.requires_grad == expected.requires_grad
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_every_dtype_and_shape(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensor = numbered(dtype, shape)
    assert_loads(archive_of(tensor), tensor, tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        numbered(torch.float32, (3, 5)).t(),
        numbered(torch.float32, (2, 3, 4)).permute(2, 0, 1),
        numbered(torch.float32, (2, 3, 4, 5)).to(memory_format=torch.channels_last),
        numbered(torch.float32, (3, 5)).requires_grad_(),
    ],
    ids=["transposed", "permuted", "channels last", "with gradient"],
)
def test_torch_loads_strides_and_requires_grad(tensor: torch.Tensor, tmp_path: Path) -> None:
    assert_loads(archive_of(tensor), tensor, tmp_path)


def without_sums(content: bytes) -> list[tuple[str, int, int, bytes]]:
    """Return name, place, compression and content of each member of an archive.

    One member, the serialization id, is a hash of the checksums and nothing that a reader looks at.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    found = []
    for member in members:
        start = member.header_offset + 30
        name, extra = (
            int.from_bytes(content[member.header_offset + at :][:2], "little") for at in (26, 28)
        )
        data = content[start + name + extra :][: member.file_size]
        if member.filename.endswith("/serialization_id"):
            assert len(data) == 40
            data = b""
        found.append((member.filename, member.header_offset, member.compress_type, data))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_archive_equals_that_of_torch_save_but_for_its_checksums(dtype: torch.dtype) -> None:
    tensor = numbered(dtype, (7, 9))
    stock = io.BytesIO()
    torch.save(tensor, stock)
    assert without_sums(archive_of(tensor)) == without_sums(stock.getvalue())


def test_data_starts_where_torch_aligns_it() -> None:
    before, _ = tensor_archive(numbered(torch.float32, (16,)))
    assert len(before) % 64 == 0


def test_archive_depends_on_no_data() -> None:
    one, other = numbered(torch.float32, (4, 4)), torch.zeros(4, 4)
    assert tensor_archive(one) == tensor_archive(other)
    assert tensor_archive(one) != tensor_archive(torch.zeros(4, 5))
    assert tensor_archive(one) != tensor_archive(torch.zeros(4, 4).t())


def test_archive_is_right_when_its_parts_have_the_length_of_the_data(tmp_path: Path) -> None:
    # The writer tells the data from its own members by address; a size may well be equal.
    before, after = tensor_archive(numbered(torch.uint8, (4,)))
    with zipfile.ZipFile(io.BytesIO(before + b"\0\1\2\3" + after)) as archive:
        sizes = {member.file_size for member in archive.infolist()} | {len(before), len(after), 30}
    for size in sizes:
        tensor = numbered(torch.uint8, (size,))
        assert_loads(archive_of(tensor), tensor, tmp_path)


def test_no_checksum_is_made_and_the_switch_of_the_process_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _archive_of.cache_clear()
    assert torch.serialization.get_crc32_options()
    tensor = numbered(torch.float32, (64,))
    content = archive_of(tensor)
    assert torch.serialization.get_crc32_options()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        pytest.raises(zipfile.BadZipFile, match="Bad CRC"),
    ):
        archive.read("archive/data/0")
