# s3.py - run with: torchrun --nproc-per-node 2 s3.py s3://bucket/run [endpoint URL]
"""FSDP2 saves straight to S3 or a compatible store, and resumes from there.

Credentials come from the environment or from the files of AWS, as for every client of S3.
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, verify

root, endpoint = (*sys.argv[1:], None)[:2]
options = {"endpoint_url": endpoint} if endpoint else None
dist.init_process_group("gloo")  # on GPUs: "cpu:gloo,cuda:nccl"
group = dist.new_group(backend="gloo")  # a save's collectives must not mix with training's


def build():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=1000))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def state_of(model, optimizer):
    return dict(zip(("model", "optim"), get_state_dict(model, optimizer)))


model, optimizer = build()
export = HFExport.from_transformers(model)
saving = None
for step in range(1, 5):
    batch = torch.randint(0, 1000, (4, 32))
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 2 == 0:
        if saving:
            saving.result()  # waits, and raises what went wrong in the save before
        writer = HFDualWriter(
            f"{root}/step-{step}", export=export, storage_options=options, process_group=group
        )
        state = state_of(model, optimizer)
        saving = dcp.async_save(state, storage_writer=writer, process_group=group)
saving.result()

resumed, moments = build()  # a new run, on as many ranks as it likes
state = state_of(resumed, moments)
reader = HFDualReader(f"{root}/step-4", storage_options=options)
dcp.load(state, storage_reader=reader, process_group=group)
set_state_dict(resumed, moments, model_state_dict=state["model"], optim_state_dict=state["optim"])
pairs = zip(model.parameters(), resumed.parameters())
assert all(torch.equal(one.to_local(), other.to_local()) for one, other in pairs)
if dist.get_rank() == 0:
    verify(f"{root}/step-4", storage_options=options).raise_if_bad()
    print(f"{root}/step-4 is whole; serve {root}/step-4/hf")
dist.destroy_process_group()
