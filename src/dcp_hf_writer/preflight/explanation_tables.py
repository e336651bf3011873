"""The result of a dry run as tables for a terminal.

Pure. Tensors whose names differ only in numbers share one line, as the layers of a model do.
Tensors that keep their names in the export share a line even if the names differ in words.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.mapping.abbreviated_names import patterns, ranges, template
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from dcp_hf_writer.preflight.explanation_rows import FileSum, LeftOut, RankSum, Row
    from dcp_hf_writer.tensors.boxes import Shape

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))

_GAP = "  "
_ARROW = "  -> "

# A longer table shows this many lines, without its middle; a longer list shows this many names.
_SHOWN, _NAMES = 12, 4

# A cell shows at most this many ranges of ranks or files; otherwise only the first and the last.
_RANGES = 3

_WAYS = {
    "direct": "the bytes of the staged copy go to the file unchanged",
    "runs": "several runs of bytes, with other blocks between them",
    "cast": "through the bounce buffer, to change the dtype",
    "strided": "through the bounce buffer, to change the order of elements",
}

Cells = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: a name, and the cells after it."""

    name: str
    cells: Cells = ()


def size_text(nbytes: float) -> str:
    """Return a size in decimal units, with three digits if it has as many: `4.61 kB`, `36 B`."""
    for unit, name in _UNITS:
        if nbytes >= unit:
            value = nbytes / unit
            digits = 2 if value < 10 else 1 if value < 100 else 0  # noqa: PLR2004 - of what is shown
            return f"{value:.{digits}f} {name}"
    return f"{nbytes:.0f} B"


