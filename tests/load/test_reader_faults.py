"""Damaged and hostile checkpoints: each is refused, in words that say what, and nothing runs."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer import HFDualReader, HFDualWriter, load_hf, verify
from dcp_hf_writer.errors import (
    CheckpointError,
    CorruptCheckpointError,
    MismatchError,
    PickledObjectError,
    ReadError,
)
from dcp_hf_writer.formats.parse_dcp_metadata import parse_metadata
from dcp_hf_writer.tensors.strided_copies import Copy
from support import once_forms
from support.small_states import spoil, state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.checkpoint.metadata import MetadataIndex


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Return what saves a checkpoint of step 3."""

    def save(**options: Any) -> Path:
        dcp.save(state_of(3), storage_writer=HFDualWriter(tmp_path / "step-3", **options))
        return tmp_path / "step-3"

    return save


def blank() -> dict[str, Any]:
    state = state_of(3)
    spoil(state)
    return state


def load(path: Path, state: dict[str, Any] | None = None, **options: Any) -> None:
    """Load, and raise what the rank raised."""
    try:
        dcp.load(blank() if state is None else state, storage_reader=HFDualReader(path, **options))
    except CheckpointException as error:
        ((found, _),) = error.failures.values()
        raise found from None


def change_metadata(path: Path, change: Callable[[Any], None]) -> None:
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def weights_of(path: Path) -> Path:
    return path / "hf" / "model.safetensors"


