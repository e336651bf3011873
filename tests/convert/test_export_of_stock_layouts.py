"""An export of what several ranks saved with stock torch equals the live export, to the byte."""

from __future__ import annotations

import filecmp
import itertools
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from support.parallel_models import can_distribute
from support.ranks import run_ranks
from support.stock_layouts import EXPORT, FORMS, WORLD_SIZE, save_stock_layouts

if TYPE_CHECKING:
    from pathlib import Path

    from support.rank_process import Raised

DISTRIBUTED = ("tp", "fsdp_tp", "ep_fsdp")
CASES = [
    *(("llama_tied", form) for form in FORMS if form != "ep_fsdp"),
    *(("mixtral", form) for form in ("fsdp2", "titan", "fsdp1_sharded", "ep_fsdp")),
    *(("gpt_oss", form) for form in ("fsdp2", "tp", "ep_fsdp")),
]
WORKERS = ("1", "2")

Exported = dict[tuple[str, str, str], tuple[int, str]]


def applicable() -> list[tuple[str, str]]:
    """Return the cases whose model can be held so here."""
    return [case for case in CASES if can_distribute() or case[1] not in DISTRIBUTED]


def export_all(rank: int, world_size: int, root: Path, cases: list[tuple[str, str]]) -> Exported:
    """Export every checkpoint with real command lines, in one process that has torch already."""
    from dcp_hf_writer.cli.app import app

    found = {}
    for (name, form), workers in itertools.product(cases, WORKERS):
        directory = root / name / form
        if not (directory / "live" / "hf").is_dir():
            continue
        options = ["--config", str(directory / "live" / "hf"), "--workers", workers]
        options += ["--dtype", "bfloat16", "--max-shard-size", EXPORT["max_shard_size"]]
        line = ["export", str(directory / "stock"), str(directory / f"hf-{workers}"), *options]
        result = CliRunner().invoke(app, line)
        found[name, form, workers] = (result.exit_code, result.output)
    return found


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[tuple[str, str], Raised], Exported]:
    root = tmp_path_factory.mktemp("stock")
    failures: dict[tuple[str, str], Raised] = {}
    for rank in run_ranks(save_stock_layouts, WORLD_SIZE, root, applicable()):
        failures |= rank
    (exported,) = run_ranks(export_all, 1, root, applicable())
    return root, failures, exported


@pytest.mark.parametrize(("name", "form"), applicable())
def test_export_of_a_stock_layout_equals_the_live_export(
    saved: tuple[Path, dict[tuple[str, str], Raised], Exported], name: str, form: str
) -> None:
    root, failures, exported = saved
    if (name, form) in failures:
        failures[name, form].reraise()
    directory = root / name / form
    live = directory / "live" / "hf"
    names = sorted(path.name for path in live.iterdir())
    assert sum(one.endswith(".safetensors") for one in names) > 1
    for workers in WORKERS:
        code, output = exported[name, form, workers]
        assert code == 0, output
        made = directory / f"hf-{workers}"
        assert sorted(path.name for path in made.iterdir()) == names
        same, differing, odd = filecmp.cmpfiles(made, live, names, shallow=False)
        assert (differing, odd) == ([], [])
        assert sorted(same) == names
