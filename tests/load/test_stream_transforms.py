"""Checkpoints whose bytes extensions of torch's writer have transformed."""

from __future__ import annotations

import io
import zlib
from typing import IO, TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._extension import (
    ExtensionRegistry,
    StreamTransformExtension,
    ZStandard,
)
from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer import HFDualReader, HFDualWriter, verify
from dcp_hf_writer.errors import ConfigError, CorruptCheckpointError, PickledObjectError
from dcp_hf_writer.torch_seam.stream_transforms import StreamTransforms

if TYPE_CHECKING:
    from pathlib import Path


class _Deflated(io.RawIOBase):
    def __init__(self, output: IO[bytes]) -> None:
        self.output, self.parts = output, b""

    def write(self, data: Any) -> int:
        self.parts += bytes(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.output.write(zlib.compress(self.parts))
            super().close()


class Deflate(StreamTransformExtension):
    """Compresses every item."""

    @staticmethod
    def registry_name() -> str:
        return "stream.deflate@example"

    @staticmethod
    def from_descriptor(version: str) -> Deflate:
        if version != "1":
            raise ValueError(f"version {version}")
        return Deflate()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return _Deflated(output)  # type: ignore[return-value]

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:  # noqa: A002 - torch's
        return io.BytesIO(zlib.decompress(input.read()))


STATE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def registry() -> ExtensionRegistry:
    found = ExtensionRegistry()
    found.register(Deflate)
    return found


def transformed(path: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(path, _extensions=[Deflate()])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {**STATE, "step": 7}
    dcp.save(state, storage_writer=transformed(tmp_path / "x"), no_dist=True)
    return tmp_path / "x"


def refusal(path: Path, state: dict[str, Any], **options: Any) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=HFDualReader(path, **options), no_dist=True)
    return caught.value.failures[0][0]


def test_checkpoint_is_loaded_where_the_extension_is_registered(saved: Path) -> None:
    found = {"w": torch.zeros(2, 3), "b": torch.zeros(2), "step": 0}
    reader = HFDualReader(saved, _extension_registry=registry())
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert torch.equal(found["w"], STATE["w"])  # type: ignore[arg-type]
    assert (found["b"].tolist(), found["step"]) == ([1, 1], 7)  # type: ignore[attr-defined]


def test_structure_of_such_a_checkpoint_is_checked(saved: Path) -> None:
    assert verify(saved).ok


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("state", [{"w": torch.zeros(2, 3)}, {"step": 0}], ids=["tensor", "object"])
def test_extension_that_is_not_registered_is_named(
    saved: Path,
    state: dict[str, Any],
    allowed: bool,  # noqa: FBT001
) -> None:
    before = str(state)
    error = refusal(saved, state, allow_pickled_objects=allowed)
    assert isinstance(error, ConfigError)
    for text in ("stream.deflate@example", "_extension_registry", next(iter(state))):
        assert text in str(error)
    assert str(state) == before


def test_extension_whose_package_is_missing_is_named(saved: Path) -> None:
    if ZStandard.is_available():
        pytest.skip("zstandard or pyzstd is installed")
    with pytest.raises(ConfigError, match="zstandard"):
        StreamTransforms(None).check(["stream.zstd/1"], fqn="w", path=str(saved))


def test_version_that_the_extension_refuses_is_named(saved: Path) -> None:
    transforms = StreamTransforms(registry())
    with pytest.raises(ConfigError, match="version 2"):
        transforms.check(["stream.deflate@example/2"], fqn="w", path=str(saved))


def test_object_is_checked_after_its_transform_is_undone(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "evil": print}
    dcp.save(state, storage_writer=transformed(tmp_path / "x"), no_dist=True)
    target = {"evil": None}
    error = refusal(tmp_path / "x", target, _extension_registry=registry())
    assert isinstance(error, PickledObjectError)


def test_damage_is_found(saved: Path) -> None:
    path = saved / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    state = {"w": torch.zeros(2, 3), "b": torch.zeros(2), "step": 0}
    error = refusal(saved, state, _extension_registry=registry())
    assert isinstance(error, CorruptCheckpointError)
    assert "stream.deflate" in str(error)


def test_item_that_grows_beyond_its_tensor_is_refused() -> None:
    data = zlib.compress(bytes(1 << 20))
    with pytest.raises(CorruptCheckpointError, match="more than 1000 bytes"):
        StreamTransforms(registry()).undo(
            data, ["stream.deflate@example/1"], max_nbytes=1000, fqn="w", path="x"
        )


def test_checkpoint_of_both_halves_is_loaded_and_its_digests_compared(tmp_path: Path) -> None:
    inner = transformed(tmp_path / "unused")
    writer = HFDualWriter(tmp_path / "x", dcp_writer=inner)
    dcp.save({"model": {**STATE}}, storage_writer=writer, no_dist=True)
    found = {"model": {name: torch.zeros_like(value) for name, value in STATE.items()}}
    reader = HFDualReader(tmp_path / "x", verify=True, _extension_registry=registry())
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found["model"][name], value) for name, value in STATE.items())
    path = tmp_path / "x" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"\xa5")
    assert "differ" in str(
        refusal(tmp_path / "x", found, verify=True, _extension_registry=registry())
    )
