"""How the time of a save grows with bytes, with tensors, and with ranks, each on its own.

    python benchmarks/scaling.py --root /dev/shm --plot docs/scaling.png

One curve for each: all other sizes stay the same along it. The points of a curve take turns, once
a round, and the first round does not count. The script fits a straight line to the medians, by the
least squares of the relative errors, and prints its constant and its slope. Ranks share the cores
of this host: with more ranks than cores, the curve shows the work of all of them together.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dcp_hf_writer import HFDualWriter, HFExport
from machine import describe_machine
from ranks import Rank, run_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1 << 20
TIMEOUT_S = 400
WAYS = {"ours": "HFDualWriter, DCP + HuggingFace", "torch": "torch by path alone, DCP"}


@dataclass(frozen=True, slots=True)
class Point:
    """What is saved at one point of a curve."""

    ranks: int
    tensors: int
    mib: int
    """Size of all tensors together, over all ranks."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Points that differ in one size."""

    title: str
    unit: str
    per: int
    """The slope is the time for so many units more."""
    points: tuple[Point, ...]

    def sizes(self) -> list[float]:
        """Return the size that differs, of each point."""
        of = {"MiB": "mib", "tensors": "tensors", "ranks": "ranks"}[self.unit]
        return [float(getattr(point, of)) for point in self.points]


CURVES = {
    "bytes": Curve(
        "bytes (2 ranks, 200 tensors)",
        "MiB",
        1024,
        tuple(Point(2, 200, mib) for mib in (16, 64, 256, 512, 1024)),
    ),
    "tensors": Curve(
        "tensors (2 ranks, 64 MiB)",
        "tensors",
        1000,
        tuple(Point(2, tensors, 64) for tensors in (10, 500, 2000, 5000)),
    ),
    "ranks": Curve(
        "ranks (200 tensors, 64 MiB)",
        "ranks",
        1,
        tuple(Point(ranks, 200, 64) for ranks in (1, 2, 4, 8)),
    ),
}


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line through the points of a curve."""

    constant_s: float
    slope_s: float
    """Seconds for one unit more."""

    def at(self, size: float) -> float:
        """Return the seconds that the line gives."""
        return self.constant_s + self.slope_s * size


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """Fit a line by the least squares of its relative errors, so that small points count too."""
    weights = [1 / value**2 for value in seconds]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, sizes, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, seconds, strict=True)) / total
    triples = list(zip(weights, sizes, seconds, strict=True))
    spread = sum(w * (x - mean_x) ** 2 for w, x, _ in triples)
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in triples) / spread
    return Line(mean_y - slope * mean_x, slope)


def run_points(rank: Rank, points: Sequence[Point], rounds: int, root: str) -> None:
    """Body of a rank: every point and way in turns; rank 0 emits the slowest rank's seconds."""
    mesh = init_device_mesh("cpu", (rank.world_size,))
    states = {point: state_of(point, mesh) for point in points}
    cases = [(way, point) for point in points for way in WAYS]
    for number in range(rounds + 1):
        turn = number % len(cases)
        for way, point in [*cases[turn:], *cases[:turn]]:
            path = os.path.join(root, f"{way}-{number}-{point.tensors}-{point.mib}")
            dist.barrier()
            took = save(way, states[point], path, point)
            of_ranks: list[Any] = [None] * rank.world_size
            dist.all_gather_object(of_ranks, took)
            if rank.rank == 0:
                shutil.rmtree(path)
                if number:
                    stall, total = (max(values) for values in zip(*of_ranks, strict=True))
                    rank.emit(way=way, point=point, stall_s=stall, total_s=total)


