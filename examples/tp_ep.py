# tp_ep.py - run with: torchrun --nproc-per-node 2 tp_ep.py tp    (or: ep)
"""A mixture-of-experts model with tensor or expert parallelism, saved and loaded on other ranks.

transformers fuses and stacks the experts of a layer at run time. The export has a tensor for each
expert, as the hub has them, whatever a rank holds.
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, HFLoadPlanner, HFSavePlanner

SIZES = {"tp": {"tp_size": 2}, "ep": {"ep_size": 2, "fsdp_size": 2}}
kind = (*sys.argv, "tp")[1]
dist.init_process_group("gloo")  # on GPUs: "cpu:gloo,cuda:nccl"
group = dist.new_group(backend="gloo")  # a save's collectives must not mix with training's
if dist.get_rank() == 0:  # a base model; yours comes from the hub
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=1000, **heads, **experts
    )
    Qwen3MoeForCausalLM(config).save_pretrained("base")
dist.barrier()


def load_base():
    config = DistributedConfig(**SIZES[kind])
    model = Qwen3MoeForCausalLM.from_pretrained("base", distributed_config=config)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


model, optimizer = load_base()
export = HFExport.from_transformers(model)
torch.manual_seed(0)  # both ranks see the same batch
batch = torch.randint(0, 1000, (2, 16))
loss = model(input_ids=batch, labels=batch).loss
loss.backward()
optimizer.step()
weights, moments = get_state_dict(model, optimizer)
dcp.async_save(
    {"model": weights, "optim": moments},
    storage_writer=HFDualWriter(f"ckpt-{kind}", export=export, process_group=group),
    planner=HFSavePlanner(),  # a rank may hold two blocks of a fused tensor
    process_group=group,
).result()

model, optimizer = load_base()  # a new run, here on as many ranks
weights, moments = get_state_dict(model, optimizer)
state = {"model": weights, "optim": moments}
reader = HFDualReader(f"ckpt-{kind}")
dcp.load(state, storage_reader=reader, planner=HFLoadPlanner(), process_group=group)
set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
with torch.no_grad():
    resumed = model(input_ids=batch, labels=batch).loss
print(f"rank {dist.get_rank()}: loss {loss.item():.4f}, after a step {resumed.item():.4f}")
dist.destroy_process_group()