def spoil_bit(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def place_of(path: Path, tensor: torch.Tensor, name: str) -> tuple[Path, int]:
    """Find the bytes of a tensor in a file."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    content = (path / name).read_bytes()
    assert content.count(raw) == 1
    return path / name, content.index(raw)


@pytest.mark.parametrize("weights", ["both", "once"])
@pytest.mark.parametrize("name", ["__0_0.distcp", "hf/model.safetensors"])
def test_flipped_bit_in_a_tensor_is_named_and_nothing_is_loaded(
    made: Callable[..., Path], weights: str, name: str
) -> None:
    path = made(weights=weights)
    state = state_of(3)
    tensor, key = state["model"]["layers.0.w"], "layers.0.w"
    if weights == "once" and name == "__0_0.distcp":
        tensor, key = state["optim"]["state"]["embed"]["exp_avg"], "at"
    file, at = place_of(path, tensor, name)
    spoil_bit(file, at + 5)
    source = "hf" if name.startswith("hf") and weights == "both" else "dcp"
    target = blank() if source == "dcp" else {"model": blank()["model"]}
    with pytest.raises(CorruptCheckpointError) as caught:
        load(path, target, source=source, verify=True)
    text = str(caught.value)
    assert str(file) in text
    if name.startswith("hf"):
        assert caught.value.key == key
    assert f"bytes {at} to {at + tensor.nbytes}" in text
    assert all((value == -1).all() for value in target["model"].values())
    # The control: without digests the damage is loaded.
    load(path, target, source=source)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_flipped_bit_beside_the_tensors_is_found(made: Callable[..., Path], name: str) -> None:
    path = made()
    # In the last bytes: the version of the metadata, the directory of an archive.
    file = path / name
    data = file.read_bytes()
    spoil_bit(file, data.rindex(b"version") + 10 if name == ".metadata" else len(data) - 30)
    with pytest.raises(CorruptCheckpointError) as caught:
        load(path, verify=True)
    assert str(file) in str(caught.value)


def test_flipped_bit_in_a_header_of_an_unused_tensor_is_found(made: Callable[..., Path]) -> None:
    path = made()
    file = weights_of(path)
    data = file.read_bytes()
    spoil_bit(file, data.index(b'"format":"pt"') + 11)
    with pytest.raises(CorruptCheckpointError) as caught:
        load_hf(dict(state_of(3)["model"]), path, verify=True)
    assert str(file) in str(caught.value)


def test_damage_to_what_is_not_loaded_does_not_matter(made: Callable[..., Path]) -> None:
    path = made()
    file, at = place_of(path, state_of(3)["model"]["head"], "__0_0.distcp")
    spoil_bit(file, at)
    state = {"model": {"norm": torch.zeros(3)}}
    load(path, state, verify=True)
    assert torch.equal(state["model"]["norm"], state_of(3)["model"]["norm"])


@pytest.mark.parametrize("left", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(
    ("name", "verify"),
    [
        *itertools.product((".metadata", "__0_0.distcp", "hf/model.safetensors"), (False, True)),
        # Not looked at where nothing depends on it.
        ("dcp-hf.json", True),
    ],
)
def test_truncated_file_is_refused(
    made: Callable[..., Path],
    name: str,
    left: float,
    verify: bool,  # noqa: FBT001
) -> None:
    path = made()
    os.truncate(path / name, int(left * (path / name).stat().st_size))
    source = "dcp" if name in {".metadata", "__0_0.distcp"} else "hf"
    state = blank() if source == "dcp" else {"model": blank()["model"]}
    with pytest.raises((CorruptCheckpointError, ReadError)) as caught:
        load(path, state, source=source, verify=verify)
    assert name in str(caught.value)


def test_zeroed_range_is_found(made: Callable[..., Path]) -> None:
    path = made()
    file, at = place_of(path, state_of(3)["model"]["embed"], "hf/model.safetensors")
    data = bytearray(file.read_bytes())
    data[at + 16 : at + 64] = bytes(48)
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="embed"):
        load(path, {"model": blank()["model"]}, source="hf", verify=True)


@pytest.mark.parametrize("name", ["__0_0.distcp", "hf/model.safetensors", ".metadata"])
def test_file_that_is_gone_is_named(made: Callable[..., Path], name: str) -> None:
    path = made(weights="once")
    (path / name).unlink()
    with pytest.raises(ReadError) as caught:
        load(path, source="dcp")
    assert name in str(caught.value)


class Runs:
    """Pickles to a call that leaves a trace."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_code_in_metadata_is_not_run(made: Callable[..., Path], tmp_path: Path) -> None:
    path = made()
    marker = tmp_path / "was-here"
    data = pickle.dumps({"x": Runs(marker)})
    (path / ".metadata").write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"posix\.mkdir"):
        load(path)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_code_in_an_object_is_not_run_unless_allowed(tmp_path: Path, writer: str) -> None:
    marker = tmp_path / "was-here"
    state = {"w": torch.ones(2), "evil": Runs(marker), "good": [1]}
    if writer == "ours":
        dcp.save(state, storage_writer=HFDualWriter(tmp_path / "x", export=None))
    else:
        dcp.save(state, checkpoint_id=tmp_path / "x")
    target = {"w": torch.zeros(2), "evil": None, "good": None}
    with pytest.raises(PickledObjectError) as caught:
        load(tmp_path / "x", target)
    assert not marker.exists()
    assert (target["good"], target["w"].tolist()) == (None, [0, 0])  # type: ignore[union-attr]
    text = str(caught.value)
    assert "'evil'" in text
    assert "posix.mkdir" in text
    assert "allow_pickled_objects=True" in text
    load(tmp_path / "x", target, allow_pickled_objects=True)
    assert marker.exists()
    assert target["good"] == [1]


class Plain:
    """A class that torch does not know."""

    value = 3


def test_object_of_a_class_that_is_registered_is_loaded(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2), "v": Plain()}, checkpoint_id=tmp_path / "x")
    target: dict[str, Any] = {"w": torch.zeros(2), "v": None}
    with pytest.raises(PickledObjectError, match="Plain"):
        load(tmp_path / "x", target)
    with torch.serialization.safe_globals([Plain]):
        load(tmp_path / "x", target)
    assert target["v"].value == 3


def outside(path: Path) -> Path:
    """A good file beside the checkpoint."""
    other = path.parent / "outside.distcp"
    shutil.copy(path / "__0_0.distcp", other)
    return other


@pytest.mark.parametrize(
    "name",
    ["{other}", "../outside.distcp", "sub/../../outside.distcp", "a\\..\\b", "", ".", "..", "x\0y"],
)
def test_path_that_leads_out_of_the_checkpoint_is_refused(
    made: Callable[..., Path], name: str
) -> None:
    path = made()
    where = name.format(other=outside(path))

    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = replace(info, relative_path=where)

    change_metadata(path, change)
    with pytest.raises(CorruptCheckpointError, match="outside its directory"):
        load(path)


