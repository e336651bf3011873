"""Measure a load from either half beside torch's own readers, all in one run.

    python benchmarks/load.py --gib 1 --rounds 7 --json load.json

Two ranks save one checkpoint. Two and four ranks load it in turns, cut as it was saved and cut
along the other dimension, from a warm page cache and from the disk: each round runs every reader
once, in an order that rotates. The first round warms up and is not counted; in it the readers'
results are compared. Times are those of the slowest rank, for `dcp.load` as a whole.

The two of a pair do the same work: the DCP half into the state dict, or the HuggingFace half into
the model's entry of it. `load_hf` does the latter without `dcp.load`.

What no reader can go below is measured in the same rounds: a `dcp.load` whose reader does nothing,
and then each rank's share of the bytes of the HuggingFace half by plain system calls, into memory
that is there. torch plans before it reads, so the two add up.
"""

from __future__ import annotations

import argparse
import functools
import gc
import glob
import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.futures import Future

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, load_hf
from machine import describe_machine, held, peak_rss_nbytes, reset_peak
from ranks import Rank, RanksFailedError, run_ranks
from states import GIB, Workload, build_state_dict, local_tensors, split_into_files
from states import nbytes_by_key as nbytes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import LoadPlan

SAVING_RANKS = 2
_FILES = 4
_DCP_BAR = 0.7
_HF_BARS = {"warm": 0.9, "cold": 1.0}
"""What the design asks of us, relative to each of torch's readers at the same work."""

_FLOOR = "floor"
_PIECE_NBYTES = 8 << 20
"""What the floor reads by one system call."""

_WAYS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "torch dcp": lambda state, path: dcp.load(state, storage_reader=FileSystemReader(path)),
    "ours dcp": lambda state, path: dcp.load(state, storage_reader=HFDualReader(path)),
    "torch hf": lambda state, path: dcp.load(
        dict(state["model"]), storage_reader=HuggingFaceStorageReader(os.path.join(path, "hf"))
    ),
    "ours hf": lambda state, path: dcp.load(
        dict(state["model"]), storage_reader=HFDualReader(path, source="hf")
    ),
    "load_hf": load_hf,
}
"""What fills a state dict from a checkpoint."""

_PAIRS = {
    "dcp": ("torch dcp", "ours dcp"),
    "hf": ("torch hf", "ours hf"),
    "load_hf": ("torch hf", "load_hf"),
}


