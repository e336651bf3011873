"""Checkpoints for the tests of `dcp-hf`: a run, and a transformers model in several forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import CheckpointManager, HFDualWriter, HFExport
from support.small_states import state_of

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "intermediate_size": 48}


def make_run(root: Path) -> None:
    """Save steps 1 to 3 of a run, a stock step 4, and the remains of a step 5."""
    manager = CheckpointManager(root, save_every=1, export_every=2, export=HFExport())
    for step in (1, 2, 3):
        manager.step(step, state_of(step), metrics={"loss": 1 / step})
        manager.wait()
    manager.pin(2)
    manager.close()
    dcp.save(state_of(4), checkpoint_id=root / "step-4")
    (root / "step-5").mkdir()
    (root / "step-5" / "__0_0.distcp").write_bytes(bytes(1000))


def make_models(root: Path) -> None:
    """Save models as a live export does, and by stock DCP: dense and tied, and with experts."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **heads, tie_word_embeddings=True))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, **heads, **experts))
    for name, model in (("llama", llama), ("mixtral", mixtral)):
        state = {"model": model.state_dict(), "optim": {"m": torch.ones(3)}, "step": 7}
        export = HFExport.from_transformers(model, max_shard_size="20KB", dtype=torch.bfloat16)
        dcp.save(state, storage_writer=HFDualWriter(root / name / "live", export=export))
        dcp.save(state, checkpoint_id=root / name / "stock")
