"""Metadata whose classes have more fields than this torch's: read, not refused."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_hf_writer import HFDualReader, HFDualWriter, materialize, verify
from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.parse_dcp_metadata import parse_metadata
from support.compare import tensor_difference
from support.small_states import model_of, spoil, state_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What the classes pickle beyond the fields that this package knows.
PLAIN = {
    "a_tuple": (2, 1),
    "a_list": [1, [2.5, "a"], {"b": None}],
    "a_flag": True,
    "a_dtype": torch.float8_e4m3fn,
    "a_size": torch.Size([3]),
    "a_chunk": ChunkStorageMetadata(torch.Size([0]), torch.Size([1])),
}


def metadata() -> Metadata:
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 2]))
    entry = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([4, 2]), [chunk])
    return Metadata(
        state_dict_metadata={"w": entry, "step": BytesStorageMetadata()},
        planner_data={"w": ("w",), "step": ("step",)},
        storage_data={MetadataIndex("w", (0, 0), 0): _StorageInfo("__0_0.distcp", 0, 16)},
        storage_meta=StorageMeta("/ckpt"),
    )


def parse(found: Metadata) -> Metadata:
    return parse_metadata(pickle.dumps(found), path="/ckpt/.metadata")


def entry_of(found: Metadata) -> TensorStorageMetadata:
    entry = found.state_dict_metadata["w"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


OBJECTS: dict[str, Callable[[Metadata], Any]] = {
    "Metadata": lambda found: found,
    "TensorStorageMetadata": entry_of,
    "BytesStorageMetadata": lambda found: found.state_dict_metadata["step"],
    "ChunkStorageMetadata": lambda found: entry_of(found).chunks[0],
    "MetadataIndex": lambda found: next(iter(found.storage_data or ())),
    "_StorageInfo": lambda found: next(iter((found.storage_data or {}).values())),
    "StorageMeta": lambda found: found.storage_meta,
}


@pytest.mark.parametrize("name", OBJECTS)
def test_field_of_a_newer_torch_is_kept(name: str) -> None:
    written = metadata()
    fields = {"a_flag": True, "a_note": "new"} if name == "MetadataIndex" else PLAIN
    # The dictionary, because an index is frozen.
    vars(OBJECTS[name](written)).update(fields)
    found = parse(written)
    assert found == written
    assert {key: vars(OBJECTS[name](found))[key] for key in fields} == fields


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("new", complex(1, 2)),
        ("new", {"inner": [BytesStorageMetadata()]}),
        ("new", nested(100)),
        ("__class__", 3),
        ("no name", 3),
    ],
    ids=["unknown class", "misplaced class", "deep", "dunder", "no name"],
)
def test_field_of_a_newer_torch_is_refused_when_it_is_not_plain(
    name: str, field: str, value: object
) -> None:
    written = metadata()
    vars(OBJECTS[name](written))[field] = value
    with pytest.raises(CorruptCheckpointError, match=r"/ckpt/\.metadata"):
        parse(written)


def test_new_field_of_a_key_is_refused_when_hashing_it_may_take_long() -> None:
    written = metadata()
    vars(OBJECTS["MetadataIndex"](written))["new"] = (1, 2)
    with pytest.raises(CorruptCheckpointError, match="MetadataIndex with 'new' a tuple"):
        parse(written)


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `TensorProperties` pickle as torch 2.15 does, and one field more."""
    before = TensorProperties.__getstate__
    properties = TensorProperties(torch.float32).__getstate__()

    def getstate(self: TensorProperties) -> tuple[Any, ...]:
        strides = (1,) if len(properties) == 5 else ()
        return (*before(self), *strides, "a field to come")

    monkeypatch.setattr(TensorProperties, "__getstate__", getstate)


@pytest.mark.usefixtures("newer")
def test_properties_of_a_newer_torch_are_read() -> None:
    written = metadata()
    with pytest.raises(ValueError, match="too many values"):
        pickle.loads(pickle.dumps(written))
    assert entry_of(parse(written)).properties.dtype is torch.bfloat16


@pytest.mark.parametrize("added", [(complex(1, 2),), ([nested(100)],)], ids=["class", "deep"])
def test_properties_are_refused_when_a_new_one_is_not_plain(
    added: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TensorProperties(torch.bfloat16).__getstate__()
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda _: (*state, *added))
    with pytest.raises(CorruptCheckpointError, match=r"/ckpt/\.metadata"):
        parse(metadata())


def test_properties_are_refused_when_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = TensorProperties(torch.bfloat16).__getstate__()
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda _: state[:4])
    with pytest.raises(CorruptCheckpointError, match="TensorProperties with a state of dtype"):
        parse(metadata())


def loaded(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = {"model": {name: value.clone() for name, value in model_of(1).items()}}
    spoil(state)
    dcp.load(state, storage_reader=HFDualReader(path))
    return dict(state["model"])


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize("weights", ["both", "once"])
def test_checkpoint_of_a_newer_torch_is_read_verified_and_materialized(
    tmp_path: Path, weights: Any
) -> None:
    path, whole = tmp_path / "saved", tmp_path / "whole"
    dcp.save(state_of(1), storage_writer=HFDualWriter(path, weights=weights))
    assert tensor_difference(loaded(path), model_of(1)) is None
    assert verify(path).ok
    if weights == "once":
        materialize(path, whole)
        assert tensor_difference(loaded(whole), model_of(1)) is None
        assert verify(whole).ok
