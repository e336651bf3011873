"""How much our part adds to torch's global planning, on simulated ranks.

    python benchmarks/planning.py --plot docs/planning.png
    python benchmarks/planning.py --finish --fsdp 16 --layers 61

Plans what DCP's default planner hands to a storage writer on the coordinator, for two models:

- `dense`: tensors that are sharded over all ranks on dim 0, exported as they are;
- `deepseek`: DeepSeek-V3 on 64 expert-parallel ranks times FSDP, its stacks of experts exported one
  by one: 45,395 HuggingFace tensors, or 50,000 with a few layers more.

Both sides are single-threaded Python in one process; times are of the CPU, collections of garbage
included. Each plan goes through pickle, as it would from rank to rank, so that no objects are
shared that ranks could not share. `--finish` measures what follows the writes instead
(`finish_phase.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import pickle
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, default_planner

import deepseek
from dcp_hf_writer import HFExport, LoadSpec
from dcp_hf_writer.plan.global_plan import plan_globally, rank_plans
from dcp_hf_writer.preflight.rank_facts import check_facts
from dcp_hf_writer.save.hf_half import regions_by_file
from dcp_hf_writer.save.kept_plans import KeptPlans, key_of, parts_again
from dcp_hf_writer.tensors.boxes import _fault
from dcp_hf_writer.tensors.strided_copies import _copies_of
from dcp_hf_writer.torch_seam.plan_digest import digest_of_plan
from finish_phase import print_finish
from machine import describe_machine
from simulated import rank_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed.checkpoint.planner import SavePlan

WIDTH = 64
TENSORS_A_LAYER = 9
EXPERT_RANKS = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """What one global plan took."""

    model: str
    ranks: int
    items: int
    """Items of all ranks' plans, without those that torch takes for replicas."""
    hf_tensors: int
    torch_s: float
    """torch's own planning, all of it."""
    validate_s: float
    """The part of it that looks for overlapping chunks."""
    ours_s: float
    """Median of some rounds, caches empty."""
    again_s: float
    """The same of a second save, whose layout has not changed."""

    @property
    def ratio(self) -> float:
        """Our time as a part of torch's."""
        return self.ours_s / self.torch_s


def dense_plans(ranks: int, tensors: int) -> Iterator[SavePlan]:
    """Yield the plans that the ranks of a sharded model send to the coordinator."""
    names = [f"layers.{t // TENSORS_A_LAYER}.w{t % TENSORS_A_LAYER}" for t in range(tensors)]
    paths = {f"model.{name}": ("model", name) for name in names}
    size, chunk = torch.Size([4 * ranks, WIDTH]), torch.Size([4, WIDTH])
    for rank in range(ranks):
        start = torch.Size([4 * rank, 0])
        yield rank_plan(rank, paths, ((fqn, start, chunk, size) for fqn in paths))


def arrived(plans: Iterator[SavePlan]) -> list[SavePlan]:
    """Return plans as the coordinator gets them: with digests, and each with objects of its own."""
    kept, planner = KeptPlans(), DefaultSavePlanner()
    found = []
    for rank, plan in enumerate(plans):
        facts = kept.with_digest(plan.storage_data, plan, planner, rank=rank)
        sent = pickle.dumps(dataclasses.replace(plan, storage_data=facts))
        found.append(pickle.loads(sent))  # noqa: S301
    return found


def torch_plans(plans: list[SavePlan]) -> tuple[list[SavePlan], float, float]:
    """Plan as torch does; its plans, its seconds, and those that looking for overlaps took."""
    validate, validate_s = default_planner._validate_global_plan, 0.0

    def timed(*args: Any) -> Any:
        nonlocal validate_s
        began = time.process_time()
        found = validate(*args)
        validate_s = time.process_time() - began
        return found

    default_planner._validate_global_plan = timed
    try:
        gc.collect()
        began = time.process_time()
        found, _ = DefaultSavePlanner().create_global_plan(plans)
        return found, time.process_time() - began, validate_s
    finally:
        default_planner._validate_global_plan = validate


