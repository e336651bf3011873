"""Every block of Python in the README and the recipes runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dcp_hf_writer import HFDualWriter, HFExport, verify
from support.page_scripts import PAGES
from support.ranks import run_ranks
from support.stock_readers import load_dcp

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^## (?P<title>.+?)$|^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str) -> dict[str, list[str]]:
    """Return the blocks of a page, in order, by the heading above them."""
    title = "first"
    found: dict[str, list[str]] = {}
    for match in BLOCK.finditer((ROOT / name).read_text()):
        title = match["title"] or title
        if match["code"]:
            found.setdefault(title, []).append(match["code"])
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
    # The page says that a recipe uses these names, and imports the others.
    names: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "base_model_directory": base,
        "path": f"{directory}/step-1",
        "state_dict": {"model": model.state_dict(), "step": 1},
    }
    given = dict(names)
    for number, code in enumerate(RECIPES[title]):
        # A block imports what it needs, also where an earlier block of the recipe did so.
        names = {name: value for name, value in names.items() if not is_imported(value)} | given
        exec(compile(code, f"{title}, block {number}", "exec"), names)  # noqa: S102 - the point


def is_imported(value: object) -> bool:
    return isinstance(value, (ModuleType, type)) or callable(value)


@pytest.mark.parametrize("title", RECIPES)
def test_recipe_leaves_a_checkpoint(title: str, tmp_path: Path) -> None:
    run_ranks(run_recipe, 1, title, str(tmp_path))
    left = {path.name for path in tmp_path.iterdir()}
    assert {"base", "step-1"} <= left <= {"base", "step-1", "step-1-plain", "step-1-earlier"}
    assert load_file(tmp_path / "step-1" / "hf" / "model.safetensors")
    assert (tmp_path / "step-1" / ".metadata").is_file()


def test_first_block_of_the_readme_saves(tmp_path: Path) -> None:
    run_ranks(run_first_block, 1, str(tmp_path))
    assert verify(tmp_path / "ckpt" / "step-100").ok
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt" / "step-100" / "hf")
    assert served.config.architectures == ["LlamaForCausalLM"]


def run_first_block(rank: int, world_size: int, directory: str) -> None:
    os.chdir(directory)
    model = tiny_model()
    names = {
        "dcp": dcp,
        "HFDualWriter": HFDualWriter,
        "HFExport": HFExport,
        "model": model,
        "state_dict": {"model": model.state_dict()},
    }
    (code,) = blocks("README.md")["first"]
    exec(code, names)  # noqa: S102 - the point of the test
    names["future"].result()  # type: ignore[attr-defined]


def test_no_other_page_has_blocks_that_nothing_runs() -> None:
    pages = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    assert {page for page in pages if blocks(page)} == {
        *("README.md", "docs/how-to.md", "docs/index.md", "docs/manager.md", "docs/trainers.md"),
        *(f"docs/{page}" for page in PAGES),
    }
    assert list(blocks("README.md")) == ["first", "Use it"]


def run_first_page(rank: int, world_size: int, directory: str) -> None:
    os.chdir(directory)
    names: dict[str, Any] = {}
    for title, codes in blocks("docs/index.md").items():
        for code in codes:
            exec(compile(code, title, "exec"), names)  # noqa: S102 - the point
    assert names["step"] == 1
    served, resumed = names["served"].state_dict(), names["model"].state_dict()
    assert served.keys() == resumed.keys()
    assert all(torch.equal(served[name], resumed[name]) for name in served)
    moments = names["optimizer"].state_dict()["state"]
    assert all(int(one["step"]) == 1 for one in moments.values())
    assert len(moments) == len(list(names["model"].parameters()))


def test_first_page_saves_checks_serves_and_resumes(tmp_path: Path) -> None:
    run_ranks(run_first_page, 1, str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "ckpt" / "step-1").iterdir()) == [
        *(".metadata", "__0_0.distcp", "dcp-hf", "dcp-hf.json", "hf")
    ]


def run_trainers_block(rank: int, world_size: int, title: str, directory: str) -> None:
    os.chdir(directory)
    (code,) = blocks("docs/trainers.md")[title]
    exec(compile(code, title, "exec"), {})  # noqa: S102 - the point


@pytest.mark.parametrize(
    ("title", "left"),
    [
        ("transformers.Trainer", ["out/step-10/hf", "out/step-5/hf"]),
        ("PEFT", ["lora/merged/hf", "lora/step-1/hf"]),
    ],
)
def test_block_about_a_trainer_leaves_checkpoints(
    title: str, left: list[str], tmp_path: Path
) -> None:
    run_ranks(run_trainers_block, 1, title, str(tmp_path))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*-*/hf"))
    found += [str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/merged/hf")]
    assert sorted(found) == left
    for path in left:
        assert verify((tmp_path / path).parent).ok


def torchrun(ranks: int, code: str, directory: Path, *arguments: str) -> str:
    """Run a script on a number of ranks in a directory; return what the ranks print.

    Each rank prints to a file of its own: in one pipe, the lines of two ranks can run together.
    """
    script = directory / "train.py"
    script.write_text(code)
    with tempfile.TemporaryDirectory() as logs:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        launcher += ["--redirects=1", f"--log-dir={logs}"]
        done = subprocess.run(
            [sys.executable, *launcher, str(script), *arguments],
            cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed = sorted(Path(logs).glob("*/attempt_0/*/stdout.log"))
        assert len(printed) == ranks
        return "".join(path.read_text() for path in printed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the example of the README on two ranks; return the directory and what it prints."""
    directory = tmp_path_factory.mktemp("readme")
    (code,) = blocks("README.md")["Use it"]
    return directory, torchrun(2, code, directory)


