# rl_weight_sync.py - run with: torchrun --nproc-per-node 2 rl_weight_sync.py
"""Reinforcement learning: after each step an engine gets the new weights, without a file.

Each rank trains its part of the policy, and holds a whole engine for its own rollouts. The engine
here is a transformers model; a real one takes the same names and tensors.
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from dcp_hf_writer import HFExport, iter_hf_buckets

dist.init_process_group("gloo")  # on GPUs: "cpu:gloo,cuda:nccl"
config = LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=100)
torch.manual_seed(0)
policy = LlamaForCausalLM(config)
for layer in policy.model.layers:
    fully_shard(layer)
fully_shard(policy)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
engine = LlamaForCausalLM(config).bfloat16().eval()
export = HFExport.from_transformers(policy, dtype=torch.bfloat16)  # the dtype of the engine


@torch.no_grad()
def sync():
    """Send the weights of the policy to the engine; all ranks call it."""
    parameters = dict(engine.named_parameters())
    count = 0
    for bucket in iter_hf_buckets(policy.state_dict(), export, bucket_bytes="64KB"):
        for name, tensor in bucket:  # a real engine: engine.update_weights(bucket)
            parameters[name].copy_(tensor)
            count += 1
    return count


def reward(tokens):
    return (tokens % 2 == 0).float().mean(dim=1)  # the policy learns to say even numbers


count = sync()
torch.manual_seed(dist.get_rank())  # each rank rolls out its own samples
for step in range(1, 9):
    prompts = torch.randint(0, 100, (32, 2))
    samples = engine.generate(prompts, max_new_tokens=6, do_sample=True, pad_token_id=0)
    rewards = reward(samples[:, 2:])
    logits = policy(input_ids=samples[:, :-1]).logits[:, 1:]
    chosen = torch.log_softmax(logits, -1).gather(-1, samples[:, 2:, None]).squeeze(-1)
    loss = -((rewards - rewards.mean())[:, None] * chosen).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    sync()
    print(f"rank {dist.get_rank()} step {step} reward {rewards.mean().item():.3f}", flush=True)
print(f"rank {dist.get_rank()}: {count} tensors in each sync")
dist.destroy_process_group()
