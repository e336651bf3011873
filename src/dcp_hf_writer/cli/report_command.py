"""`report`: where the time of a save went, from the manifest: table, picture, page, trace."""

from __future__ import annotations

import html
import json
import os
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.cli.inspect_command import bytes_by_rank
from dcp_hf_writer.cli.plain_text import duration, rate, size
from dcp_hf_writer.cli.run_command import Outcome, line, line_of_rest, print_table, row, table
from dcp_hf_writer.errors import ConfigError, ReadError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.load.read_manifest import manifest_of
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.posix_outputs import write_errors
from dcp_hf_writer.storage.store_urls import is_url
from dcp_hf_writer.storage.wrong_paths import hint_for, is_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

PHASES = ("stage", "plan", "prepare", "row wait", "slot wait", "write dcp", "write hf", "sync")
"""Phases of a rank, in their order; a phase that a manifest adds comes last."""

_WRITING = ("write dcp", "write hf", "sync")
_COLORS = ("#4c78a8", "#f58518", "#e45756", "#72b7b2", "#54a24b", "#eeca3b", "#b279a2", "#9d755d")
_SHOWN = 32


def report(path: str, *, plot: str | None, page: str | None, trace: str | None) -> Outcome:
    """Read the times of a save, and write the files that are asked for.

    Raises:
        ConfigError: If matplotlib is missing and a picture is asked for.
        ReadError: If there is no manifest.
        CorruptCheckpointError: If the manifest is damaged.
        WriteError: If a file cannot be written.
    """
    files = open_directory(path)
    manifest = manifest_of(files)
    if manifest is None:
        raise _no_report(files.path, path)
    nbytes = {one["rank"]: one for one in bytes_by_rank(manifest)}
    ranks = [
        {
            "rank": rank,
            "host": host,
            "seconds": _in_order(seconds),
            "dcp_nbytes": nbytes[rank]["dcp_nbytes"],
            "hf_nbytes": nbytes[rank]["hf_nbytes"],
        }
        for rank, host, seconds in manifest.ranks
    ]
    value = {
        "path": files.path,
        "save_id": manifest.save_id,
        "step": manifest.step,
        "coordinator": dict(manifest.seconds),
        "ranks": ranks,
        "nbytes": sum(one["dcp_nbytes"] + one["hf_nbytes"] for one in ranks),
        "written": [name for name in (plot, page, trace) if name is not None],
    }
    if plot is not None:
        _plot(value, plot)
    if page is not None:
        _write(page, _page(value))
    if trace is not None:
        _write(trace, json.dumps(_trace(value)))
    return Outcome(value)


def _no_report(place: str, given: str) -> ReadError:
    """Make the error for a place without a manifest; `given` is its path as the user gave it."""
    if is_url(place) or is_checkpoint(place):
        return ReadError(
            "there is no report of the save, because there is no manifest",
            path=place,
            expected=MANIFEST_NAME,
            hint="only checkpoints of HFDualWriter have one",
        )
    return ReadError(
        "there is no checkpoint at this path",
        path=place,
        expected=MANIFEST_NAME,
        hint=hint_for(place, given),
    )


def _in_order(seconds: Mapping[str, float]) -> dict[str, float]:
    names = [*(n for n in PHASES if n in seconds), *(n for n in seconds if n not in PHASES)]
    return {name: seconds[name] for name in names}


def _phases(value: dict[str, Any]) -> list[str]:
    found = {name for one in value["ranks"] for name, s in one["seconds"].items() if s > 0}
    return [*(n for n in PHASES if n in found), *sorted(found.difference(PHASES))]


def _rate(one: dict[str, Any]) -> str:
    seconds = sum(one["seconds"].get(name, 0.0) for name in _WRITING)
    return rate(one["dcp_nbytes"] + one["hf_nbytes"], seconds)


def show_report(value: dict[str, Any], console: Console) -> None:
    """Print a table with a row for each rank."""
    line(console, value["path"], "bold")
    total = value["coordinator"].get("total", 0.0)
    step = "" if value["step"] is None else f"step {value['step']}, "
    line(
        console,
        f"{step}{size(value['nbytes'])} in {duration(total)} ({rate(value['nbytes'], total)})",
    )
    line(console, f"save {value['save_id']}")
    line(console, "seconds of each rank in each phase, and the bytes that it wrote:")
    phases = _phases(value)
    columns = ("rank", *phases, "bytes", "rate")
    made = table(*columns, numbers=columns)
    for one in value["ranks"][:_SHOWN]:
        times = (f"{one['seconds'].get(name, 0.0):.3f}" for name in phases)
        row(made, one["rank"], *times, size(one["dcp_nbytes"] + one["hf_nbytes"]), _rate(one))
    print_table(console, made)
    line_of_rest(console, value["ranks"], _SHOWN, "ranks")
    own = {n: s for n, s in value["coordinator"].items() if n in {"metadata", "finish"}}
    if own:
        texts = ", ".join(f"{name} {duration(s)}" for name, s in own.items())
        line(console, f"coordinator, after the ranks: {texts}")
    for name in value["written"]:
        line(console, f"wrote {name}")