def our_plans(
    plans: list[SavePlan], export: HFExport, kept: KeptPlans
) -> tuple[list[SavePlan], float]:
    """Plan the export as the coordinator does; the ranks' plans, and the seconds."""
    bare = [dataclasses.replace(plan, storage_data=None) for plan in plans]
    planner = DefaultSavePlanner()
    _fault.cache_clear()
    gc.collect()
    began = time.process_time()
    check_facts(plans)
    key = key_of(plans, planner, "")
    known = kept.find(key, plans)
    if known is None:
        known = plan_globally(plans, export, options="", file_of_key=None)
        kept.keep(key, known)
        found = rank_plans(known, bare)
    else:
        found = parts_again(known, bare)
    return found, time.process_time() - began


def with_parts(plans: list[SavePlan], parts: list[SavePlan]) -> list[SavePlan]:
    """Return what ranks send that have kept their parts of the plan."""
    kept = (parts[0].storage_data.plan_id,)
    return [
        dataclasses.replace(plan, storage_data=dataclasses.replace(plan.storage_data, kept=kept))
        for plan in plans
    ]


def measure(
    model: str, plans: list[SavePlan], export: HFExport, rounds: int
) -> tuple[Sample, list[SavePlan], list[SavePlan]]:
    """Measure one global plan: torch's once, as it may take minutes, ours in some rounds.

    Returns:
        The sample, and the plans that the ranks get in a first and in a second save.
    """
    deduplicated, torch_s, validate_s = torch_plans(plans)
    ours, later = [], []
    for _ in range(rounds):
        kept = KeptPlans()
        found, seconds = our_plans(deduplicated, export, kept)
        ours.append(seconds)
        again, seconds = our_plans(with_parts(deduplicated, found), export, kept)
        later.append(seconds)
    layout = plan_globally(deduplicated, export, options="", file_of_key=None).layout
    sample = Sample(
        model=model,
        ranks=len(plans),
        items=sum(len(plan.items) for plan in deduplicated),
        hf_tensors=0 if layout is None else sum(len(file.keys) for file in layout.files),
        torch_s=torch_s,
        validate_s=validate_s,
        ours_s=statistics.median(ours),
        again_s=statistics.median(later),
    )
    return sample, found, again


def print_row(sample: Sample) -> None:
    """Print one line of the table."""
    rest_s = sample.torch_s - sample.validate_s
    print(
        f"{sample.model:<9} {sample.ranks:>6,} {sample.items:>9,} {sample.hf_tensors:>7,}"
        f" {sample.torch_s:>8.2f} {sample.validate_s:>9.2f} {sample.ours_s:>7.2f}"
        f" {sample.ratio:>7.1%} {sample.ours_s / rest_s:>10.1%}"
        f" {sample.ours_s / sample.items * 1e6:>8.2f} {sample.again_s:>9.4f}"
        f" {sample.again_s / sample.ours_s:>7.4f}",
        flush=True,
    )


def print_rank(plan: SavePlan, again: SavePlan) -> None:
    """Print what one rank has to do with its part of the plan.

    Args:
        plan: The plan that the rank gets in the first save.
        again: The plan that it gets in a second one.
    """
    bare = dataclasses.replace(plan, storage_data=None)
    began = time.process_time()
    blocks = regions_by_file(plan.items, plan.storage_data.targets)
    seconds = time.process_time() - began
    whole, theirs = len(pickle.dumps(plan)), len(pickle.dumps(bare))
    ours_again = len(pickle.dumps(again)) - theirs
    began = time.process_time()
    digest_of_plan(bare, "host", None, ())
    digest_s = time.process_time() - began
    print(
        f"\none of these ranks: {len(plan.items):,} items, {sum(map(len, blocks.values())):,} "
        f"blocks in {len(blocks)} files, found in {seconds * 1e3:.1f} ms; its plan is "
        f"{whole / 1e3:.0f} kB pickled, {theirs / 1e3:.0f} kB of it DCP's; in the second save ours "
        f"is {ours_again} bytes; the digest of its plan takes {digest_s * 1e3:.1f} ms"
    )


