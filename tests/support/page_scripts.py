"""The pages of the documentation whose blocks are one script, and what each must leave."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dcp_hf_writer import specs_from_function, verify
from support.pictures import DOCS, EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Names = dict[str, Any]


def run_page(rank: int, world_size: int, page: str, directory: str, given: Names) -> None:
    """Run all blocks of a page in one namespace, then check what they left in it."""
    os.chdir(directory)
    names = dict(given)
    text = (DOCS / page).read_text()
    for number, match in enumerate(BLOCK.finditer(text)):
        kind, code = match.groups()
        if kind == "sh":
            run_commands(code)
            continue
        # Empty lines before it, so that a traceback has the line numbers of the page.
        placed = "\n" * text[: match.start(2)].count("\n") + code
        exec(compile(placed, f"{page}, block {number}", "exec"), names)  # noqa: S102 - the point
    PAGES[page].check(names)


def run_commands(lines: str) -> None:
    """Run the command lines of a block, in this process, which has torch already."""
    from dcp_hf_writer.cli.app import app

    for line in lines.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "dcp-hf"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}: {result.output}"


def same(one: Any, other: Any) -> bool:
    """Whether two state dicts have the same tensors on this rank."""
    assert one.keys() == other.keys()
    return all(
        torch.equal(getattr(a, "_local_tensor", a), getattr(b, "_local_tensor", b))
        for a, b in ((one[key], other[key]) for key in one)
    )


def check_fsdp2(names: Names) -> None:
    model, resumed, tuned = (names[name].state_dict() for name in ("model", "resumed", "tuned"))
    assert same(model, resumed)
    assert same({key: value.bfloat16().float() for key, value in model.items()}, tuned)
    assert all(int(one["step"]) == 1 for one in names["fresh"].state_dict()["state"].values())


def check_hsdp(names: Names) -> None:
    written = names["written"]
    assert len(written) == 4
    assert min(written.values()) > 0.5 * max(written.values())
    whole = {key: value.full_tensor() for key, value in names["model"].state_dict().items()}
    assert same(
        whole, {key: value.full_tensor() for key, value in names["loaded"]["model"].items()}
    )


def check_tp_ep(names: Names) -> None:
    experts = {
        f"model.layers.0.block_sparse_moe.experts.{e}.w{w}.weight"
        for e in range(4)
        for w in (1, 2, 3)
    }
    assert set(names["names"]) == experts
    model = names["dense"]
    stored = load_file("ckpt/dense/hf/model.safetensors")
    assert same({key: value.full_tensor() for key, value in model.state_dict().items()}, stored)


def check_experts(names: Names) -> None:
    assert names["by_function"].parts == names["spec"].parts
    assert torch.equal(names["part"]["model"]["experts"], names["experts"])
    per_rank = 8 // names["ranks"]
    mine = names["whole"]["model"]["experts"][names["rank"] * per_rank :][:per_rank]
    assert torch.equal(mine, names["experts"])


def check_weight_sync(names: Names) -> None:
    rank = torch.distributed.get_rank()
    assert names["own"] == [str(2 * rank), str(2 * rank + 1)]
    assert same(names["engine"].weights, load_file("ckpt/step-1/hf/model.safetensors"))


def check_serving(names: Names) -> None:
    assert os.readlink("runs/a/hf-latest") == "step-2/hf"
    assert os.readlink("runs/a/latest") == "step-3"
    expected = {key: value.bfloat16() for key, value in names["model"].state_dict().items()}
    assert same(expected, names["served"].state_dict())


def check_object_stores(names: Names) -> None:
    assert names["loaded"]["step"] == 100
    saved = names["model"].state_dict()
    assert same(saved, names["loaded"]["model"])
    assert same(saved, names["other"].state_dict())
    mirror = f"{names['url']}/step-101"
    found = verify(mirror, storage_options=names["options"])
    assert found.ok, found.problems


def check_shared_file_systems(names: Names) -> None:
    direct, exchange = (Path("ckpt", way, "hf") for way in ("direct", "exchange"))
    for file in direct.iterdir():
        assert file.read_bytes() == (exchange / file.name).read_bytes()
    assert len(names["timings"]["ranks"]) == 2


def check_moving(names: Names) -> None:
    assert same(names["weights"], names["again"])
    assert names["parts"] == [(key, (128, 64)) for key in names["keys"]]


def check_converting(names: Names) -> None:
    expected = {key: value.bfloat16() for key, value in names["weights"].items()}
    assert same(expected, names["loaded"]["model"])
    assert same(expected, names["served"].state_dict())
    assert Path("new/plain/.metadata").is_file()


def check_host_memory(names: Names) -> None:
    # Found by name among the maps; a list of descriptors would hold the one that lists them.
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [line[0].split("-") for line in maps if line[-2].startswith("/memfd:dcp-hf-")]
    allocated = sum(int(end, 16) - int(start, 16) for start, end in ends)
    assert allocated
    assert names["slab"] == pytest.approx(allocated, rel=0.01)


def check_load_spec(names: Names) -> None:
    for name, example in EXAMPLES.items():
        whole = {example.fqn: torch.empty(example.shape, device="meta")}
        drawn = {
            part.key: part for part in specs_from_function(example.to_hub, whole)[example.fqn].parts
        }
        assert {part.key: part for part in names[name].parts} == drawn, name
    assert names["specs"]["gate_up"].parts == names["interleaved"].parts


@dataclass(frozen=True)
class Page:
    """How the blocks of a page run, and what they must leave."""

    ranks: int
    check: Callable[[Names], None]
    left: tuple[str, ...] = ()
    """Directories of checkpoints, relative to the working directory."""


PAGES = {
    "fsdp2.md": Page(2, check_fsdp2, ("ckpt/step-1",)),
    "tp-ep.md": Page(4, check_tp_ep, ("ckpt/dense", "ckpt/moe")),
    "hsdp.md": Page(4, check_hsdp, ("ckpt/step-1",)),
    "experts.md": Page(2, check_experts, ("ckpt/step-1",)),
    "weight-sync.md": Page(2, check_weight_sync, ("ckpt/step-1",)),
    "serving.md": Page(1, check_serving, ("runs/a/step-1", "runs/a/step-2", "runs/a/step-3")),
    "object-stores.md": Page(2, check_object_stores, ("ckpt/step-101", "ckpt/step-102")),
    "shared-file-systems.md": Page(2, check_shared_file_systems, ("ckpt/direct", "ckpt/exchange")),
    "moving.md": Page(2, check_moving, ("ckpt/step-1",)),
    "converting.md": Page(1, check_converting, ("new/dcp", "new/plain", "old/once")),
    "host-memory.md": Page(2, check_host_memory),
    "load-spec.md": Page(1, check_load_spec),
}
