"""What a checkpoint pickles names nothing of this package, whatever kind of save it is of."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, HFSavePlanner, materialize
from dcp_hf_writer.formats.parse_dcp_metadata import parse_metadata
from dcp_hf_writer.formats.weights_once_places import FORMAT, NOTICE, StoredOnce
from support import once_forms
from support.golden_states import experts_spec
from support.ranks import run_ranks
from support.small_states import state_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORLD_SIZE = 2
STEP = 5
PACKAGE = "dcp_hf_writer"
KINDS = {
    "both": {},
    "once": {"weights": "once"},
    "once overlapped": {"weights": "once", "staging": "overlap"},
    "once, planner": {"weights": "once"},
    "once, cast": {
        "weights": "once",
        "export": HFExport(dtype=torch.bfloat16, keep_dtype=["norm"]),
    },
    "no export": {"export": None},
    "given writer": {"dcp_writer": dcp.FileSystemWriter("unused")},
    "given writer, once": {"weights": "once", "dcp_writer": dcp.FileSystemWriter("unused")},
}
EXTRA = ("synchronous", "in a process", "hand-sharded", "hand-sharded once", "materialized")


class Counter:
    """State that is no dict."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": 7}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def state_with_objects(mesh: Any) -> dict[str, Any]:
    state = state_of(STEP, mesh)
    state["counter"] = Counter()
    state["values"] = {"shape": torch.Size([2]), "order": OrderedDict(a=1), "dtype": torch.bfloat16}
    return state


def save_all(rank: int, world_size: int, root: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    for kind, options in KINDS.items():
        planner = HFSavePlanner() if "planner" in kind else None
        writer = HFDualWriter(root / kind, **options)
        saving = dcp.async_save(state_with_objects(mesh), storage_writer=writer, planner=planner)
        getattr(saving, "upload_completion", saving).result()
    writer = HFDualWriter(root / "synchronous", weights="once")
    dcp.save(state_with_objects(mesh), storage_writer=writer)
    writer = HFDualWriter(root / "in a process", weights="once")
    dcp.async_save(
        state_of(STEP, mesh),
        storage_writer=writer,
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    ).result()
    spec = experts_spec(rank, world_size)
    for kind in ("hand-sharded", "hand-sharded once"):
        weights: Any = "once" if "once" in kind else "both"
        writer = HFDualWriter(root / kind, export=HFExport(specs=[spec]), weights=weights)
        state = {"model": {"experts": torch.full((1, 2, 3), float(rank))}, "step": STEP}
        dcp.async_save(state, storage_writer=writer, planner=HFSavePlanner([spec])).result()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names")
    run_ranks(save_all, WORLD_SIZE, root)
    materialize(root / "once", root / "materialized")
    return root


def named(data: bytes) -> set[str]:
    """Return what the opcodes of a pickle say that begins with the package's name."""
    # Modules reach GLOBAL and INST as "module name", and STACK_GLOBAL as a string by itself.
    texts = {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    return {text for text in texts if text.partition(" ")[0].partition(".")[0] == PACKAGE}


def pickles_of(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every pickle in the DCP half: the metadata, and that of each archive."""
    content = (directory / ".metadata").read_bytes()
    yield ".metadata", content
    metadata = parse_metadata(content, path=".metadata")
    for index, where in (metadata.storage_data or {}).items():
        if not isinstance(where, StoredOnce):
            with (directory / where.relative_path).open("rb") as file:
                file.seek(where.offset)
                data = file.read(where.length)
            # Not zipfile: archives of ours have no CRC, as torch's own with CRC off.
            archive = torch._C.PyTorchFileReader(io.BytesIO(data))
            yield (
                f"{index.fqn} {tuple(index.offset or ())}".removesuffix(" ()"),
                archive.get_record("data.pkl"),
            )


@pytest.mark.parametrize("kind", [*KINDS, *EXTRA])
def test_nothing_pickled_names_this_package(root: Path, kind: str) -> None:
    found = dict(pickles_of(root / kind))
    assert {"step", ".metadata"} <= found.keys()
    assert {where: named(data) for where, data in found.items() if named(data)} == {}


@pytest.mark.parametrize("kind", [kind for kind in (*KINDS, *EXTRA) if "once" in kind])
def test_weights_are_stored_once(root: Path, kind: str) -> None:
    metadata = HFDualReader(root / kind).read_metadata()
    storage = metadata.storage_data or {}
    once = {index.fqn for index, where in storage.items() if isinstance(where, StoredOnce)}
    assert once
    assert all(fqn.startswith("model.") for fqn in once)


@pytest.mark.parametrize("kind", [*KINDS, *EXTRA])
def test_metadata_is_made_of_torch_alone(root: Path, kind: str) -> None:
    modules = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            modules.add(module.partition(".")[0])
            return super().find_class(module, name)

    Unpickler(io.BytesIO((root / kind / ".metadata").read_bytes())).load()
    assert modules <= {"torch", "collections", "pathlib"}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_check_of_names_sees_what_it_forbids(protocol: int) -> None:
    once = once_forms.StoredOnce(())
    module = type(once).__module__
    shown = {module, f"{module} StoredOnce"}
    assert named(once_forms.dumps([once], protocol)) & shown
    assert not named(pickle.dumps([FORMAT, NOTICE], protocol))


def test_equal_text_of_all_ranks_is_written_once(root: Path) -> None:
    data = (root / "once" / ".metadata").read_bytes()
    assert data.count(NOTICE.encode()) == 1
    assert data.count(FORMAT.encode()) == 1
    assert data.count(b"hf/model.safetensors") == 1
