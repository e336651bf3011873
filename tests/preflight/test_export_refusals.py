"""Exports that cannot be: refused on every rank, with a message that names the cause."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from packaging.version import Version
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    SaveTimeoutError,
    SpecError,
)
from support.compare import tensor_difference
from support.rank_process import Raised
from support.rank_tensors import WORLD_SIZE, Case, plain, rows, tensor
from support.ranks import run_ranks
from support.state_cases import base_that_is_damaged, base_with_index
from support.stock_readers import load_dcp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh


# A rank that is refused while the others wait for it would show as a timeout.
DEADLINE_S = 10


UNKNOWN_DTYPES = {
    "unknown dtype": torch.complex128,
    "unknown dtype of half numbers": torch.complex32,
}


def refused_exports(root: Path) -> dict[str, Callable[[], HFExport]]:
    """Exports that do not fit a model of `w` (8, 3) and `v` (4,), by the name of the problem."""
    return {
        "missing key": lambda: HFExport(expect_keys=["w", "v", "absent"]),
        "unexpected key": lambda: HFExport(expect_keys=["w"]),
        "two tensors, one key": lambda: HFExport(
            specs=[LoadSpec(name="w", hf_keys=["v"], global_shape=(8, 3))]
        ),
        "reserved key": lambda: HFExport(
            specs=[LoadSpec(name="w", hf_keys=["__metadata__"], global_shape=(8, 3))]
        ),
        "empty key": lambda: HFExport(
            specs=[LoadSpec(name="w", hf_keys=[""], global_shape=(8, 3))]
        ),
        "wrong shape": lambda: HFExport(
            specs=[LoadSpec(name="w", hf_keys=["a"], global_shape=(8, 4))]
        ),
        "no such tensor": lambda: HFExport(
            specs=[LoadSpec(name="absent", hf_keys=["a"], global_shape=(8, 3))]
        ),
        "uneven fusion": lambda: HFExport(
            specs=[LoadSpec(name="w", hf_keys=["a", "b", "c"], global_shape=(8, 3))]
        ),
        "tied to nothing": lambda: HFExport(tied={"v": "absent"}),
        "no such like": lambda: HFExport(like=root / "nowhere"),
        "no such entry": lambda: HFExport(key="absent"),
        "nonsense size": lambda: HFExport(max_shard_size="5 parsecs"),
        "size of nothing": lambda: HFExport(max_shard_size=0),
        "not in like": lambda: HFExport(like=base_with_index(root)),
    }


def refused_state(
    problem: str, rank: int, meshes: Mapping[tuple[int, ...], DeviceMesh]
) -> dict[str, Any]:
    """Return the state dict in which, with its export, the problem lies."""
    entry = Case({"w": rows("w", 8, 3), "v": plain("v", 4)}).sharded(meshes)
    if problem.startswith("unknown dtype"):
        entry["odd"] = tensor("odd", 3, 2, dtype=UNKNOWN_DTYPES[problem])
    if problem == "gap" and rank == 1:
        del entry["w"]
    if problem == "ambiguous entry":
        return {"generator": entry, "critic": dict(entry)}
    return {"model": entry}


def unreadable_exports(root: Path) -> dict[str, Callable[[], HFExport]]:
    """Exports that refer to files which cannot be read; the DCP half need not suffer."""
    return {
        "damaged like": lambda: HFExport(like=base_that_is_damaged(root)),
        "no such asset": lambda: HFExport(assets=[root / "nowhere.json"]),
    }


# Error and what its message must name.
SAYS_WHAT_IS_MISSING = Version(torch.__version__) >= Version("2.13")

REFUSALS: dict[str, tuple[type[Exception], tuple[str, ...]]] = {
    "missing key": (ExportError, ("absent",)),
    "unexpected key": (ExportError, ("'v'",)),
    "two tensors, one key": (ExportError, ("'v'", "w")),
    "reserved key": (ExportError, ("__metadata__",)),
    "empty key": (ExportError, ("''",)),
    "wrong shape": (ExportError, ("w", "[8, 3]", "[8, 4]")),
    "no such tensor": (ExportError, ("absent",)),
    "uneven fusion": (SpecError, ("w", "3 parts")),
    "tied to nothing": (ExportError, ("'v'", "absent")),
    "no such like": (ConfigError, ("nowhere",)),
    "no such entry": (ExportError, ("absent", "'model'")),
    "nonsense size": (ConfigError, ("max_shard_size", "5 parsecs")),
    "size of nothing": (ConfigError, ("max_shard_size", "0")),
    "ambiguous entry": (ExportError, ("generator", "critic", "key=")),
    "unknown dtype": (ExportError, ("odd", "complex128")),
    "unknown dtype of half numbers": (ExportError, ("odd", "complex32")),
    # Torch's planner sees this one before us. Version 2.11 does not say what is missing.
    "gap": (ValueError, ("model.w", "24", "12") if SAYS_WHAT_IS_MISSING else ("global plan",)),
    "not in like": (ExportError, ("'v'", "'w'")),
}


def save_refused(rank: int, world_size: int, root: Path, problem: str) -> Raised | None:
    """Try an export that must be refused; what this rank was told."""
    meshes = {(WORLD_SIZE,): init_device_mesh("cpu", (world_size,))}
    state = refused_state(problem, rank, meshes)
    try:
        exports = refused_exports(root) | unreadable_exports(root)
        export = exports[problem]() if problem in exports else HFExport()
        writer = HFDualWriter(root / "checkpoints" / "one", export=export, timeout_s=DEADLINE_S)
        dcp.async_save(state, storage_writer=writer).result()
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        return Raised.of(error)
    return None


def chain(error: BaseException | None) -> list[BaseException]:
    """Return an error with all that it holds or was raised from."""
    if error is None:
        return []
    held = [error.__cause__]
    if isinstance(error, CheckpointException):
        held += [failure for failure, _ in error.failures.values()]
    return [error, *(deeper for inner in held for deeper in chain(inner))]


def check_dcp_half_alone(checkpoint: Path, problem: str) -> None:
    assert not (checkpoint / "hf").exists()
    expected = {"w": rows("w", 8, 3).full, "v": plain("v", 4).full}
    if problem.startswith("unknown dtype"):
        expected["odd"] = tensor("odd", 3, 2, dtype=UNKNOWN_DTYPES[problem])
    entry = "critic" if problem == "ambiguous entry" else "model"
    loaded = load_dcp(checkpoint, {entry: expected})
    assert tensor_difference(loaded[entry], expected) is None


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("problem", REFUSALS)
def test_export_is_refused_on_every_rank_and_the_dcp_half_is_whole_when_it_does_not_fit(
    tmp_path: Path, problem: str
) -> None:
    kind, words = REFUSALS[problem]
    base_with_index(tmp_path)
    base_that_is_damaged(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for attempt in run_ranks(save_refused, 2, tmp_path, problem):
        assert attempt is not None, f"{problem}: nothing was raised"
        found = [error for error in chain(attempt.error) if isinstance(error, kind)]
        if not found:
            attempt.reraise()
        assert [word for word in words if word not in str(found[0])] == [], str(found[0])
    left = list((tmp_path / "checkpoints").iterdir())
    assert [one.name for one in left] == (["one"] if kind is ExportError else [])
    for checkpoint in left:
        check_dcp_half_alone(checkpoint, problem)


@pytest.mark.parametrize(
    ("problem", "path"), [("damaged like", "base-damaged"), ("no such asset", "nowhere.json")]
)
def test_every_rank_is_told_and_the_dcp_half_is_whole_or_absent_when_an_input_is_unreadable(
    tmp_path: Path, problem: str, path: str
) -> None:
    base_that_is_damaged(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for attempt in run_ranks(save_refused, 2, tmp_path, problem):
        assert attempt is not None, f"{problem}: nothing was raised"
        found = [error for error in chain(attempt.error) if isinstance(error, CheckpointError)]
        if not found or isinstance(found[0], SaveTimeoutError):
            attempt.reraise()
        assert path in str(found[0])
    left = list((tmp_path / "checkpoints").iterdir())
    assert [one.name for one in left] in ([], ["one"])
    for checkpoint in left:
        check_dcp_half_alone(checkpoint, problem)