@pytest.mark.parametrize("kind", ["file", "directory", "relative"])
def test_link_that_leads_out_of_the_checkpoint_is_refused(
    made: Callable[..., Path], kind: str
) -> None:
    path = made()
    other = outside(path)
    if kind == "directory":
        (path / "sub").symlink_to(path.parent)
        name = f"sub/{other.name}"
        change_metadata(
            path,
            lambda metadata: metadata.storage_data.update(
                {i: replace(s, relative_path=name) for i, s in metadata.storage_data.items()}
            ),
        )
    else:
        (path / "__0_0.distcp").unlink()
        target = other if kind == "file" else Path("..") / other.name
        (path / "__0_0.distcp").symlink_to(target)
    with pytest.raises(CorruptCheckpointError, match="symbolic link"):
        load(path)


def test_links_within_the_checkpoint_and_to_it_are_followed(made: Callable[..., Path]) -> None:
    path = made()
    (path / "__0_0.distcp").rename(path / "data")
    (path / "__0_0.distcp").symlink_to("data")
    (path.parent / "latest").symlink_to(path)
    state = blank()
    load(path.parent / "latest", state)
    assert torch.equal(state["model"]["embed"], state_of(3)["model"]["embed"])


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_what_is_no_file_is_refused_at_once(made: Callable[..., Path], kind: str) -> None:
    path = made()
    (path / "__0_0.distcp").unlink()
    if kind == "fifo":
        os.mkfifo(path / "__0_0.distcp")
    else:
        (path / "__0_0.distcp").mkdir()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        load(path)


@pytest.mark.parametrize("name", ["many", "nested"])
def test_descriptors_without_end_are_refused_at_once(made: Callable[..., Path], name: str) -> None:
    path = made()
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    descriptors = {"many": ("x" * 100,) * 100_000, "nested": (nested,)}[name]

    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = replace(info, transform_descriptors=descriptors)

    change_metadata(path, change)
    with pytest.raises(CorruptCheckpointError) as caught:
        load(path)
    assert len(str(caught.value)) < 2000
    assert len(str(verify(path))) < 100_000


def of_embed(metadata: Any) -> tuple[MetadataIndex, Any]:
    return next(one for one in metadata.storage_data.items() if one[0].fqn == "model.embed")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda info: replace(info, offset=info.offset + 1), "archive"),
        (lambda info: replace(info, length=info.length - 1), "archive"),
        (lambda info: replace(info, length=10), "archive"),
        (lambda info: replace(info, offset=1 << 40), "too short for an item"),
        (lambda info: replace(info, length=1 << 50), "too short for an item"),
    ],
    ids=["shifted", "shortened", "tiny", "far", "huge"],
)
def test_item_that_is_not_where_the_metadata_says_is_refused(
    made: Callable[..., Path], change: Callable[[Any], Any], problem: str
) -> None:
    path = made()

    def move(metadata: Any) -> None:
        index, info = of_embed(metadata)
        metadata.storage_data[index] = change(info)

    change_metadata(path, move)
    with pytest.raises(CorruptCheckpointError, match=problem) as caught:
        load(path)
    assert "__0_0.distcp" in str(caught.value)


def test_item_without_a_place_is_refused(made: Callable[..., Path]) -> None:
    path = made()
    change_metadata(path, lambda metadata: metadata.storage_data.pop(of_embed(metadata)[0]))
    with pytest.raises(CorruptCheckpointError, match=r"model\.embed"):
        load(path)


def test_archive_of_another_tensor_is_refused(made: Callable[..., Path]) -> None:
    path = made()

    def swap(metadata: Any) -> None:
        index, _ = of_embed(metadata)
        other = next(i for i in metadata.storage_data if i.fqn == "model.layers.0.w")
        metadata.storage_data[index] = metadata.storage_data[other]

    change_metadata(path, swap)
    with pytest.raises(CorruptCheckpointError) as caught:
        load(path)
    assert "another tensor than the metadata says" in str(caught.value)
    assert "[6, 5]" in str(caught.value)


