"""Each script of `examples/` runs as it stands, and leaves what its text says.

`tests/manager/test_run_survives_kill.py` runs `fsdp2.py`, and kills it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dcp_hf_writer import verify
from support.examples import EXAMPLES, run_script
from support.parallel_models import can_distribute
from support.ranks import run_ranks
from support.s3_servers import ACCESS_KEY, REGION, SECRET_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from support.s3_servers import S3Server

TESTED = {
    *("fsdp2.py", "hf_trainer.py", "peft_lora.py", "rl_weight_sync.py", "s3.py", "tp_ep.py"),
}
MAX_LINES = 80


def test_every_example_is_tested_and_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lines.keys() == TESTED
    assert max(lines.values()) < MAX_LINES


def steps_of(printed: list[str]) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+) loss", "\n".join(printed), re.MULTILINE)]


def run_in_part(name: str, directory: Path, changed: dict[str, str]) -> list[str]:
    (printed,) = run_ranks(run_script, 1, name, directory, (), {}, changed)
    return list(printed)


def test_trainer_saves_and_resumes(tmp_path: Path) -> None:
    first = run_in_part("hf_trainer.py", tmp_path, {"max_steps=20": "max_steps=10"})
    second = run_in_part("hf_trainer.py", tmp_path, {})
    for printed, steps in ((first, (5, 10)), (second, (15, 20))):
        assert [line.partition(" in ")[0] for line in printed] == [
            *(f"saved {tmp_path}/out/step-{step}" for step in steps),
            f"resume from out/step-{steps[-1]}, serve out/hf-latest",
        ]
    names = {path.name for path in (tmp_path / "out").glob("step-*")}
    assert names == {"step-15", "step-20"}
    assert verify(tmp_path / "out" / "step-20").ok
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf-latest")


def test_lora_resumes_and_leaves_adapter_and_merged_model(tmp_path: Path) -> None:
    first = run_in_part("peft_lora.py", tmp_path, {"start + 1, 21": "start + 1, 11"})
    assert steps_of(first) == list(range(1, 11))
    second = run_in_part("peft_lora.py", tmp_path, {})
    assert steps_of(second) == list(range(11, 21))
    adapter = load_file(tmp_path / "lora" / "hf-latest" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "hf")
    assert merged.config.hidden_size == 64


@pytest.mark.skipif(not can_distribute(), reason="needs transformers 5.21 on CPUs")
@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_model_with_experts_resumes_and_is_served(kind: str, tmp_path: Path) -> None:
    printed = run_ranks(run_script, 2, "tp_ep.py", tmp_path, (kind,))
    losses = [re.findall(r"\d+\.\d+", line) for (line,) in printed]
    assert losses[0] == losses[1]
    before, after = map(float, losses[0])
    assert after < before
    assert verify(tmp_path / f"ckpt-{kind}").ok
    served = AutoModelForCausalLM.from_pretrained(tmp_path / f"ckpt-{kind}" / "hf")
    torch.manual_seed(0)
    batch = torch.randint(0, 1000, (2, 16))
    with torch.no_grad():
        loss = served(input_ids=batch, labels=batch).loss
    assert loss.item() == pytest.approx(after, abs=2e-3)


def test_saves_to_s3_are_whole_and_resume(moto: S3Server, tmp_path: Path) -> None:
    bucket = moto.new_bucket()
    environment = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
    }
    root = f"{bucket.url}/run"
    arguments = (root, bucket.endpoint)
    printed, other = run_ranks(run_script, 2, "s3.py", tmp_path, arguments, environment)
    assert printed == [f"{root}/step-4 is whole; serve {root}/step-4/hf"]
    assert other == []
    keys = bucket.keys()
    assert {"run/step-2/dcp-hf.json", "run/step-4/dcp-hf.json", "run/step-4/.metadata"} <= {*keys}
    assert bucket.open_uploads() == []


def test_engine_gets_the_weights_and_the_policy_learns(tmp_path: Path) -> None:
    for printed in run_ranks(run_script, 2, "rl_weight_sync.py", tmp_path):
        rewards = [float(found) for found in re.findall(r"reward (\S+)", "\n".join(printed))]
        assert len(rewards) == 8
        assert rewards[-1] > rewards[0] + 0.1
        assert printed[-1].endswith(": 21 tensors in each sync")