class IdleReader(HFDualReader):
    """Lets torch plan, and reads nothing."""

    def __init__(self, path: str) -> None:
        """Know beforehand what is there."""
        super().__init__(path, source="hf")
        self._known = super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return what is there."""
        return self._known

    def set_up_storage_reader(self, *_: Any, **__: Any) -> None:
        """Check nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan with the rank."""
        return replace(plan, items=[])

    def read_data(self, *_: Any) -> Future[None]:
        """Read nothing."""
        future: Future[None] = Future()
        future.set_result(None)
        return future


@dataclass(frozen=True, slots=True)
class Case:
    """What is loaded by how many ranks."""

    ranks: int
    sharding: str
    """`same` as it was saved, or `other`: along the other dimension."""
    cache: str
    """`warm`, or `cold`: the page cache is emptied before each load."""

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.sharding} sharding, {self.cache}"


@dataclass(slots=True)
class Samples:
    """What one reader took in one case."""

    seconds: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    """Processor time of all ranks together."""
    peak_nbytes: int = 0
    """Memory of a rank above what it held before, the highest of all ranks and rounds."""

    @property
    def work(self) -> float:
        """Median processor time."""
        return statistics.median(self.processor_s)

    @property
    def median(self) -> float:
        """Median time."""
        return statistics.median(self.seconds)


def main() -> int:
    """Run the benchmark; the exit status tells whether it ran, not who was fast."""
    options = _parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    workload = Workload(options.gib, options.dtype, "fsdp", options.optim)
    root = tempfile.mkdtemp(prefix="dcp-hf-bench-", dir=options.root)
    try:
        print(f"{describe_machine(root)}, load {os.getloadavg()[0]:.1f}")
        print(
            f"{workload.describe()}; saved by {SAVING_RANKS} ranks; medians of {options.rounds}\n"
        )
        log = os.path.join(root, "ranks.log")
        path = os.path.join(root, "checkpoint")
        run_ranks(save, workload, path, world_size=SAVING_RANKS, timeout_s=600, log=log)
        results: dict[str, dict[str, Samples]] = {}
        for count, sharding in itertools.product(options.ranks, options.sharding):
            cases = [Case(count, sharding, cache) for cache in options.cache]
            found = run_ranks(
                measure,
                workload,
                path,
                cases,
                options.rounds,
                world_size=count,
                timeout_s=600 * max(1.0, options.gib),
                log=log,
            )
            for case, samples in found[0].items():
                results[case] = samples
                _print_case(case, samples)
        if options.json:
            _write(options.json, workload, root, results)
    except RanksFailedError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return 0


def save(rank: Rank, workload: Workload, path: str) -> None:
    """Body of a rank: save the checkpoint that all readers load."""
    state_dict = build_state_dict(workload, init_device_mesh("cpu", (rank.world_size,)))
    max_shard_size, _ = split_into_files(nbytes_of(workload), _FILES)
    export = HFExport(max_shard_size=max_shard_size)
    dcp.save(state_dict, storage_writer=HFDualWriter(path, export=export))


def measure(
    rank: Rank, workload: Workload, path: str, cases: list[Case], rounds: int
) -> dict[str, dict[str, Samples]]:
    """Body of a rank: load with all readers in turns."""
    logging.disable(logging.WARNING)
    layout = "tp" if cases[0].sharding == "other" else "fsdp"
    mesh = init_device_mesh("cpu", (rank.world_size,))
    target = build_state_dict(replace(workload, layout=layout), mesh)
    digests: dict[str, str] = {}
    idle = IdleReader(path)
    shares = _shares(path, rank)
    ways = {
        **_WAYS,
        _FLOOR: lambda state, _: _plan_and_read(dict(state["model"]), idle, shares),
    }
    names = list(ways)
    found = {str(case): {name: Samples() for name in names} for case in cases}
    for number in range(rounds + 1):
        turn = number % len(names)
        for case, name in itertools.product(cases, names[turn:] + names[:turn]):
            run = functools.partial(ways[name], target, path)
            is_cold = case.cache == "cold"
            seconds, processor_s, peak = _timed(run, target, path, is_cold=is_cold, rank=rank)
            if number == 0 and name != _FLOOR:
                digests[name] = _digest(target)
            if number == 0:
                continue
            samples = found[str(case)][name]
            samples.seconds.append(seconds)
            samples.processor_s.append(processor_s)
            samples.peak_nbytes = max(samples.peak_nbytes, peak)
    for theirs, ours in _PAIRS.values():
        assert digests[ours] == digests[theirs], f"{ours} differs from {theirs}"
    return found


def _timed(
    run: Callable[[], None], target: dict[str, Any], path: str, *, is_cold: bool, rank: Rank
) -> tuple[float, float, int]:
    """Load once; returns time of the slowest rank, processor time of all, most memory of one."""
    for tensor in local_tensors(target):
        tensor.fill_(0.5)
    gc.collect()
    dist.barrier()
    if is_cold and rank.rank == 0:
        _drop_caches(path)
    before = held().rss_nbytes if reset_peak() else 0
    dist.barrier()
    began, worked = time.perf_counter(), time.process_time()
    run()
    seconds, processor_s = time.perf_counter() - began, time.process_time() - worked
    peak = peak_rss_nbytes() - before if before else 0
    most = torch.tensor([seconds, float(peak)], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    total = torch.tensor(processor_s, dtype=torch.float64)
    dist.all_reduce(total)
    return float(most[0]), float(total), int(most[1])


def _shares(path: str, rank: Rank) -> list[tuple[str, int, torch.Tensor]]:
    """Return what a rank reads of each file of the HuggingFace half: name, start, memory."""
    found = []
    for name in sorted(glob.glob(os.path.join(path, "hf", "*.safetensors"))):
        nbytes = os.path.getsize(name)
        first = nbytes * rank.rank // rank.world_size
        stop = nbytes * (rank.rank + 1) // rank.world_size
        found.append((name, first, torch.ones(stop - first, dtype=torch.uint8)))
    return found


def _plan_and_read(
    state_dict: dict[str, Any], idle: IdleReader, shares: list[tuple[str, int, torch.Tensor]]
) -> None:
    dcp.load(state_dict, storage_reader=idle)
    for name, start, memory in shares:
        fd = os.open(name, os.O_RDONLY)
        view, done = memory.numpy().data, 0
        while done < view.nbytes:
            done += os.preadv(fd, [view[done : done + _PIECE_NBYTES]], start + done)
        os.close(fd)
    dist.barrier()


def _drop_caches(path: str) -> None:
    for directory, _, names in os.walk(path):
        for name in names:
            fd = os.open(os.path.join(directory, name), os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _digest(target: dict[str, Any]) -> str:
    digest = hashlib.blake2b()
    for tensor in local_tensors(target["model"]):
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _print_case(case: str, samples: dict[str, Samples]) -> None:
    print(case)
    for label, (one, other) in _PAIRS.items():
        theirs, ours = samples[one], samples[other]
        ratio = ours.median / theirs.median
        bar = _DCP_BAR if label == "dcp" else _HF_BARS[case.rpartition(", ")[2]]
        mark = "✓" if ratio <= bar else "✗"
        times = f"torch {theirs.median:6.3f} s  ours {ours.median:6.3f} s  {mark} {ratio:.2f}x"
        work = f"processor {theirs.work:5.2f} / {ours.work:5.2f} s"
        memory = f"memory {theirs.peak_nbytes >> 20:4d} / {ours.peak_nbytes >> 20:4d} MiB"
        print(f"  {label:7} {times} (bar {bar}x)   {work}   {memory}")
    floor, theirs = samples[_FLOOR], samples["torch hf"]
    print(f"  floor of a reader {floor.median:6.3f} s, {floor.median / theirs.median:.2f}x")


def _write(file: str, workload: Workload, root: str, results: dict[str, Any]) -> None:
    facts = {
        "machine": describe_machine(root),
        "workload": asdict(workload),
        "cases": {
            case: {name: asdict(samples) for name, samples in of_case.items()}
            for case, of_case in results.items()
        },
    }
    with open(file, "w", encoding="utf-8") as out:
        json.dump(facts, out, indent=1)
        out.write("\n")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--gib",
        type=float,
        default=1.0,
        help="size of the weights, all ranks together [%(default)s]",
    )
    add("--optim", action="store_true", help="Adam's two fp32 moments too, in the DCP half")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    add("--root", help="directory to work in, a tmpfs for instance [a temporary one]")
    add("--rounds", type=int, default=7, help="rounds that count [%(default)s]")
    add("--ranks", default="2,4", help="numbers of ranks that load [%(default)s]")
    add("--sharding", default="same,other", help="how what is loaded is cut [%(default)s]")
    add("--cache", default="warm,cold", help="states of the page cache [%(default)s]")
    add("--json", metavar="FILE", help="write all samples")
    options = parser.parse_args()
    options.ranks = [int(count) for count in options.ranks.split(",")]
    options.sharding, options.cache = options.sharding.split(","), options.cache.split(",")
    if {*options.sharding} - {"same", "other"} or {*options.cache} - {"warm", "cold"}:
        parser.error("--sharding takes same,other and --cache warm,cold")
    if options.gib <= 0 or options.rounds < 1 or min(options.ranks) < 1:
        parser.error("--gib, --rounds and --ranks must be positive")
    if shutil.disk_usage(options.root or tempfile.gettempdir()).free < 8 * options.gib * GIB:
        parser.error(f"this run needs about {8 * options.gib:.0f} GiB of free space; pass --root")
    return options


if __name__ == "__main__":
    sys.exit(main())
