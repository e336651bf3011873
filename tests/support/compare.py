"""Byte-for-byte comparison of an export with the directory that it should equal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"

# Header length: an unsigned 64-bit little-endian integer.
_LENGTH_NBYTES = 8


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """A safetensors file, taken apart without the safetensors library."""

    header: list[tuple[str, Any]]
    """Entries of the header in file order, `__metadata__` included."""
    header_text: bytes
    """The header as it stands in the file, padding included."""
    data_start: int
    """Offset of the first data byte in the file."""

    def tensor_at(self, position: int) -> str:
        """Say which tensor holds the byte at `position` of the file."""
        for key, entry in self.header:
            if key != "__metadata__":
                start, stop = (self.data_start + offset for offset in entry["data_offsets"])
                if start <= position < stop:
                    where = f"byte {position - start} of its {stop - start}"
                    return f"tensor {key!r} ({entry['dtype']} {entry['shape']}), {where}"
        return "no tensor"


def parse(content: bytes) -> ParsedFile:
    """Take a safetensors file apart."""
    length = int.from_bytes(content[:_LENGTH_NBYTES], "little")
    text = content[_LENGTH_NBYTES : _LENGTH_NBYTES + length]
    pairs = json.loads(text, object_pairs_hook=list)
    header = [(key, dict(value)) for key, value in pairs]
    return ParsedFile(header, text, _LENGTH_NBYTES + length)


def export_difference(produced: Path, reference: Path) -> str | None:
    """Say how the weight files and the index of two model directories differ; None if they do not.

    Args:
        produced: Directory under test.
        reference: Directory that it should equal.
    """
    names, expected = _weight_files(produced), _weight_files(reference)
    if names != expected:
        missing, extra = sorted(expected - names), sorted(names - expected)
        return f"{produced}: files missing {missing}, unexpected {extra}"
    for name in sorted(names):
        difference = file_difference(
            (produced / name).read_bytes(), (reference / name).read_bytes()
        )
        if difference is not None:
            return f"{produced / name}: {difference}"
    return None


def file_difference(produced: bytes, expected: bytes) -> str | None:
    """Say where two files differ; as safetensors if they are, else by the first byte."""
    if produced == expected:
        return None
    position = _first_difference(produced, expected)
    found = f"{produced[position : position + 8].hex(' ')}"
    wanted = f"{expected[position : position + 8].hex(' ')}"
    text = f"first difference at byte {position}: expected {wanted}, found {found}"
    text += f"; sizes: expected {len(expected)}, found {len(produced)}"
    try:
        ours, theirs = parse(produced), parse(expected)
    except ValueError:
        return text
    if ours.header_text != theirs.header_text:
        return f"{_header_difference(ours, theirs)}; {text}"
    return f"{ours.tensor_at(position)}; {text}"


def tensor_difference(
    produced: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> str | None:
    """Say how two sets of tensors differ in names, dtypes, shapes or bits; None if they do not."""
    if produced.keys() != expected.keys():
        missing = sorted(expected.keys() - produced.keys())
        return f"missing {missing}, unexpected {sorted(produced.keys() - expected.keys())}"
    for key, want in expected.items():
        have = produced[key]
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            kinds = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (want, have)]
            return f"{key!r}: expected {kinds[0]}, found {kinds[1]}"
        wrong = (bits(have) != bits(want)).nonzero().flatten()
        if len(wrong):
            first, total = int(wrong[0]), want.numel() * want.itemsize
            return f"{key!r}: {len(wrong)} of {total} bytes differ, first at {first}"
    return None


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor in row-major order, so that NaN equals itself."""
    resolved = tensor.detach().resolve_conj().resolve_neg()
    return resolved.contiguous().reshape(-1).view(torch.uint8)


def _weight_files(directory: Path) -> set[str]:
    return {
        path.name
        for path in directory.iterdir()
        if path.suffix == ".safetensors" or path.name == INDEX_NAME
    }


def _first_difference(first: bytes, second: bytes) -> int:
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


def _header_difference(ours: ParsedFile, theirs: ParsedFile) -> str:
    for number, (have, want) in enumerate(zip(ours.header, theirs.header, strict=False)):
        if have != want:
            return f"header entry {number}: expected {want}, found {have}"
    if len(ours.header) != len(theirs.header):
        return f"header entries: expected {len(theirs.header)}, found {len(ours.header)}"
    return f"header text: expected {theirs.header_text!r}, found {ours.header_text!r}"
