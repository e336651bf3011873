# peft_lora.py - run with: python peft_lora.py; run it again after a kill
"""A LoRA fine-tune: small checkpoints of the adapter, then the merged model to serve."""

import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dcp_hf_writer import CheckpointManager, HFDualWriter
from dcp_hf_writer.integrations.peft import adapter_export, adapter_state, set_adapter_state
from dcp_hf_writer.integrations.peft import merged_export, merged_weights

torch.manual_seed(0)  # the base model is the same in each run; yours comes from the hub
base = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=1000))
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

state = adapter_state(model, optimizer)
manager = CheckpointManager(
    "lora", save_every=5, keep_last=2, export=adapter_export(model, state["model"])
)
start = manager.restore(state) or 0
if start:
    set_adapter_state(model, optimizer, state)
for step in range(start + 1, 21):
    batch = torch.randint(0, 1000, (4, 32))
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.3f}")
    manager.step(step, lambda: adapter_state(model, optimizer))
manager.close()

# The whole model with the adapter merged in. The model in training does not change.
writer = HFDualWriter("merged", export=merged_export(model), weights="once", overwrite=True)
dcp.save({"model": merged_weights(model)}, storage_writer=writer)
print("adapter in lora/hf-latest, merged model in merged/hf")
