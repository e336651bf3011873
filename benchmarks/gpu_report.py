"""What the sections of `gpu.py` found, as text and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from report import Bar, align, mark

GB = 10**9
MIN_RATIO = 0.9
"""Bar: staging speed over that of a bare copy of the same bytes."""
MAX_OVERLAP_STALL_S = 0.010
"""Bar: what overlapped staging keeps the trainer."""

STAGERS = {
    "ours": "HFDualWriter",
    "bare_one": "bare copy, one tensor",
    "bare_each": "bare copy, each tensor",
    "ours_overlap": "HFDualWriter, overlap",
    "torch_default": "torch async_save default",
    "torch_kept": "DefaultStager kept, all options",
}
"""Ways to stage, in the order of the tables."""
SAVERS = {
    "ours": "HFDualWriter: DCP + HF",
    "ours_overlap": "HFDualWriter, overlap: DCP + HF",
    "torch": "torch FileSystemWriter: DCP",
    "torch_id": "torch async_save default: DCP",
    "torch_kept": "DefaultStager kept, all options: DCP",
}
"""Ways to save, in the order of the tables."""
TURNS = "in turns: "
"""Before the names of copies that took turns with torch's stagers."""


@dataclass(slots=True)
class Section:
    """What one section reported so far; it stays readable if the section is cut off."""

    title: str
    """For people."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Single values."""
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Samples by contender."""
    skipped: dict[str, str] = field(default_factory=dict)
    """What was not measured, and why."""
    errors: dict[str, str] = field(default_factory=dict)
    """Tracebacks by the part that failed."""
    seconds: float = 0.0
    """How long the section took."""

    def take(self, _: int, event: dict[str, Any]) -> None:
        """Keep what a rank sent."""
        if event["kind"] == "fact":
            self.facts |= event["facts"]
        elif event["kind"] == "sample":
            self.samples.setdefault(event["name"], []).append(event["values"])
        elif event["kind"] == "skip":
            self.skipped[event["name"]] = event["why"]
        else:
            self.errors[event["name"]] = event["text"]

    def median(self, name: str, value: str) -> float | None:
        """Middle of one value of one contender; `None` if there is no sample."""
        found = [sample[value] for sample in self.samples.get(name, ()) if value in sample]
        return statistics.median(found) if found else None

    def as_json(self) -> dict[str, Any]:
        """Return everything, with the medians and the bars."""
        medians = {
            name: {value: self.median(name, value) for value in samples[0]}
            for name, samples in self.samples.items()
        }
        return asdict(self) | {"medians": medians, "bars": [asdict(bar) for bar in self.bars()]}

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Section:
        """Take back what `as_json` gave; medians and bars are computed again."""
        return cls(**{name.name: found[name.name] for name in fields(cls)})

    def bars(self) -> list[Bar]:
        """Hold the figures of a GPU against the bars that apply; none of a rehearsal."""
        if self.facts.get("device", {}).get("card") is None:
            return []
        return [*_ratio_bars(self), *_stall_bars(self), *_memory_bars(self)]


def render(section: Section) -> str:
    """Return the tables of a section, its bars, what it left out, and its errors."""
    parts = [f"== {section.title} ({section.seconds:.0f} s)", *_render_facts(section)]
    parts += [_render_first(section), _render_copies(section, ""), _render_copies(section, TURNS)]
    parts += [_render_memory(section), _render_steps(section), _render_saves(section)]
    bars = [(mark(bar), bar.what, bar.found, bar.limit) for bar in section.bars()]
    parts.append("Bars\n" + align(bars) if bars else "")
    parts += [f"not measured: {name}: {why}" for name, why in section.skipped.items()]
    parts += [f"FAILED: {name}\n{text}" for name, text in section.errors.items()]
    return "\n".join(part for part in parts if part) + "\n"


def _render_facts(section: Section) -> list[str]:
    facts = section.facts
    lines = []
    if "device" in facts:
        card = facts["device"].get("card") or "NO GPU WAS MEASURED: --device cpu"
        others = [f"{k} {v}" for k, v in facts["device"].items() if k != "card" and v is not None]
        lines.append(", ".join([card, *others]))
    if "nbytes" in facts:
        lines.append(f"{facts['nbytes']} bytes on the device, {facts['tensors']} tensors in all")
    lines += [facts["workload"]] if "workload" in facts else []
    return lines + ([f"note: {note}"] if (note := note_of(section)) else [])


def note_of(section: Section) -> str | None:
    """Say what had to be done to measure a kept `DefaultStager`; `None` if nothing had to be."""
    problem = section.facts.get("reuse_problem")
    return problem and f"{problem}; it was kept open by hand here, as torch 2.13 keeps it"


def _render_first(section: Section) -> str:
    rows = []
    for name, samples in section.samples.items():
        seconds = samples[0].get("seconds")
        if name.startswith("first: ") and seconds is not None:
            short = name.removeprefix("first: ")
            rows.append((STAGERS.get(short, short), f"{seconds:.3f}"))
    return align([("First call, memory included", "s"), *rows]) if rows else ""


def _render_copies(section: Section, prefix: str) -> str:
    nbytes = section.facts.get("nbytes")
    rows = []
    for name, title in STAGERS.items():
        total, stall = (section.median(prefix + name, value) for value in ("total_s", "stall_s"))
        if nbytes is None or total is None or stall is None:
            continue
        count = str(len(section.samples[prefix + name]))
        rows.append((title, f"{stall:.4f}", f"{total:.4f}", f"{nbytes / total / GB:.2f}", count))
    title = "In turns with torch's stagers" if prefix else "Copies to the host, medians"
    return align([(title, "stall s", "total s", "GB/s", "n"), *rows]) if rows else ""


def _render_memory(section: Section) -> str:
    rows = [
        (STAGERS[name], f"{samples[0]['peak']:.0f}", f"{samples[0]['after']:.0f}")
        for name in STAGERS
        if (samples := section.samples.get(f"memory: {name}"))
    ]
    return align([("Extra bytes on the device", "peak", "after"), *rows]) if rows else ""


def _render_steps(section: Section) -> str:
    plain = section.median("step: none", "compute_s")
    rows = []
    for mode in ("none", "blocking", "overlap"):
        columns = ("stall_s", "compute_s", "device_s", "wall_s")
        values = [section.median(f"step: {mode}", column) for column in columns]
        if plain is None or any(value is None for value in values):
            continue
        cells = [f"{value:.4f}" for value in values if value is not None]
        slower = (values[1] or 0) / plain - 1
        rows.append((mode, *cells, f"{slower:+.1%}", str(len(section.samples[f"step: {mode}"]))))
    head = (
        f"A step of {section.facts.get('step_matmuls')} products of "
        f"{section.facts.get('step_rows')} rows, half of them queued when staging is called"
    )
    names = ("staging", "stall s", "compute s", "device s", "wall s", "compute", "n")
    return f"  {head}\n{align([names, *rows])}" if rows else ""


def _render_saves(section: Section) -> str:
    rows = []
    for name, title in SAVERS.items():
        total, stall = (section.median(name, value) for value in ("total_s", "stall_s"))
        written = section.median(name, "written_nbytes")
        if total is None or stall is None or written is None:
            continue
        first = section.samples.get(f"first: {name}", [{}])[0].get("stall_s")
        cells = [f"{stall:.4f}", f"{total:.3f}", f"{written / GB:.2f}"]
        cells.append("-" if first is None else f"{first:.3f}")
        rows.append((title, *cells, str(len(section.samples[name]))))
    names = ("Saves, medians, slowest rank", "stall s", "total s", "GB", "first stall s", "n")
    return align([names, *rows]) if rows else ""


def _ratio_bars(section: Section) -> list[Bar]:
    bars: list[Bar] = []
    ours = section.median("ours", "total_s")
    for name in ("bare_one", "bare_each"):
        other = section.median(name, "total_s")
        if ours is not None and other is not None:
            ratio = other / ours
            what = f"staging speed / {STAGERS[name]}"
            bars.append(Bar(what, f"{ratio:.3f}x", f">= {MIN_RATIO}x", ratio >= MIN_RATIO))
    return bars


def _stall_bars(section: Section) -> list[Bar]:
    bars: list[Bar] = []
    call = "async_save" if "workload" in section.facts else "staging"
    names = {
        "ours_overlap": f"stall of overlap, {call}, idle device",
        "step: overlap": "stall of overlap, staging, beside a step",
    }
    for name, what in names.items():
        stall = section.median(name, "stall_s")
        if stall is not None:
            limit = f"< {MAX_OVERLAP_STALL_S * 1000:.0f} ms"
            bars.append(Bar(what, f"{stall * 1000:.2f} ms", limit, stall < MAX_OVERLAP_STALL_S))
    return bars


def _memory_bars(section: Section) -> list[Bar]:
    bars: list[Bar] = []
    for name in ("ours", "ours_overlap"):
        for sample in section.samples.get(f"memory: {name}", ()):
            most = max(sample["peak"], sample["after"])
            what = f"extra device memory, {STAGERS[name]}"
            bars.append(Bar(what, f"{most:.0f} B", "0 B", most == 0))
    return bars
