"""Every block of Python in the README and the recipes runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dcp_hf_writer
from support.ranks import run_ranks

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^## (?P<title>.+?)$|^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str) -> dict[str, str]:
    """Return the blocks of a page by the heading above them."""
    title, found = "", {}
    for match in BLOCK.finditer((ROOT / name).read_text()):
        title = match["title"] or title
        if match["code"]:
            found[title or "first"] = match["code"]
    return found


RECIPES = blocks("docs/how-to.md")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def run_recipe(rank: int, world_size: int, title: str, directory: str) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    base = Path(directory) / "base"
    model.save_pretrained(base)
    names: dict[str, Any] = {
        "torch": torch,
        "dcp": dcp,
        "dist": dist,
        **{name: getattr(dcp_hf_writer, name) for name in dcp_hf_writer.__all__},
        "model": model,
        "optimizer": optimizer,
        "base_model_directory": base,
        "path": f"{directory}/step-1",
        "state_dict": {"model": model.state_dict(), "step": 1},
    }
    exec(compile(RECIPES[title], title, "exec"), names)  # noqa: S102 - the point of the test


@pytest.mark.parametrize("title", RECIPES)
def test_recipe_leaves_a_checkpoint(title: str, tmp_path: Path) -> None:
    run_ranks(run_recipe, 1, title, str(tmp_path))
    left = {path.name for path in tmp_path.iterdir()}
    assert {"base", "step-1"} <= left <= {"base", "step-1", "step-1-plain"}
    assert load_file(tmp_path / "step-1" / "hf" / "model.safetensors")
    assert (tmp_path / "step-1" / ".metadata").is_file()


def test_readme_example_trains_and_saves_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(blocks("README.md")["Use it"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["step-10", "step-5"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt" / "step-10" / "hf")
    assert model.config.architectures == ["LlamaForCausalLM"]
    state_dict = {"model": {name: torch.zeros_like(t) for name, t in model.state_dict().items()}}
    dcp.load(state_dict, checkpoint_id=tmp_path / "ckpt" / "step-10", no_dist=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state_dict["model"][name]), name