def state_of(point: Point, mesh: Any) -> dict[str, Any]:
    """Return tensors of equal size that are sharded on their first dimension."""
    columns = 64
    rows = max(1, point.mib * MIB // (point.tensors * columns * 2 * point.ranks))
    return {
        f"layers.{number}.weight": DTensor.from_local(
            torch.full((rows, columns), number % 97, dtype=torch.bfloat16),
            mesh,
            [Shard(0)],
            run_check=False,
        )
        for number in range(point.tensors)
    }


@functools.cache
def export_of(point: Point) -> HFExport:
    """Return the export of a point: files of at most a quarter of its bytes, as models have."""
    return HFExport(max_shard_size=max(MIB, point.mib * MIB // 4), assets={"config.json": b"{}"})


def save(way: str, state: dict[str, Any], path: str, point: Point) -> tuple[float, float]:
    """Save once; return how long the call took, and how long until the checkpoint was durable."""
    start = time.perf_counter()
    future: Any = (
        dcp.async_save(state, storage_writer=HFDualWriter(path, export=export_of(point)))
        if way == "ours"
        else dcp.async_save(state, checkpoint_id=path)
    )
    stall = time.perf_counter() - start
    future.result()
    return stall, time.perf_counter() - start


Samples = dict[Point, dict[str, list[float]]]


def measure(curves: Sequence[Curve], rounds: int, root: str) -> Samples:
    """Measure each point once, also if it lies on several curves; seconds until durable."""
    points = list(dict.fromkeys(point for curve in curves for point in curve.points))
    found: Samples = {point: {way: [] for way in WAYS} for point in points}

    def take(_: int, facts: dict[str, Any]) -> None:
        found[facts["point"]][facts["way"]].append(facts["total_s"])

    for ranks in sorted({point.ranks for point in points}):
        of_ranks = [point for point in points if point.ranks == ranks]
        print(f"{ranks} ranks: {len(of_ranks)} points", file=sys.stderr)
        run_ranks(
            run_points,
            of_ranks,
            rounds,
            root,
            world_size=ranks,
            timeout_s=TIMEOUT_S,
            on_event=take,
        )
    return found


def medians(curve: Curve, found: Samples, way: str) -> list[float]:
    """Return the median seconds of each point."""
    return [statistics.median(found[point][way]) for point in curve.points]


def rows(curves: Sequence[Curve], found: Samples) -> list[list[str]]:
    """Return a line for each curve and way: seconds at each point, constant and slope."""
    table = [["curve against", "way", "seconds at each point", "constant, s", "slope"]]
    for curve in curves:
        for way, name in WAYS.items():
            seconds = medians(curve, found, way)
            line = fit(curve.sizes(), seconds)
            points = ", ".join(
                f"{size:.0f}: {value:.3f}"
                for size, value in zip(curve.sizes(), seconds, strict=True)
            )
            slope = f"{line.slope_s * curve.per:.3f} s per {curve.per} {curve.unit}"
            table.append([curve.title, name, points, f"{line.constant_s:.3f}", slope])
    return table


def draw(curves: Sequence[Curve], found: Samples, machine: str, path: str) -> None:
    """Draw the curves beside each other; dots are rounds, lines the fits."""
    import matplotlib as mpl  # noqa: PLC0415 - a run without `--plot` does not need it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(
        1, len(curves), figsize=(4.4 * len(curves), 3.6), layout="constrained", squeeze=False
    )
    colours = {"ours": "#0b6e4f", "torch": "#7a869a"}
    for axis, curve in zip(axes[0], curves, strict=True):
        for way, name in WAYS.items():
            line = fit(curve.sizes(), medians(curve, found, way))
            for size, point in zip(curve.sizes(), curve.points, strict=True):
                values = found[point][way]
                axis.plot([size] * len(values), values, "o", ms=3, alpha=0.5, color=colours[way])
            ends = [0.0, max(curve.sizes())]
            axis.plot(ends, [line.at(x) for x in ends], color=colours[way], label=name)
        axis.set_title(f"against {curve.title}", fontsize=9.5, loc="left")
        axis.set_xlabel(curve.unit, fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(color="#e4e4e4")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds until durable", fontsize=9)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.supxlabel(f"Dots: rounds; lines: fits. {machine}", fontsize=7, x=0.01, ha="left")
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def from_json(facts: dict[str, Any]) -> tuple[list[Curve], Samples]:
    """Return what `--json` wrote: the curves and the samples of their points."""
    found = {
        Point(**{name: one[name] for name in ("ranks", "tensors", "mib")}): {
            way: one[way] for way in WAYS
        }
        for one in facts["points"]
    }
    return [CURVES[name] for name in facts["curves"]], found


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="rounds that count [%(default)s]")
    add("--only", default=",".join(CURVES), help="curves, of [%(default)s]")
    add("--root", default=tempfile.gettempdir(), help="where to save")
    add("--plot", metavar="FILE", help="draw a picture")
    add("--json", metavar="FILE", help="write all samples")
    args = parser.parse_args()
    names = args.only.split(",")
    curves = [CURVES[name] for name in names]
    machine = describe_machine(args.root)
    with tempfile.TemporaryDirectory(prefix="scaling-", dir=args.root) as root:
        found = measure(curves, args.rounds, root)
    load = os.getloadavg()[1]
    print(f"{machine}; {args.rounds} rounds, load average {load:.1f}\n")
    for number, cells in enumerate(rows(curves, found)):
        print("| " + " | ".join(cells) + " |")
        if number == 0:
            print("|---" * len(cells) + "|")
    if args.json:
        samples = [asdict(point) | seconds for point, seconds in found.items()]
        with open(args.json, "w", encoding="utf-8") as file:
            facts = {"machine": machine, "load": load, "curves": names, "points": samples}
            json.dump(facts, file, indent=1)
    if args.plot:
        draw(curves, found, machine, args.plot)


if __name__ == "__main__":
    main()
