"""Measure a save of both formats beside torch's own writers, all in one run.

    python benchmarks/save.py --gib 1 --rounds 7 --json save.json --plot save.png

The ranks on this host save the same state dict in turns: each round runs every contender once, in
an order that rotates, so that what else the machine does falls on all of them alike. The first
round warms up and is not counted. Memory is measured apart, each contender in fresh processes,
since allocators keep what another one left behind.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from contents import count_bytes
from machine import describe_machine, file_system, held, peak_rss_nbytes, reset_peak
from peers import CONTENDERS, Saved
from ranks import Rank, RanksFailedError, run_ranks
from report import Memory, Result, as_json, judge, render_bars, render_phases, render_table
from states import GIB, Workload, build_state_dict

_SAVE_DEADLINE_S = 120.0
"""More than the slowest contender ever took for a save of 5 GiB; scales with the size below."""


def main() -> int:
    """Run the benchmark; the exit status tells whether it ran, not who was fast."""
    options = _parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    workload = Workload(options.gib, options.dtype, options.layout, options.optim)
    root = tempfile.mkdtemp(prefix="dcp-hf-bench-", dir=options.root)
    try:
        problem = _lacking(workload, root)
        if problem:
            print(problem, file=sys.stderr)
            return 2
        return _run(options, workload, root)
    except RanksFailedError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _run(options: argparse.Namespace, workload: Workload, root: str) -> int:
    machine = describe_machine(root)
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    print(f"{workload.describe()}; {options.ranks} ranks, {options.rounds} rounds, medians\n")
    results = [Result(n, CONTENDERS[n].title, CONTENDERS[n].formats) for n in options.only]
    by_name = {r.name: r for r in results}
    deadline = 60 + _SAVE_DEADLINE_S * max(1.0, workload.gib)
    status = _Status(len(options.only) * (options.rounds + 1 + min(options.soak, 1)))

    def take_time(_: int, facts: dict[str, Any]) -> None:
        status.show(f"round {facts['round']} of {options.rounds}: {facts['name']}")
        result = by_name[facts["name"]]
        result.written = facts["written"]
        if facts["round"] > 0:
            result.stall_s.append(facts["saved"].stall_s)
            result.total_s.append(facts["saved"].total_s)
            result.phases.append(facts["saved"].phases)

    run_ranks(
        measure_times,
        workload,
        root,
        options.only,
        options.rounds,
        world_size=options.ranks,
        timeout_s=deadline * (options.rounds + 1),
        on_event=take_time,
        log=os.path.join(root, "ranks.log"),
    )
    for result in results if options.soak else []:
        status.show(f"memory: {result.name}")
        per_rank = run_ranks(
            measure_memory,
            workload,
            root,
            result.name,
            options.soak,
            world_size=options.ranks,
            timeout_s=deadline * options.soak,
            log=os.path.join(root, "ranks.log"),
        )
        result.memory = max(per_rank, key=lambda memory: memory.peak - memory.base)
    status.clear()
    _publish(options, workload, machine, root, results)
    return 0


def _publish(
    options: argparse.Namespace,
    workload: Workload,
    machine: str,
    root: str,
    results: list[Result],
) -> None:
    bars = judge(results, workload, ranks=options.ranks, fs_type=file_system(root))
    print(render_table(results))
    if options.soak and not any(r.memory and r.memory.peak for r in results):
        print("  (no peak memory: this system does not let a process reset its VmHWM)")
    phases = render_phases(results)
    print(f"\nPhases of the slowest rank\n{phases}" if phases else "")
    if bars:
        print(f"\nBars of the design\n{render_bars(bars)}")
    if options.json:
        facts = as_json(machine, workload, file_system(root), results, bars)
        facts |= {"ranks": options.ranks, "load": os.getloadavg()[0]}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)
            file.write("\n")
    if options.plot:
        from plot import draw  # noqa: PLC0415

        where = f"{file_system(root)}, {options.ranks} ranks"
        draw(results, f"{workload.describe()}; {where}", machine, options.plot)


def measure_times(rank: Rank, workload: Workload, root: str, names: list[str], rounds: int) -> None:
    """Body of a rank: all contenders in turns; rank 0 reports each save."""
    state_dict = build_state_dict(workload, init_device_mesh("cpu", (rank.world_size,)))
    contenders = {name: CONTENDERS[name](workload, state_dict) for name in names}
    for round_number in range(rounds + 1):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            directory = os.path.join(root, f"{name}-step-{round_number}")
            gc.collect()
            dist.barrier()
            saved = slowest(contenders[name].save(state_dict, directory))
            if round_number == 0:
                contenders[name].check(state_dict, directory)
            if rank.rank == 0:
                rank.emit(
                    name=name, round=round_number, saved=saved, written=count_bytes(directory)
                )
            remove(directory, rank)


def measure_memory(rank: Rank, workload: Workload, root: str, name: str, saves: int) -> Memory:
    """Body of a rank: one contender alone, several saves."""
    state_dict = build_state_dict(workload, init_device_mesh("cpu", (rank.world_size,)))
    gc.collect()
    can_reset = reset_peak()
    base = held().rss_nbytes
    contender = CONTENDERS[name](workload, state_dict)
    after = []
    for number in range(saves):
        directory = os.path.join(root, f"{name}-memory-step-{number}")
        dist.barrier()
        contender.save(state_dict, directory)
        gc.collect()
        after.append(held())
        remove(directory, rank)
    return Memory(
        base=base,
        peak=peak_rss_nbytes() if can_reset else 0,
        after=[h.rss_nbytes for h in after],
        fds=[h.fds for h in after],
        threads=[h.threads for h in after],
    )


def slowest(saved: Saved) -> Saved:
    """Return the longest stall and total of any rank; all ranks call it together."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, saved)
    stall, total = (max(getattr(s, a) for s in of_ranks) for a in ("stall_s", "total_s"))
    return Saved(stall, total, of_ranks[0].phases)


