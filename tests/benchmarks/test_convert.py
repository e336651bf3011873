"""`benchmarks/convert.py` compares ways that give the same tensors, in each layout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from support.processes import in_fresh_process

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXPERTS = {"num_hidden_layers": 2, "vocab_size": 512, "hidden_size": 128, "num_experts": 4}


def convert(name: str, directory: Path) -> list[str]:
    """Measure all exports of a small model, which also compares them; return the lines."""
    sys.path.insert(0, str(BENCHMARKS))
    import convert as benchmark
    from convert_layouts import llama_layout, moe_layout, titan_layout
    from llama import LLAMA_TINY

    if name == "moe":
        layout = moe_layout(
            **EXPERTS, moe_intermediate_size=64, num_attention_heads=2, num_key_value_heads=1
        )
    else:
        layout = {"llama": llama_layout, "titan": titan_layout}[name](LLAMA_TINY)
    has_moments = name == "titan"
    work = benchmark.Work(layout, has_moments, directory / "stock", directory / "hf")
    benchmark.measured(benchmark.save_stock, work, directory)
    benchmark.measured(benchmark.EXPORTS["dcp-hf export, 1 worker"], work, work.hf)
    contenders = benchmark.EXPORTS | (benchmark.OF_MODEL if name == "llama" else {})
    found = benchmark.take_turns(contenders, work, directory, 1)
    return [benchmark.row(one, samples, 1, is_markdown=True) for one, samples in found.items()]


@pytest.mark.parametrize("name", ["llama", "titan", "moe"])
def test_exports_give_the_same_tensors(name: str, tmp_path: Path) -> None:
    lines = in_fresh_process(convert, name, tmp_path, timeout_s=100)
    assert [line.split(" | ")[0] for line in lines][:4] == [
        "| dcp-hf export, 1 worker",
        "| dcp-hf export, 2 workers",
        "| dcp.load, then save_file",
        "| dcp_to_torch_save, torch.load, save_file",
    ]
    assert all(line.count("|") == 7 for line in lines)


def model_of(name: str, directory: Path) -> None:
    """Load an export with transformers, and compare it with what the trainer saved."""
    sys.path.insert(0, str(BENCHMARKS))
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM

    import convert as benchmark
    from convert_layouts import moe_layout

    sizes = {"moe_intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    layout = moe_layout(**EXPERTS, **sizes)
    work = benchmark.Work(layout, has_moments=False, stock=directory / "s", hf=directory / "hf")
    benchmark.save_stock(work, directory)
    benchmark.export_ours(work, work.hf, workers=1)
    served = AutoModelForCausalLM.from_pretrained(work.hf).state_dict()
    saved = {"model": {key: torch.empty_like(value) for key, value in served.items()}}
    dcp.load(saved, checkpoint_id=work.stock, no_dist=True)
    assert served.keys() == layout.shapes.keys()
    assert all(torch.equal(served[key], saved["model"][key]) for key in served)


def test_transformers_loads_what_was_exported(tmp_path: Path) -> None:
    in_fresh_process(model_of, "moe", tmp_path, timeout_s=100)
