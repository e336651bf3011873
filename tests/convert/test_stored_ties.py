"""A stored tie that drifted is refused: an export would lose one of the two tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFExport, LoadSpec
from dcp_hf_writer.convert.export_checkpoint import export_checkpoint
from dcp_hf_writer.errors import PlanningError
from support.stock_readers import load_hf

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (6, 4)
GIVEN = HFExport(tied={"head": "embed"})
ALIAS = HFExport(
    specs=[
        LoadSpec("embed", "hub.embed", SHAPE),
        LoadSpec("head", "hub.head", SHAPE, alias_of="hub.embed"),
    ]
)


def stored(directory: Path, head: torch.Tensor, prefix: str = "") -> str:
    tensors = {"embed": torch.arange(24.0).reshape(SHAPE), "head": head}
    model = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    dcp.save({"model": model}, checkpoint_id=directory)
    return str(directory)


def changed() -> torch.Tensor:
    tensor = torch.arange(24.0).reshape(SHAPE)
    tensor[-1, -1] += 1
    return tensor


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("export", [GIVEN, ALIAS], ids=["given", "alias"])
def test_export_refuses_tied_tensors_with_different_values(
    tmp_path: Path, export: HFExport, prefix: str
) -> None:
    path = stored(tmp_path / "dcp", changed(), prefix)
    with pytest.raises(PlanningError, match=r"head'.*embed.*tie_word_embeddings"):
        export_checkpoint(path, str(tmp_path / "hf"), export)
    assert [one.name for one in tmp_path.iterdir()] == ["dcp"]


def test_export_refuses_tied_tensors_of_different_dtypes(tmp_path: Path) -> None:
    path = stored(tmp_path / "dcp", torch.arange(24).reshape(SHAPE).bfloat16())
    with pytest.raises(PlanningError, match="different values"):
        export_checkpoint(path, str(tmp_path / "hf"), GIVEN)


@pytest.mark.parametrize("export", [GIVEN, ALIAS], ids=["given", "alias"])
def test_export_keeps_one_of_two_equal_tensors(tmp_path: Path, export: HFExport) -> None:
    path = stored(tmp_path / "dcp", torch.arange(24.0).reshape(SHAPE))
    export_checkpoint(path, str(tmp_path / "hf"), export)
    (key,) = load_hf(tmp_path / "hf")
    assert key.endswith("embed")


def test_export_keeps_both_tensors_when_no_tie_is_declared(tmp_path: Path) -> None:
    path = stored(tmp_path / "dcp", changed())
    export_checkpoint(path, str(tmp_path / "hf"), HFExport(tied={}))
    assert torch.equal(load_hf(tmp_path / "hf")["head"], changed())