def remove(directory: str, rank: Rank) -> None:
    """Remove what the ranks wrote, when all are done; all ranks call it together."""
    dist.barrier()
    if rank.rank == 0:
        shutil.rmtree(directory)
        os.sync()
    dist.barrier()


def _lacking(workload: Workload, root: str) -> str | None:
    """Say what this machine has too little of, before it shows by being killed."""
    state = workload.weights_nbytes + workload.optim_nbytes
    disk = state + 3 * workload.weights_nbytes
    if shutil.disk_usage(root).free < disk:
        return f"{root}: this run needs {disk / GIB:.1f} GiB of free space; pass --root or --gib"
    # The state dict, a snapshot, a kept cache, a fresh staging and its clones.
    memory = 5 * state + (disk if file_system(root) in ("tmpfs", "ramfs") else 0)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total < memory:
        return f"this run needs about {memory / GIB:.1f} GiB of memory; pass a smaller --gib"
    return None


class _Status:
    """One line that is overwritten on a terminal; elsewhere one line now and then."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done, self._last = steps, 0, -10.0
        self._is_terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        self._done += 1
        if self._is_terminal:
            print(f"\r\033[K[{self._done}/{self._steps}] {text}", end="", flush=True)
        elif time.monotonic() - self._last > 10:
            print(f"[{self._done}/{self._steps}] {text}", flush=True)
            self._last = time.monotonic()

    def clear(self) -> None:
        print("\r\033[K" if self._is_terminal else "", end="\n")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--gib",
        type=float,
        default=1.0,
        help="size of the weights, all ranks together [%(default)s]",
    )
    add("--layout", choices=("fsdp", "tp"), default="fsdp", help="tp: half of the weights on dim 1")
    add("--optim", action="store_true", help="save Adam's two fp32 moments too")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    add("--root", help="directory to write into, a tmpfs for instance [a temporary one]")
    add("--ranks", type=int, default=2, help="processes, which share the cores [%(default)s]")
    add("--rounds", type=int, default=7, help="rounds that count [%(default)s]")
    add("--soak", type=int, default=4, help="saves in the memory pass, 0 for none [%(default)s]")
    add("--only", default=",".join(CONTENDERS), help="contenders, of [%(default)s]")
    add("--json", metavar="FILE", help="write all samples")
    add("--plot", metavar="FILE", help="write a picture")
    options = parser.parse_args()
    options.only = options.only.split(",")
    unknown = [name for name in options.only if name not in CONTENDERS]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(CONTENDERS)}")
    if options.gib <= 0 or min(options.rounds, options.ranks) < 1 or options.soak < 0:
        parser.error("--gib, --ranks and --rounds must be positive, --soak not negative")
    return options


if __name__ == "__main__":
    sys.exit(main())
