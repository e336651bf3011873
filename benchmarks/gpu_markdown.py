"""The tables of docs/performance-gpu.md, from the `gpu.json` that a run has written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpu_report import GB, SAVERS, STAGERS, TURNS, Section, note_of
from report import mark

if TYPE_CHECKING:
    from collections.abc import Iterable

Row = tuple[str, ...]


def as_markdown(found: dict[str, Any]) -> str:
    """Return the tables of all sections, their bars, and what was not measured.

    Args:
        found: The content of `gpu.json`.
    """
    sections = [Section.of_json(section) for section in found["sections"]]
    parts = [_render_setup(found, sections)]
    for section in sections:
        parts += [f"## {section.title}", _render_section(section)]
    return "\n\n".join([*parts, "## Bars", _render_bars(sections)])


def _render_setup(found: dict[str, Any], sections: list[Section]) -> str:
    device = next((s.facts["device"] for s in sections if "device" in s.facts), {})
    link = "pcie.link.gen.current", "pcie.link.width.current"
    rows = [
        ("card", device.get("card") or "none: a rehearsal, whose figures mean nothing"),
        ("driver, CUDA", f"{device.get('driver_version', '?')}, {device.get('cuda', '?')}"),
        ("link", " x".join(["PCIe gen " + device.get(link[0], "?"), device.get(link[1], "?")])),
        ("torch", found["torch"]),
        ("machine", found["machine"]),
        ("date", found["date"]),
        ("command", f"`{found['command']}`"),
    ]
    return _table([("", "measured on"), *rows])


def _render_section(section: Section) -> str:
    facts, parts = section.facts, []
    if "nbytes" in facts:
        gb = facts["nbytes"] / GB
        parts.append(f"{gb:.2f} GB on the device, {facts['tensors']} tensors in all.")
    if "workload" in facts:
        parts.append(f"{facts['workload']}. Times are those of the slowest rank.")
    parts += [_render_copies(section), _render_step(section), _render_saves(section)]
    note = note_of(section)
    parts.append(f"Note: {note}." if note else "")
    titles = STAGERS if "nbytes" in facts else SAVERS
    left_out = [(titles.get(name, name), why) for name, why in section.skipped.items()]
    left_out += [(name, _last_line(text)) for name, text in section.errors.items()]
    parts.append("\n".join(f"- not measured: {name}: {why}" for name, why in left_out))
    return "\n\n".join(part for part in parts if part)


def _render_copies(section: Section) -> str:
    nbytes = section.facts.get("nbytes")
    rows = []
    for name, title in STAGERS.items() if nbytes else ():
        key = name if name in section.samples else TURNS + name
        stall, total = (section.median(key, value) for value in ("stall_s", "total_s"))
        first = section.median(f"first: {name}", "seconds")
        if first is None and total is None:
            continue
        cells = [_ms(stall), _ms(total)]
        cells.append("-" if total is None else f"{nbytes / total / GB:.2f}")
        cells.append("-" if first is None else f"{first:.2f}")
        rows.append((title, *cells, str(len(section.samples.get(key, ())))))
    head = ("copy to the host", "stall ms", "total ms", "GB/s", "first call s", "n")
    return _table([head, *rows]) if rows else ""


def _render_step(section: Section) -> str:
    rows = []
    for mode in ("none", "blocking", "overlap"):
        key = f"step: {mode}"
        if key in section.samples:
            values = [section.median(key, f"{name}_s") for name in ("stall", "compute", "wall")]
            rows.append((mode, *map(_ms, values), str(len(section.samples[key]))))
    head = ("staging in a step", "stall ms", "compute ms", "wall ms", "n")
    return _table([head, *rows]) if rows else ""


def _render_saves(section: Section) -> str:
    rows = []
    for name, title in SAVERS.items():
        stall, total = (section.median(name, value) for value in ("stall_s", "total_s"))
        written = section.median(name, "written_nbytes")
        if written is not None:
            count = str(len(section.samples[name]))
            rows.append((title, _ms(stall), _ms(total), f"{written / GB:.2f}", count))
    head = ("save", "stall ms", "total ms", "GB written", "n")
    return _table([head, *rows]) if rows else ""


def _render_bars(sections: list[Section]) -> str:
    head = ("", "section", "bar", "found", "limit")
    rows = [
        (mark(bar), section.title.partition(" ")[0], bar.what, bar.found, bar.limit)
        for section in sections
        for bar in section.bars()
    ]
    return _table([head, *rows]) if rows else "None applies to a rehearsal."


def _table(rows: Iterable[Row]) -> str:
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def _last_line(text: str) -> str:
    return f"`{(text.strip().splitlines() or ['?'])[-1]}`"