def rewritten(data: bytes, **changes: Any) -> bytes:
    """Write an archive anew with other contents or another compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            compression = changes.get("compression", zipfile.ZIP_STORED)
            name = entry.filename.removeprefix("archive/")
            content = changes.get(name.replace(".", "_"), old.read(entry))
            new.writestr(entry.filename, content, compression)
    return out.getvalue()


def archive(tensor: torch.Tensor) -> bytes:
    out = io.BytesIO()
    torch.save(tensor, out)
    return out.getvalue()


ARCHIVES: dict[str, tuple[bytes, str | None]] = {
    "compressed": (rewritten(archive(torch.arange(3.0)), compression=zipfile.ZIP_DEFLATED), None),
    "of another shape": (archive(torch.arange(4.0)), "another tensor"),
    "of another dtype": (archive(torch.arange(3)), "another tensor"),
    "of no tensor": (archive([1, 2, 3]), "another tensor"),  # type: ignore[arg-type]
    "of code": (
        rewritten(archive(torch.arange(3.0)), data_pkl=pickle.dumps(os.getcwd, 2)),
        "archive",
    ),
    "big-endian": (rewritten(archive(torch.arange(3.0)), byteorder=b"big"), None),
    "text": (b"hello" * 100, "archive"),
    "empty": (b"", "archive"),
    "legacy": (pickle.dumps(3), "archive"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_strange_archive_is_read_by_torch_or_refused(tmp_path: Path, name: str) -> None:
    wanted = torch.arange(3.0)
    dcp.save({"w": wanted}, checkpoint_id=tmp_path / "x")
    data, problem = ARCHIVES[name]
    (tmp_path / "x" / "__0_0.distcp").write_bytes(data)

    def place(metadata: Any) -> None:
        index = next(iter(metadata.storage_data))
        info = metadata.storage_data[index]
        metadata.storage_data[index] = replace(info, offset=0, length=len(data))

    change_metadata(tmp_path / "x", place)
    target = {"w": torch.zeros(3)}
    if problem is None:
        load(tmp_path / "x", target)
        if name == "compressed":
            assert torch.equal(target["w"], wanted)
        return
    with pytest.raises(CorruptCheckpointError, match=problem):
        load(tmp_path / "x", target)


@pytest.mark.parametrize("form", once_forms.FORMS)
@pytest.mark.parametrize("change", ["none", "beyond", "missing", "outside", "climbing", "absolute"])
def test_weights_stored_once_in_places_that_cannot_be_are_refused(
    made: Callable[..., Path], change: str, form: str
) -> None:
    path = made(weights="once")
    file = path / ".metadata"
    metadata = parse_metadata(file.read_bytes(), path=str(file))
    index, once = of_embed(metadata)
    (part,) = once.parts
    (copy,) = part.copies
    outside_of_chunk = Copy(copy.hf_start, (1, 0), copy.loops)
    other = shutil.copy(path / part.path, path.parent / "outside.safetensors")
    parts = {
        "none": part,
        "beyond": replace(part, start=part.start + (1 << 40)),
        "missing": replace(part, copies=()),
        "outside": replace(part, copies=(outside_of_chunk,)),
        "climbing": replace(part, path="../outside.safetensors"),
        "absolute": replace(part, path=str(other)),
    }
    metadata.storage_data[index] = replace(once, parts=(parts[change],))
    file.write_bytes(once_forms.dumps(once_forms.in_form(form, metadata)))
    if change == "none":
        load(path)
        return
    with pytest.raises((CorruptCheckpointError, ReadError)):
        load(path)
    assert not verify(path).ok


def test_target_of_another_shape_than_planned_is_refused(made: Callable[..., Path]) -> None:
    path = made()

    class Planner(dcp.DefaultLoadPlanner):
        def transform_tensor(self, read_item: Any, tensor: torch.Tensor) -> torch.Tensor:
            return super().transform_tensor(read_item, tensor).reshape(-1)

    with pytest.raises(CheckpointException) as caught:
        dcp.load(blank(), storage_reader=HFDualReader(path), planner=Planner())
    ((error, _),) = caught.value.failures.values()
    assert isinstance(error, MismatchError)


def test_failed_loads_leave_no_files_open(made: Callable[..., Path]) -> None:
    path = made()
    file, _ = place_of(path, state_of(3)["model"]["embed"], "__0_0.distcp")
    os.truncate(file, file.stat().st_size // 2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(CheckpointError):
            load(path)
        with pytest.raises(CheckpointError):
            load(path, {"model": {"no": torch.zeros(1)}}, source="hf")
    assert len(os.listdir("/proc/self/fd")) <= before + 2
