"""How much our part adds to torch's global planning, on simulated ranks.

    python benchmarks/planning.py --ranks 16,64,256 --tensors 2000

Plans what DCP's default planner hands to a storage writer on the coordinator: every tensor of a
model sharded over all ranks on dim 0. Single-threaded Python on both sides, in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcp_hf_writer import HFExport
from dcp_hf_writer._plan_data import LocalFacts, plan_globally, rank_plans
from machine import describe_machine

WIDTH = 64
TENSORS_A_LAYER = 9


def local_plans(ranks: int, tensors: int) -> list[SavePlan]:
    """Return the plans that the ranks of a sharded model send to the coordinator."""
    names = [f"layers.{t // TENSORS_A_LAYER}.w{t % TENSORS_A_LAYER}" for t in range(tensors)]
    paths = {f"model.{name}": ("model", name) for name in names}
    properties = TensorProperties(dtype=torch.bfloat16)
    size, chunk = torch.Size([4 * ranks, WIDTH]), torch.Size([4, WIDTH])
    plans = []
    for rank in range(ranks):
        start = torch.Size([4 * rank, 0])
        items = [
            WriteItem(
                MetadataIndex(fqn, start),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(ChunkStorageMetadata(start, chunk), properties, size),
            )
            for fqn in paths
        ]
        host = f"host{rank // 8}"
        facts = LocalFacts(host, host, tuple(paths) if rank == 0 else None, ())
        plans.append(SavePlan(items, storage_data=facts, planner_data=paths))
    return plans


def measure(plans: list[SavePlan]) -> tuple[float, float]:
    """Return the seconds that torch and we need for one global plan."""
    gc.collect()
    began = time.perf_counter()
    deduplicated, _ = DefaultSavePlanner().create_global_plan(plans)
    between = time.perf_counter()
    plan = plan_globally(deduplicated, HFExport(), options="", file_of_key=None)
    rank_plans(plan, [dataclasses.replace(one, storage_data=None) for one in deduplicated])
    return between - began, time.perf_counter() - between


def main() -> None:
    """Print seconds, ratio and time an item for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="16,64,256", help="simulated ranks [16,64,256]")
    parser.add_argument("--tensors", type=int, default=2000, help="tensors of the model [2000]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, medians are shown [3]")
    options = parser.parse_args()
    print(describe_machine("."))
    print(f"{options.tensors} tensors over all ranks; medians of {options.rounds} rounds\n")
    print("  ranks      items   torch s    ours s   ratio  ours us/item")
    for ranks in map(int, options.ranks.split(",")):
        plans = local_plans(ranks, options.tensors)
        samples = [measure(plans) for _ in range(options.rounds)]
        torch_s = statistics.median(sample[0] for sample in samples)
        ours_s = statistics.median(sample[1] for sample in samples)
        items = ranks * options.tensors
        print(
            f"{ranks:>7} {items:>10,} {torch_s:>9.3f} {ours_s:>9.3f} {ours_s / torch_s:>6.1%}"
            f" {ours_s / items * 1e6:>13.2f}"
        )
    print("\nbar of the design: ratio <= 15 %, linear in items")


if __name__ == "__main__":
    main()
