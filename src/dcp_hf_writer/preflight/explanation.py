"""The result of `HFDualWriter.explain`: what a save would write, and what it would leave out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.preflight import explanation_tables as tables

if TYPE_CHECKING:
    from dcp_hf_writer.preflight.explanation_rows import FileSum, LeftOut, RankSum, Row

_WIDTH = 120


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a save would write, and what it would leave out; the same on every rank.

    `print` shows tables with one line for equal layers of a model; `rows` lists every block.
    """

    path: str
    """Path of the checkpoint."""
    entry: str
    """Entry of the state dict that holds the model; empty if the whole state dict is the model."""
    rows: tuple[Row, ...]
    """Every block of the export; tensors are in state-dict order."""
    files: tuple[FileSum, ...]
    """Output files; the last one is the index, if there is one."""
    ranks: tuple[RankSum, ...]
    """What each rank writes in total."""
    left_out: tuple[LeftOut, ...]
    """What only the DCP half holds: other entries, values, tied names, padding."""
    stored_once: tuple[str, ...]
    """FQNs of tensors that only the export stores."""
    missing_keys: tuple[str, ...]
    """Keys that are expected, but that the export would not have. `expect_keys` lists the expected
    keys; without it, the index of `like` does."""
    unexpected_keys: tuple[str, ...]
    """Keys that the export would have, but that are not expected."""
    problems: tuple[str, ...]
    """Why the save would be refused, or why it would have no export."""

    def table(self, *, width: int = _WIDTH, collapse: bool = True) -> str:
        """Return tables for a terminal; `0..9` stands for some ranks or files between 0 and 9.

        Args:
            width: Characters per line; a line with a long name or cell may be longer.
            collapse: Show equal layers of a model as one line. If `False`, show each block with its
                byte range.
        """
        said = [self._headline(), *(f"! {problem}" for problem in self.problems)]
        parts = [tables.wrapped(text, width) for text in said]
        if self.rows:
            table = tables.mapping_table if collapse else tables.block_table
            parts.append(table(self.rows, self.entry, self.files, width))
            parts.append(tables.legend(self.rows))
        if self.files:
            parts.append(tables.file_table(self.files, width))
        parts.append(tables.rank_table(self.ranks, width))
        if self.stored_once:
            count = tables.count_text(len(self.stored_once), "tensor")
            parts.append(f"stored once, in the export: {count}")
        if self.left_out:
            parts.append(tables.left_out_list(self.left_out, self.entry, width))
        for title, keys in (
            ("expected keys that would be missing", self.missing_keys),
            ("keys that are not expected", self.unexpected_keys),
        ):
            if keys:
                parts.append(tables.key_list(title, keys, width))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        """Return the tables."""
        return self.table()

    def _headline(self) -> str:
        ranks = tables.count_text(len(self.ranks), "rank")
        if not self.files:
            return f"dry run of {self.path}, {ranks}: no export"
        tensors = tables.count_text(len({row.fqn for row in self.rows}), "tensor")
        keys = tables.count_text(sum(file.tensors for file in self.files), "HuggingFace tensor")
        files = tables.count_text(sum(file.tensors > 0 for file in self.files), "file")
        size = tables.size_text(sum(file.nbytes for file in self.files))
        return f"dry run of {self.path}, {ranks}: {tensors} -> {keys}, {files}, {size}"