def count_text(count: int, what: str) -> str:
    """Return a count with its noun: `1 file`, `2 files`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def wrapped(text: str, width: int) -> str:
    """Break a sentence into lines, only between words."""
    return textwrap.fill(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def aligned(head: Line, lines: Sequence[Line], *, width: int, left: frozenset[int]) -> list[str]:
    """Lay out lines in columns; a name that is too long gets a line of its own.

    Args:
        head: The line above the columns.
        lines: Lines with no cells, or with as many cells as `head`.
        width: Characters per line; a line with a long name or cell may be longer.
        left: Columns to align left (text); the others are aligned right (numbers).
    """
    full = [head, *(line for line in lines if line.cells)]
    widths = [max(len(line.cells[i]) for line in full) for i in range(len(head.cells))]
    rest = sum(widths) + len(_GAP) * len(widths)
    names = max(len(line.name) for line in (head, *lines))
    room = max(min(names, width - rest), len(head.name))
    found = []
    for line in (head, *lines):
        cells = [
            cell.ljust(size) if i in left else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(line.cells, widths, strict=False))
        ]
        if len(line.name) > room and cells:
            found.append(line.name)
        name = "" if len(line.name) > room and cells else line.name
        found.append(_GAP.join([name.ljust(room), *cells]).rstrip())
    found.insert(1, "-" * min(width, room + rest))
    return found


def mapping_table(rows: Iterable[Row], entry: str, files: Sequence[FileSum], width: int) -> str:
    """Return the table of runtime tensors and the HuggingFace tensors made from them."""
    number = {file.name: i for i, file in enumerate(files, 1)}
    lines = [line for group in _groups(rows, entry) for line in _group_lines(group, number)]
    head = Line(
        f"tensor of {entry!r}" if entry else "runtime tensor",
        ("count", "shape", "dtype", "bytes", "ranks", "files", "how"),
    )
    return "\n".join(aligned(head, lines, width=width, left=frozenset({1, 2, 4, 5, 6})))


def block_table(rows: Iterable[Row], entry: str, files: Sequence[FileSum], width: int) -> str:
    """Return the table with a line for every block."""
    number = {file.name: str(i) for i, file in enumerate(files, 1)}
    lines = []
    for name, of_tensor in _by_name(rows, entry).items():
        if any(row.key != name for row in of_tensor):
            lines.append(Line(name))
        lines += [_block_line(row, name, number[row.file]) for row in of_tensor]
    head = Line("HuggingFace tensor", ("rank", "block", "dtype", "file", "bytes", "runs", "how"))
    return "\n".join(aligned(head, lines, width=width, left=frozenset({1, 2, 6})))


def _block_line(row: Row, name: str, file: str) -> Line:
    sizes = row.hf_sizes or ("?",) * len(row.hf_offsets)
    block = ", ".join(f"{o}+{s}" for o, s in zip(row.hf_offsets, sizes, strict=True))
    where = f"{row.start:,}-{row.stop:,}"
    runs = f"{row.runs:,} x {row.run_nbytes:,}" if row.runs > 1 else ""
    shown = row.key if row.key == name else _ARROW + row.key
    return Line(shown, (str(row.rank), f"[{block}]", row.hf_dtype, file, where, runs, _way(row)))


def file_table(files: Sequence[FileSum], width: int) -> str:
    """Return the table of output files."""
    lines = [
        Line(f"{i:>3}  {file.name}", _file_cells([file]) if file.tensors else _index_cells(file))
        for i, file in enumerate(files, 1)
    ]
    shown = _middle_left_out(lines)
    if len(files) > 1:
        shown.append(Line(f"     {len(files):,} files", _file_cells(files)))
    head = Line("  #  file", ("bytes", "tensors", "header"))
    return "\n".join(aligned(head, shown, width=width, left=frozenset()))


def _file_cells(files: Sequence[FileSum]) -> Cells:
    nbytes, header = sum(one.nbytes for one in files), sum(one.header_nbytes for one in files)
    return size_text(nbytes), f"{sum(one.tensors for one in files):,}", size_text(header)


def _index_cells(index: FileSum) -> Cells:
    return size_text(index.nbytes), "", ""


def rank_table(ranks: Sequence[RankSum], width: int) -> str:
    """Return the table of what each rank writes."""
    lines = [Line(f"{one.rank:>4}  {one.host}", _rank_cells([one], one.files)) for one in ranks]
    shown = [*_middle_left_out(lines)]
    if len(ranks) > 1:
        shown.append(Line(f"{len(ranks):>4} ranks", _rank_cells(ranks, None)))
    head = Line("rank  host", ("DCP bytes", "tensors", "values", "HF bytes", "blocks", "files"))
    return "\n".join(aligned(head, shown, width=width, left=frozenset()))


def left_out_list(left_out: Iterable[LeftOut], entry: str, width: int) -> str:
    """Return the list of what only the DCP half holds, grouped by reason."""
    by_reason: dict[str, list[LeftOut]] = {}
    for one in left_out:
        by_reason.setdefault(one.reason, []).append(one)
    lines = ["only in the DCP half:"]
    for reason, some in by_reason.items():
        is_value = some[0].shape is None
        size = "" if is_value else f", {size_text(sum(one.nbytes for one in some))}"
        lines.append(
            f"  {reason}: {count_text(len(some), 'value' if is_value else 'tensor')}{size}"
        )
        if some[0].why != "beside":
            lines += _few((_short(one.fqn, entry) for one in some), width)
    return "\n".join(lines)


def key_list(title: str, keys: Sequence[str], width: int) -> str:
    """Return a list of keys, abbreviated to a few patterns."""
    return "\n".join([f"{title} ({len(keys):,}):", *_few(keys, width)])


def legend(rows: Iterable[Row]) -> str:
    """Return the meaning of each word that the column `how` uses for these rows."""
    found = {word for row in rows for word in _way(row).split("+")}
    return "\n".join(f"{word:>9}: {text}" for word, text in _WAYS.items() if word in found)


def _by_name(rows: Iterable[Row], entry: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_short(row.fqn, entry), []).append(row)
    return found


def _groups(rows: Iterable[Row], entry: str) -> list[dict[str, list[Row]]]:
    """Group the tensors that share one line, and with it the lines of their HuggingFace tensors."""
    by_name = _by_name(rows, entry)
    by_kind: dict[tuple[object, ...], dict[str, list[Row]]] = {}
    for name, some in by_name.items():
        by_kind.setdefault(_kind(name, some), {})[name] = some
    found = []
    for group in by_kind.values():
        parts = patterns(group).values() if _keeps_name(group) else [list(group)]
        found += [{name: group[name] for name in names} for names in parts]
    place = {name: i for i, name in enumerate(by_name)}
    return sorted(found, key=lambda group: min(place[name] for name in group))


def _kind(name: str, rows: Sequence[Row]) -> tuple[object, ...]:
    """Return what all tensors of a group have in common."""
    first = rows[0]
    ways = frozenset(map(_way, rows))
    if all(row.key == name for row in rows):
        return first.shape, first.dtype, first.hf_shape, first.hf_dtype, ways
    made = {(row.key, row.hf_shape, row.hf_dtype) for row in rows}
    kinds = Counter((template(key), shape, dtype) for key, shape, dtype in made)
    return template(name), first.shape, first.dtype, frozenset(kinds.items()), ways


def _keeps_name(group: Mapping[str, Sequence[Row]]) -> bool:
    return all(row.key == name for name, rows in group.items() for row in rows)


def _group_lines(group: Mapping[str, Sequence[Row]], number: Mapping[str, int]) -> Iterator[Line]:
    rows = [row for some in group.values() for row in some]
    first = rows[0]
    ranks = _span({row.rank for row in rows})
    if _keeps_name(group) and first.shape == first.hf_shape:
        dtype = first.dtype + ("" if first.dtype == first.hf_dtype else f" -> {first.hf_dtype}")
        cells = _cells(len(group), first.shape, dtype, _nbytes(rows))
        yield from _named(group, (*cells, ranks, _files(rows, number), _ways(rows)))
        return
    nbytes = len(group) * math.prod(first.shape) * ITEMSIZE[first.dtype]
    cells = _cells(len(group), first.shape, first.dtype, nbytes)
    yield from _named(group, (*cells, ranks, "", ""))
    made: dict[tuple[Shape, str], list[Row]] = {}
    for row in rows:
        made.setdefault((row.hf_shape, row.hf_dtype), []).append(row)
    for (shape, dtype), some in made.items():
        keys = dict.fromkeys(row.key for row in some)
        cells = _cells(len(keys), shape, dtype, _nbytes(some))
        cells = (*cells, "", _files(some, number), _ways(some))
        yield from _named(keys, cells, before=_ARROW)


def _named(names: Iterable[str], cells: Cells, before: str = "") -> Iterator[Line]:
    first, *others = patterns(names)
    yield Line(before + first, cells)
    for other in others:
        yield Line(" " * len(before) + other)


def _nbytes(rows: Iterable[Row]) -> int:
    return sum(row.nbytes for row in rows)


def _cells(count: int, shape: Shape, dtype: str, nbytes: int) -> Cells:
    return f"{count:,}", f"[{', '.join(map(str, shape))}]", dtype, size_text(nbytes)


def _files(rows: Iterable[Row], number: Mapping[str, int]) -> str:
    return _span({number[row.file] for row in rows})


def _span(numbers: Iterable[int]) -> str:
    """Return numbers as ranges; if there are too many ranges, only the first and last number."""
    found = list(numbers)
    text = ranges(found)
    return text if text.count(",") < _RANGES else f"{min(found)}..{max(found)}"


def _way(row: Row) -> str:
    if row.way == "direct":
        return "runs" if row.runs > 1 else "direct"
    return row.way + ("+runs" if row.runs > 1 else "")


def _ways(rows: Iterable[Row]) -> str:
    return "/".join(sorted(set(map(_way, rows))))


def _rank_cells(ranks: Sequence[RankSum], files: int | None) -> Cells:
    return (
        size_text(sum(one.dcp_nbytes for one in ranks)),
        f"{sum(one.dcp_tensors for one in ranks):,}",
        f"{sum(one.values for one in ranks):,}",
        size_text(sum(one.hf_nbytes for one in ranks)),
        f"{sum(one.blocks for one in ranks):,}",
        "" if files is None else f"{files:,}",
    )


def _middle_left_out(lines: Sequence[Line]) -> list[Line]:
    if len(lines) <= _SHOWN:
        return list(lines)
    left_out = len(lines) - _SHOWN + 2
    return [*lines[: _SHOWN - 2], Line(f"     ... {left_out:,} more ..."), lines[-1]]


def _few(names: Iterable[str], width: int) -> list[str]:
    texts = [f"    {text}" for text in patterns(names)]
    texts = [text if len(text) <= width else f"{text[: width - 3]}..." for text in texts]
    more = len(texts) - _NAMES
    return texts if more <= 0 else [*texts[:_NAMES], f"    ... and {more:,} more like these"]


def _short(fqn: str, entry: str) -> str:
    return fqn.removeprefix(f"{entry}.") if entry else fqn
