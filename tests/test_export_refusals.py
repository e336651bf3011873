"""Exports that cannot be: refused on every rank, with a message that names the cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import CheckpointError, LayoutError, SpecError
from held import WORLD_SIZE, Case, plain, rows
from rank_process import Raised
from ranks import run_ranks
from state_cases import base_with_index

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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
        "not in like": lambda: HFExport(like=base_with_index(root)),
    }


# Error and what its message must name.
REFUSALS: dict[str, tuple[type[CheckpointError], tuple[str, ...]]] = {
    "missing key": (LayoutError, ("absent",)),
    "unexpected key": (LayoutError, ("'v'",)),
    "two tensors, one key": (LayoutError, ("'v'", "w")),
    "reserved key": (LayoutError, ("__metadata__",)),
    "empty key": (LayoutError, ("''",)),
    "wrong shape": (SpecError, ("w", "[8, 3]", "[8, 4]")),
    "no such tensor": (SpecError, ("absent",)),
    "uneven fusion": (SpecError, ("w", "3 parts")),
    "tied to nothing": (LayoutError, ("'v'", "absent")),
    "not in like": (LayoutError, ("'v'", "'w'")),
}


def save_refused(rank: int, world_size: int, root: Path) -> dict[str, Raised | None]:
    """Try each export that must be refused; what each attempt raised, by problem."""
    meshes = {(WORLD_SIZE,): init_device_mesh("cpu", (WORLD_SIZE,))}
    entry = Case({"w": rows("w", 8, 3), "v": plain("v", 4)}).sharded(meshes)
    raised: dict[str, Raised | None] = {}
    for problem, export in refused_exports(root).items():
        raised[problem] = None
        try:
            writer = HFDualWriter(root / "checkpoints" / problem, export=export())
            dcp.async_save({"model": entry}, storage_writer=writer).result()
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            raised[problem] = Raised.of(error)
    return raised


@pytest.fixture(scope="module")
def refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[dict[str, Raised | None]]]:
    root = tmp_path_factory.mktemp("refused")
    base_with_index(root)
    (root / "checkpoints").mkdir()
    return root / "checkpoints", run_ranks(save_refused, WORLD_SIZE, root)


def chain(error: BaseException | None) -> list[BaseException]:
    """Return an error with all that it holds or was raised from."""
    if error is None:
        return []
    held = [error.__cause__]
    if isinstance(error, CheckpointException):
        held += [failure for failure, _ in error.failures.values()]
    return [error, *(deeper for inner in held for deeper in chain(inner))]


@pytest.mark.parametrize("problem", REFUSALS)
def test_export_is_refused_on_every_rank_when_it_does_not_fit(
    refused: tuple[Path, list[dict[str, Raised | None]]], problem: str
) -> None:
    kind, words = REFUSALS[problem]
    for raised in refused[1]:
        attempt = raised[problem]
        assert attempt is not None, f"{problem}: nothing was raised"
        found = [error for error in chain(attempt.error) if isinstance(error, kind)]
        if not found:
            attempt.reraise()
        assert [word for word in words if word not in str(found[0])] == [], str(found[0])


def test_nothing_is_left_behind_when_exports_are_refused(
    refused: tuple[Path, list[dict[str, Raised | None]]],
) -> None:
    assert refused_exports(refused[0].parent).keys() == REFUSALS.keys()
    assert list(refused[0].iterdir()) == []
