# fsdp2.py - run with: torchrun --nproc-per-node 2 fsdp2.py; run it again after a kill
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from dcp_hf_writer import CheckpointManager, HFExport, OnSignal, Retry
from dcp_hf_writer import EverySteps, FirstStep, LastStep

dist.init_process_group("gloo")  # on GPUs: "cpu:gloo,cuda:nccl"
torch.manual_seed(0)  # all ranks build the same model
model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=1000))
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
progress = {"tokens": 0}


def state():
    return dict(zip(("model", "optim"), get_state_dict(model, optimizer)))


manager = CheckpointManager(
    "runs/a",
    save_every=EverySteps(5) | FirstStep() | LastStep(),
    export_every=10,  # with the HuggingFace half
    snapshot_every=2,  # one more checkpoint, which the next one replaces
    export=HFExport.from_transformers(model),
    keep_last=2,
    keep_best=("loss", "min"),
    export_keep_last=1,
    trainer_state=lambda: progress,  # JSON, of rank 0
    rank_state={"scheduler": scheduler},  # each rank gets its own back
    on_failure=Retry(times=2, then="stop"),
    on_saved=lambda step, path, report: print(f"saved {step} in {report.seconds:.1f} s"),
    on_signal=OnSignal(grace_s=30),  # SIGTERM saves once more, SIGUSR1 saves and goes on
)
start = manager.restore(saved := state())
if start is None:
    torch.manual_seed(dist.get_rank())  # each rank draws other data
else:
    weights, moments = saved["model"], saved["optim"]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    progress.update(manager.restored.trainer_state)
for step in range((start or 0) + 1, 31):
    batch = torch.randint(0, 1000, (4, 32))
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    progress["tokens"] += batch.numel()
    print(f"rank {dist.get_rank()} step {step} loss {loss.item()!r}", flush=True)
    manager.step(step, state, metrics={"loss": loss.item()})
manager.close()
dist.destroy_process_group()