# Two launches of torchrun, each of which imports torch in every rank: slow on a busy machine.
@pytest.mark.timeout(500)
def test_readme_example_trains_and_saves_under_torchrun(trained: tuple[Path, str]) -> None:
    directory, printed = trained
    assert len(re.findall(r"^step \d+: loss \d+\.\d+$", printed, re.MULTILINE)) == 10
    assert "resume from ckpt/step-10, serve ckpt/step-10/hf" in printed
    assert (directory / "ckpt" / "step-5" / "dcp-hf.json").is_file()
    check_served(directory / "ckpt" / "step-10", torch.float32)


@pytest.mark.timeout(500)
def test_readme_example_resumes_on_three_ranks_and_exports_bfloat16(
    trained: tuple[Path, str],
) -> None:
    directory, _ = trained
    (code,) = blocks("README.md")["Use it"]
    in_bfloat16 = code.replace(
        "from_transformers(model)", "from_transformers(model, dtype=torch.bfloat16)"
    )
    assert in_bfloat16 != code
    printed = torchrun(3, in_bfloat16, directory, "ckpt/step-10")
    steps = [str(step) for step in range(11, 21)]
    assert re.findall(r"^step (\d+):", printed, re.MULTILINE) == steps
    check_served(directory / "ckpt" / "step-20", torch.bfloat16)
    # The moments went on from where they were: Adam has counted all steps.
    reader = dcp.FileSystemReader(directory / "ckpt" / "step-20")
    entries = reader.read_metadata().state_dict_metadata
    steps = {
        key: torch.zeros(()) for key in entries if re.fullmatch(r"optim\.state\..*\.step", key)
    }
    assert steps
    dcp.load(steps, storage_reader=reader, no_dist=True)
    assert {int(one) for one in steps.values()} == {20}


def check_served(checkpoint: Path, dtype: torch.dtype) -> None:
    """Check that transformers loads what the DCP half holds, cast to a dtype."""
    assert verify(checkpoint).ok
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "hf")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.dtype == dtype
    served = model.state_dict()
    trained = {name: tensor.float() for name, tensor in served.items()}
    saved = load_dcp(checkpoint, {"model": trained})["model"]
    for name, tensor in served.items():
        assert torch.equal(tensor, saved[name].to(dtype)), name
        assert (
            dtype == torch.float32 or not torch.equal(tensor.float(), saved[name]) or "norm" in name
        )


def test_run_of_the_manager_page_trains_and_resumes_under_torchrun(tmp_path: Path) -> None:
    (code,) = blocks("docs/manager.md")["A whole run"]
    first = torchrun(2, code.replace("(start or 0) + 1, 31", "(start or 0) + 1, 8"), tmp_path)
    assert "rank 1 step 7 loss" in first
    second = torchrun(2, code, tmp_path)
    assert "rank 1 step 7 loss" not in second
    assert {"rank 1 step 8 loss", "rank 0 step 30 loss"} <= {
        line.partition("loss")[0] + "loss" for line in second.splitlines()
    }
    found = sorted(path.name for path in (tmp_path / "runs" / "a").glob("step-*"))
    assert found[-1] == "step-30"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "a" / "hf-latest")
    assert model.config.architectures == ["LlamaForCausalLM"]