def _write(path: str, text: str) -> None:
    with write_errors(path), open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _plot(value: dict[str, Any], path: str) -> None:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--plot needs matplotlib", found="it is not installed", hint="pip install matplotlib"
        ) from error
    ranks = value["ranks"]
    figure = Figure(figsize=(9, 1.6 + 0.35 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(ranks)
    names = [f"rank {one['rank']}" for one in ranks]
    for number, phase in enumerate(_phases(value)):
        widths = [one["seconds"].get(phase, 0.0) for one in ranks]
        color = _COLORS[number % len(_COLORS)]
        axes.barh(names, widths, left=left, label=phase, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds in each phase (not a timeline)")
    axes.set_title(os.path.basename(value["path"].rstrip("/")))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    with write_errors(path):
        figure.savefig(path, dpi=120)


def _trace(value: dict[str, Any]) -> dict[str, Any]:
    """Return a Chrome trace. The manifest holds durations, so phases follow one another."""
    events: list[dict[str, Any]] = []
    for one in value["ranks"]:
        about = {"pid": one["rank"], "tid": 0}
        name = {"name": f"rank {one['rank']} on {one['host']}"}
        events.append({"ph": "M", "name": "process_name", **about, "args": name})
        at = 0.0
        for phase, seconds in one["seconds"].items():
            times = {"ts": at * 1e6, "dur": seconds * 1e6}
            events.append({"ph": "X", "name": phase, "cat": "save", **about, **times})
            at += seconds
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _page(value: dict[str, Any]) -> str:
    """Return one HTML page that needs no network."""
    phases = _phases(value)
    longest = max((sum(one["seconds"].values()) for one in value["ranks"]), default=0.0) or 1.0
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(phases)}
    legend = "".join(
        f'<span><i style="background:{c}"></i>{_text(n)}</span>' for n, c in colors.items()
    )
    heads = "".join(f"<th>{_text(name)}</th>" for name in phases)
    rows = "".join(_page_row(one, phases, colors, longest) for one in value["ranks"])
    total = value["coordinator"].get("total", 0.0)
    summary = f"{size(value['nbytes'])} in {duration(total)}, save {value['save_id']}"
    return _PAGE.format(
        title=_text(value["path"]), summary=_text(summary), legend=legend, heads=heads, rows=rows
    )


def _page_row(
    one: dict[str, Any], phases: list[str], colors: Mapping[str, str], longest: float
) -> str:
    bars, at = "", 0.0
    for name in phases:
        width = 100 * one["seconds"].get(name, 0.0) / longest
        title = f"{name}: {duration(one['seconds'].get(name, 0.0))}"
        bars += (
            f'<rect x="{at:.3f}%" width="{width:.3f}%" height="16" fill="{colors[name]}">'
            f"<title>{_text(title)}</title></rect>"
        )
        at += width
    cells = "".join(f"<td>{one['seconds'].get(name, 0.0):.3f}</td>" for name in phases)
    return (
        f"<tr><td>{one['rank']}</td><td>{_text(one['host'])}</td>"
        f'<td class="bar"><svg width="100%" height="16">{bars}</svg></td>{cells}'
        f"<td>{size(one['dcp_nbytes'])}</td><td>{size(one['hf_nbytes'])}</td>"
        f"<td>{_rate(one)}</td></tr>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --ground: #fff; --text: #222; --band: #f4f4f4; --line: #999; }}
@media (prefers-color-scheme: dark) {{
:root {{ --ground: #16181c; --text: #e8e8e8; --band: #202329; --line: #666; }}
}}
body {{ font: 14px system-ui, sans-serif; margin: 2em; }}
body {{ color: var(--text); background: var(--ground); }}
h1 {{ font-size: 1.4em; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 4px 10px; text-align: right; white-space: nowrap; }}
th {{ border-bottom: 1px solid var(--line); }}
tbody tr:nth-child(even) {{ background: var(--band); }}
.bar {{ width: 40%; min-width: 160px; text-align: left; }} svg {{ display: block; }}
.legend span {{ margin-right: 1.5em; white-space: nowrap; }}
.legend i {{ display: inline-block; width: 12px; height: 12px; margin-right: 5px; }}
@media (max-width: 600px) {{ body {{ margin: 1em; }} }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
<p class="legend">{legend}</p>
<div class="wide"><table><thead><tr><th>rank</th><th>host</th>
<th class="bar">seconds in each phase</th>{heads}<th>DCP</th><th>HF</th><th>rate</th></tr></thead>
<tbody>
{rows}</tbody></table></div>
</body></html>
"""
