"""Measure saves of a model of which most is frozen, with and without `reuse=`, in one run.

    python benchmarks/reuse.py --gib 1 --rounds 5 --root /dev/shm --root . --xfs

Two ranks train the last tensors of the model and save each step: in turns a step that writes
everything, and one that reuses the step before of the same way. The first two steps of each way are
not counted: the first one has nothing to reuse, and the second one warms up. Times are those of the
slowest rank, from the call of `async_save` until the files are durable. The bytes are those of both
halves that were written: neither shared between the halves nor linked or cloned from the step
before, as the manifest counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, verify
from machine import describe_machine, file_system
from performance_page import Root, make_xfs
from ranks import Rank, RanksFailedError, run_ranks
from states import Workload, build_state_dict, local_tensors, nbytes_by_key, split_into_files

if TYPE_CHECKING:
    from collections.abc import Callable

_WAYS = ("written", "reused")
_WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class Run:
    """What is saved, and how often."""

    workload: Workload
    frozen: float
    """Part of the weights that does not train."""
    files: int
    """Weight files of the export."""
    rounds: int
    """Steps that count."""


@dataclass(slots=True)
class Samples:
    """What one way took."""

    seconds: list[float] = field(default_factory=list)
    """Until the files were durable, on the slowest rank."""
    written_nbytes: list[int] = field(default_factory=list)
    """Bytes that were written."""


def main() -> int:
    """Run the benchmark; the exit status tells whether it ran, not who was fast."""
    options = _parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for place in options.root or ([] if options.xfs else ["."]):
            _measure_at(place, options)
        if options.xfs:
            return _again_on_xfs(options)
    except RanksFailedError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def _measure_at(place: str, options: argparse.Namespace) -> None:
    workload = Workload(options.gib, "bfloat16", "fsdp", optim=False)
    root = tempfile.mkdtemp(prefix="dcp-hf-bench-", dir=place)
    try:
        print(f"{describe_machine(root)}, load {os.getloadavg()[0]:.1f}")
        print(
            f"{workload.describe()}, {options.frozen:.0%} frozen, {options.files} files; "
            f"{options.ranks} ranks; medians of {options.rounds}\n"
        )
        samples: dict[str, Samples] = run_ranks(
            measure,
            Run(workload, options.frozen, options.files, options.rounds),
            root,
            world_size=options.ranks,
            timeout_s=900,
            log=os.path.join(root, "ranks.log"),
        )[0]
        print_table(file_system(root), samples)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def print_table(name: str, samples: dict[str, Samples]) -> None:
    """Print one line for each way, in Markdown."""
    print(f"| {name} | seconds | min to max | written MiB |")
    print("|---|---|---|---|")
    for way, one in samples.items():
        low, high = min(one.seconds), max(one.seconds)
        mib = statistics.median(one.written_nbytes) / (1 << 20)
        print(
            f"| {way} | {statistics.median(one.seconds):.2f} | {low:.2f} to {high:.2f} "
            f"| {mib:,.0f} |"
        )
    written, reused = (statistics.median(samples[way].seconds) for way in _WAYS)
    print(f"\nreused takes {reused / written:.2f} of the time of written\n", flush=True)


def measure(rank: Rank, run: Run, root: str) -> dict[str, Samples]:
    """Body of a rank: save steps with both ways in turns."""
    state_dict = build_state_dict(run.workload, init_device_mesh("cpu", (rank.world_size,)))
    trained = trained_tensors(state_dict["model"], run.frozen)
    max_shard_size, _ = split_into_files(nbytes_by_key(run.workload), run.files)
    export = HFExport(max_shard_size=max_shard_size)
    found = {way: Samples() for way in _WAYS}
    for step in range(run.rounds + _WARM_UP_STEPS):
        for tensor in trained:
            tensor.add_(1)
        for way in _WAYS if step % 2 else _WAYS[::-1]:
            seconds, nbytes = _save(rank, state_dict, os.path.join(root, way), step, export)
            if step >= _WARM_UP_STEPS:
                found[way].seconds.append(seconds)
                found[way].written_nbytes.append(nbytes)
    if rank.rank == 0 and not all(verify(f"{root}/{way}/{step}").ok for way in _WAYS):
        msg = "a checkpoint of the benchmark is damaged"
        raise RuntimeError(msg)
    return found


def trained_tensors(model: dict[str, Any], frozen: float) -> list[torch.Tensor]:
    """Return this rank's parts of the last tensors of a model, which training changes."""
    total = sum(tensor.nbytes for tensor in model.values())
    found: list[torch.Tensor] = []
    passed = 0
    for tensor in model.values():
        passed += tensor.nbytes
        if passed > frozen * total:
            found += local_tensors(tensor)
    return found


def _save(
    rank: Rank, state_dict: dict[str, Any], path: str, step: int, export: HFExport
) -> tuple[float, int]:
    """Save a step; returns the seconds of the slowest rank, and the bytes that were written."""
    earlier = f"{path}/{step - 1}" if path.endswith("reused") and step else None
    os.sync()
    dist.barrier()
    began = time.perf_counter()
    writer = HFDualWriter(f"{path}/{step}", export=export, reuse=earlier)
    dcp.async_save(state_dict, storage_writer=writer).result()
    seconds = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    nbytes = _written_nbytes(f"{path}/{step}")
    dist.barrier()
    if rank.rank == 0 and step:
        shutil.rmtree(f"{path}/{step - 1}")
        os.sync()
    dist.barrier()
    return float(seconds), nbytes


def _written_nbytes(path: str) -> int:
    with open(f"{path}/dcp-hf.json", "rb") as file:
        nbytes: dict[str, int] = json.load(file)["nbytes"]
    return nbytes["dcp"] + nbytes["hf"] - nbytes["shared"] - nbytes.get("reused", 0)


def _again_on_xfs(options: argparse.Namespace) -> int:
    """Run this benchmark on an XFS file system in a file, in a mount namespace of its own."""
    with tempfile.TemporaryDirectory(prefix="dcp-hf-bench-", dir=options.images) as directory:
        image, mount = os.path.join(directory, "image"), os.path.join(directory, "mount")
        os.mkdir(mount)
        problem = make_xfs(image)
        if problem is not None:
            print(f"XFS: {problem}", file=sys.stderr)
            return 1
        words = [sys.executable, __file__, "--root", mount]
        for name in ("gib", "frozen", "files", "ranks", "rounds"):
            words += [f"--{name}", str(getattr(options, name))]
        return subprocess.run(Root(mount, image).command(words), check=False).returncode


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add: Callable[..., Any] = parser.add_argument
    add("--gib", type=float, default=1.0, help="size of the weights")
    add("--frozen", type=float, default=0.9, help="part of the weights that does not train")
    add("--files", type=int, default=10, help="weight files of the export")
    add("--ranks", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--root", action="append", help="directory to save to; may be given several times")
    add("--xfs", action="store_true", help="also on XFS, in a file mounted by loop; takes root")
    add("--images", help="directory of that file; the default is that of temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