def compile_dense(layers: int) -> list[LoadSpec]:
    """Compile specs of a dense model: fused projections, renames, a transpose written in pieces."""
    specs = []
    for layer in range(layers):
        name = f"model.layers.{layer}"
        qkv = [f"{name}.self_attn.{part}_proj.weight" for part in "qkv"]
        halves = [f"{name}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        specs += [
            LoadSpec(f"{name}.qkv", qkv, (6144, 4096), fused_sizes=(4096, 1024, 1024)),
            LoadSpec(f"{name}.gate_up", halves, (28_672, 4096)),
            LoadSpec(f"{name}.out", f"{name}.self_attn.o_proj.weight", (4096, 4096)),
            LoadSpec(
                f"{name}.down",
                global_shape=(14_336, 4096),
                pieces=[deepseek.transposed(f"{name}.mlp.down_proj.weight", 14_336, 4096)],
            ),
        ]
    return specs


def print_compiling(layers: int) -> None:
    """Print how long specs take to compile."""
    pieces = deepseek.expert_pieces(61)
    cases: dict[str, Callable[[], list[LoadSpec]]] = {
        f"{layers:,} dense layers": lambda: compile_dense(layers),
        "the experts of DeepSeek-V3": lambda: deepseek.compile_specs(pieces),
    }
    print("\ncompiling specs, caches empty:")
    for what, compile_all in cases.items():
        _copies_of.cache_clear()
        began = time.process_time()
        specs = compile_all()
        seconds = time.process_time() - began
        parts = sum(len(spec.parts) for spec in specs)
        print(
            f"  {what}: {len(specs):,} specs for {parts:,} HuggingFace tensors in {seconds:.2f} s"
        )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="16,64,256", help="ranks of `dense` [16,64,256]")
    parser.add_argument("--tensors", type=int, default=2000, help="tensors of `dense` [2000]")
    parser.add_argument(
        "--fsdp",
        default="1,2,4,8,16",
        help="FSDP ranks of `deepseek`, times its expert-parallel ones [1,2,4,8,16]",
    )
    parser.add_argument(
        "--expert-ranks",
        type=int,
        default=EXPERT_RANKS,
        help=f"its expert-parallel ranks [{EXPERT_RANKS}]",
    )
    parser.add_argument(
        "--layers", type=int, default=67, help="its layers; 61 in the real one [67]"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ours, medians shown [3]")
    parser.add_argument("--spec-layers", type=int, default=1000, help="layers to compile [1000]")
    parser.add_argument(
        "--finish", action="store_true", help="print only the finish phase of `deepseek` with Adam"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the figures, for instance as .png")
    return parser.parse_args()


def main() -> None:
    """Print seconds, ratio and time an item for each model and number of ranks."""
    options = _options()
    # torch warns of what its validation would refuse; the plans are right.
    logging.disable(logging.WARNING)
    machine = describe_machine(".")
    print(machine)
    if options.finish:
        for fsdp in _numbers(options.fsdp):
            print_finish(options.layers, deepseek.Mesh(options.expert_ranks, fsdp))
        return
    print_compiling(options.spec_layers)
    print(
        "\nmodel      ranks     items  HF ten.  torch s  validates  ours s   ratio  of the rest"
        "  us/item   again s   ratio"
    )
    samples = []
    for ranks in _numbers(options.ranks):
        plans = arrived(dense_plans(ranks, options.tensors))
        samples.append(measure("dense", plans, HFExport(), options.rounds)[0])
        print_row(samples[-1])
    specs = deepseek.compile_specs(deepseek.expert_pieces(options.layers))
    of_ranks: list[list[SavePlan]] = [[], []]
    for fsdp in _numbers(options.fsdp):
        mesh = deepseek.Mesh(options.expert_ranks, fsdp)
        plans = arrived(deepseek.local_plans(options.layers, mesh))
        sample, *of_ranks = measure("deepseek", plans, HFExport(specs=specs), options.rounds)
        samples.append(sample)
        print_row(sample)
    first, again = of_ranks
    if first:
        print_rank(first[len(first) // 2], again[len(first) // 2])
    print(
        "\ntorch s: create_global_plan of DefaultSavePlanner; validates: the part of it that looks"
        "\nfor overlaps, quadratic where a long dimension is not sharded; of the rest: ours against"
        "\ntorch without it. Bar of the design: ratio <= 10 %, aim 5 %, linear in items"
        "\nagain: ours in a second save of the same layout, against ours in the first; bar: 0.1"
    )
    if options.plot:
        from plot_planning import draw  # noqa: PLC0415 - matplotlib only where it is asked for

        draw(samples, machine, options.plot)


if __name__ == "__main__":
    main()
