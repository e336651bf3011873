"""From samples to a table, the bars of the design, JSON and a plot."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contents import Written
    from states import Workload

MIB = 1 << 20
GB = 10**9
_HOST_BUDGET_NBYTES = 256 * MIB
"""Default of `HFDualWriter(host_budget_bytes=)`."""

_MEMORY_SPEED = frozenset({"tmpfs", "ramfs"})
_SHARING = frozenset({"xfs", "btrfs"})
"""File systems on which the halves share disk blocks."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of the rank that held most, in a process of its own; bytes."""

    base: int
    """Resident before the first save: libraries and the state dict."""
    peak: int
    """Highest during any save; 0 where the system cannot tell."""
    after: list[int]
    """Resident after each save."""
    fds: list[int]
    """Open file descriptors after each save."""
    threads: list[int]
    """Threads after each save."""


@dataclass(slots=True)
class Result:
    """All samples of one contender; times are those of the slowest rank."""

    name: str
    title: str
    formats: str
    stall_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    written: Written | None = None
    memory: Memory | None = None


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of design section 11."""

    what: str
    found: str
    limit: str
    passed: bool
    is_aim: bool = False
    """An aim is reported, but missing it breaks no promise."""


def median(samples: list[float]) -> float:
    """Middle of the samples; NaN of none."""
    return statistics.median(samples) if samples else math.nan


def p95(samples: list[float]) -> float:
    """Nearest rank: with up to 20 samples the slowest."""
    return sorted(samples)[math.ceil(0.95 * len(samples)) - 1] if samples else math.nan


def render_table(results: list[Result], reference: str = "torch") -> str:
    """Medians, p95 and ratios to the contender named `reference`."""
    base = next((r for r in results if r.name == reference), None)
    head = ("", "writes", "stall s", "p95", "ratio", "total s", "p95", "ratio")
    head += ("GB", "peak +GiB", "kept +GiB")
    rows = [head]
    for r in results:
        row = [r.title, r.formats]
        for samples, against in (
            (r.stall_s, base.stall_s if base else []),
            (r.total_s, base.total_s if base else []),
        ):
            ratio = median(samples) / median(against)
            row += [f"{median(samples):.3f}", f"{p95(samples):.3f}", f"{ratio:.2f}x"]
        written = r.written.total / GB if r.written else math.nan
        row += [f"{written:.2f}", *_memory_cells(r.memory)]
        rows.append(tuple("-" if cell.startswith("nan") else cell for cell in row))
    return align(rows)


def judge(
    results: list[Result], workload: Workload, *, ranks: int = 2, fs_type: str = "unknown"
) -> list[Bar]:
    """Hold the figures against the bars and aims of design section 11 that apply to this run."""
    by_name = {r.name: r for r in results}
    ours = by_name.get("ours")
    bars: list[Bar] = []
    for limits in _limits_of(workload, fs_type):
        found = _ratio_of(by_name, limits)
        if found is not None:
            what = f"{limits.of_what} / {by_name[limits.other].title}"
            text = f"{found:.2f}x"
            for limit, is_aim in ((limits.bar, False), (limits.aim, True)):
                if limit is not None:
                    bars.append(Bar(what, text, f"<= {limit:.2f}x", found <= limit, is_aim))
    if ours is not None:
        bars += _judge_bytes(ours, by_name.get("torch"), workload)
        bars += _judge_memory(ours, workload, ranks)
    return sorted(bars, key=lambda bar: bar.is_aim)


@dataclass(frozen=True, slots=True)
class _Limits:
    """Bar and aim of a time of ours, as a fraction of the time of another contender."""

    what: str
    """`stall` or `total`."""
    other: str
    bar: float | None
    aim: float | None = None
    ours: str = "ours"

    @property
    def of_what(self) -> str:
        """What is measured, as text."""
        return self.what if self.ours == "ours" else f"once: {self.what}"


def _limits_of(workload: Workload, fs_type: str) -> list[_Limits]:
    """Return the bars and aims for a workload on a file system."""
    limits = [
        _Limits("stall", "floor", 1.15, 1.0),
        _Limits("total", "torch_hf", 0.35, 0.2),
        _Limits("total", "torch", 0.6, ours="ours_once"),
    ]
    if workload.optim and workload.dtype == "float32":
        limits.append(_Limits("total", "torch", 0.7, 0.5))
    elif workload.layout == "tp":
        limits.append(_Limits("total", "torch", 1.0, 0.8))
    elif fs_type in _SHARING:
        limits.append(_Limits("total", "torch", 0.7))
        limits.append(_Limits("total", "ours_once", None, 1.1))
    elif fs_type in _MEMORY_SPEED:
        limits += [_Limits("total", "torch_cached", 1.1, 1.0), _Limits("total", "floor", 1.5, 1.3)]
    else:
        limits.append(_Limits("total", "floor", 1.3, 1.15))
    return limits


def _ratio_of(by_name: dict[str, Result], limits: _Limits) -> float | None:
    """Return the fraction; `None` if one of the contenders did not run."""
    ours, other = by_name.get(limits.ours), by_name.get(limits.other)
    if ours is None or other is None:
        return None
    name = f"{limits.what}_s"
    return median(getattr(ours, name)) / median(getattr(other, name))


def render_bars(bars: list[Bar]) -> str:
    """A mark, the figure and its limit, a line each; aims after the bars."""
    rows = [(mark(b), "aim" if b.is_aim else "bar", b.what, b.found, b.limit) for b in bars]
    return align(rows, left=3)


def render_phases(results: list[Result]) -> str:
    """Median seconds of each phase of the contenders that report them."""
    rows = []
    for r in results:
        names = list(dict.fromkeys(name for phases in r.phases for name in phases))
        for name in names:
            seconds = median([p[name] for p in r.phases if name in p])
            if seconds >= 0.0005:
                rows.append((r.title, name, f"{seconds:.3f} s"))
    return align(rows, left=2)


def as_json(
    machine: str, workload: Workload, root: str, results: list[Result], bars: list[Bar]
) -> dict[str, Any]:
    """Everything, samples included, as plain values."""
    contenders = {}
    for r in results:
        summary = {
            "stall_s_median": median(r.stall_s),
            "stall_s_p95": p95(r.stall_s),
            "total_s_median": median(r.total_s),
            "total_s_p95": p95(r.total_s),
        }
        contenders[r.name] = asdict(r) | summary
    return {
        "machine": machine,
        "file_system": root,
        "workload": asdict(workload)
        | {"weights_nbytes": workload.weights_nbytes, "optim_nbytes": workload.optim_nbytes},
        "contenders": contenders,
        "bars": [asdict(bar) for bar in bars],
    }


def _judge_bytes(ours: Result, torch: Result | None, workload: Workload) -> list[Bar]:
    if ours.written is None:
        return []
    once = ours.written.tensors == workload.weights_nbytes
    bars = [
        Bar(
            "tensor bytes in safetensors / model",
            f"{ours.written.tensors / workload.weights_nbytes:.4f}x",
            "= 1",
            once,
        )
    ]
    if torch is not None and torch.written is not None:
        ratio = ours.written.distcp / torch.written.distcp
        bars.append(
            Bar(
                f"bytes of .distcp files / {torch.title}",
                f"{ratio:.4f}x",
                "<= 1.0005x",
                ratio <= 1.0005,
            )
        )
    return bars


def _judge_memory(ours: Result, workload: Workload, ranks: int) -> list[Bar]:
    memory = ours.memory
    if memory is None or not memory.peak:
        return []
    snapshot = (workload.weights_nbytes + workload.optim_nbytes) // ranks
    extra, limit = memory.peak - memory.base, snapshot + _HOST_BUDGET_NBYTES
    bars = [
        Bar(
            "peak of a rank above model: snapshot + budget",
            f"{extra / MIB:.0f} MiB",
            f"<= {limit / MIB:.0f} MiB",
            extra <= limit,
        )
    ]
    if len(memory.after) > 2:
        # The first save makes what later ones reuse, so growth counts from the second.
        grown = (memory.after[-1] - memory.after[1]) / MIB
        fds, threads = (v[-1] - v[1] for v in (memory.fds, memory.threads))
        bars.append(
            Bar(
                f"growth from save 2 to save {len(memory.after)}",
                f"{grown:+.0f} MiB, {fds:+d} fds, {threads:+d} threads",
                "flat",
                grown <= 16 and fds <= 0 and threads <= 0,
            )
        )
    return bars


def mark(bar: Bar) -> str:
    """Sign of whether a bar is held; a missed aim is no failure."""
    return "✓" if bar.passed else "·" if bar.is_aim else "✗"


def _memory_cells(memory: Memory | None) -> list[str]:
    if memory is None:
        return ["-", "-"]
    peak = f"{(memory.peak - memory.base) / (1 << 30):.2f}" if memory.peak else "-"
    return [peak, f"{(memory.after[-1] - memory.base) / (1 << 30):.2f}"]


def align(rows: list[tuple[str, ...]], left: int = 2) -> str:
    """Lay out rows as columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join("  " + line for line in lines)
