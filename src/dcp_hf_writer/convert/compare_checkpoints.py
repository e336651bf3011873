"""Compare the tensors of two stored checkpoints: names, shapes, dtypes, values."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.convert.stored_tensors import (
    StoredKind,
    StoredTensors,
    open_dcp_tensors,
    open_hf_tensors,
)
from dcp_hf_writer.formats.parse_dcp_metadata import paths_in
from dcp_hf_writer.load.choose_half import find_place
from dcp_hf_writer.mapping.model_entry import model_prefix, names_in_model
from dcp_hf_writer.tensors.boxes import Box, whole
from dcp_hf_writer.tensors.row_major_parts import row_major_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.distributed.checkpoint.metadata import Metadata

    from dcp_hf_writer.load.choose_half import SourceName

# Elements that are compared at a time: two parts of at most 8 bytes an element, and both again in
# float64.
_MAX_ELEMENTS = 4 << 20


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How a tensor of one checkpoint differs from the tensor of the same name in the other."""

    name: str
    """Name of the tensor."""
    a: StoredKind | None
    """Shape and dtype in the first checkpoint; `None` if it is missing there."""
    b: StoredKind | None
    """The same for the second checkpoint."""
    differing: int | None = None
    """Number of elements with other values; `None` if the values cannot be compared."""
    max_abs: float | None = None
    """Largest `|a - b|`; infinite if only one of two elements is NaN or infinite."""
    max_rel: float | None = None
    """Largest `|a - b| / max(|a|, |b|)`."""


@dataclass(frozen=True, slots=True)
class CheckpointComparison:
    """The result of a comparison."""

    halves: tuple[str, str]
    """The half that was read of each checkpoint: `"dcp"` or `"hf"`."""
    equal: int
    """Number of tensors that are equal in shape, dtype and all values."""
    differences: tuple[TensorDifference, ...]
    """The others, by name."""


class _Side:
    """One checkpoint: the tensors to compare, by the name that both sides use."""

    def __init__(self, path: str, half: SourceName, held: ExitStack) -> None:
        place = find_place(path, half, None, with_manifest=False)
        self.half = "dcp" if place.subdir is None else "hf"
        self._metadata: Metadata | None = None
        self.tensors: StoredTensors
        if self.half == "dcp":
            self.tensors, self._metadata = held.enter_context(open_dcp_tensors(path))
        else:
            self.tensors = held.enter_context(open_hf_tensors(path, {}))
        self.names = {name: name for name in self.tensors.kinds}

    def within_model(self) -> None:
        """Name the tensors as they are called within the model; leave out all others."""
        if self._metadata is None:
            return
        known = paths_in(self._metadata)
        paths = {fqn: tuple(known.get(fqn, (fqn,))) for fqn in self.tensors.kinds}
        names = names_in_model(paths, model_prefix(paths, key=None))
        self.names = {name: fqn for fqn, name in names.items()}

    def kind(self, name: str) -> StoredKind | None:
        return self.tensors.kinds.get(self.names[name]) if name in self.names else None

    def read(self, name: str, box: Box, target: torch.Tensor) -> None:
        self.tensors.read(self.names[name], box, target)


def compare_checkpoints(
    a: str,
    b: str,
    *,
    half: SourceName = "auto",
    matches: Callable[[str], bool] = lambda _: True,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointComparison:
    """Compare all tensors of two checkpoints, a part at a time.

    If one side is a DCP half and the other a HuggingFace directory, only the tensors of the model
    are compared, by their names within it. Values that are not tensors are not compared.

    Args:
        a: The first checkpoint, as a path or URL.
        b: The second one.
        half: The half to read of both; `"auto"` reads the DCP half where there is one.
        matches: Whether to compare a tensor of such a name.
        progress: Called with the bytes compared and the total bytes.

    Raises:
        ConfigError: If a path cannot be used.
        ReadError: If there is no such checkpoint, or a file cannot be read.
        CorruptCheckpointError: If a file is damaged.
        ModelKeyError: If it is not clear which entry of a DCP half holds the model.
    """
    with ExitStack() as held:
        sides = _Side(a, half, held), _Side(b, half, held)
        if sides[0].half != sides[1].half:
            for side in sides:
                side.within_model()
        names = [n for n in sorted(sides[0].names.keys() | sides[1].names.keys()) if matches(n)]
        found = list(_differences(sides, names, progress))
    return CheckpointComparison(
        (sides[0].half, sides[1].half),
        sum(one is None for one in found),
        tuple(one for one in found if one is not None),
    )


def _differences(
    sides: tuple[_Side, _Side],
    names: list[str],
    progress: Callable[[int, int], None] | None,
) -> Iterator[TensorDifference | None]:
    kinds: Mapping[str, tuple[StoredKind | None, StoredKind | None]] = {
        name: (sides[0].kind(name), sides[1].kind(name)) for name in names
    }
    total, done = sum(_nbytes(*pair) for pair in kinds.values()), 0
    for name, (a, b) in kinds.items():
        if a is None or b is None or a.shape != b.shape:
            yield TensorDifference(name, a, b)
            continue
        found = _Values()
        for box in row_major_parts(whole(a.shape), _MAX_ELEMENTS):
            parts = [torch.empty(box.sizes, dtype=kind.dtype, device="cpu") for kind in (a, b)]
            for side, part in zip(sides, parts, strict=True):
                side.read(name, box, part)
            found.add(*parts)
            done += sum(part.nbytes for part in parts)
            if progress is not None:
                progress(done, total)
        is_equal = a.dtype == b.dtype and not found.differing
        made = TensorDifference(name, a, b, found.differing, found.max_abs, found.max_rel)
        yield None if is_equal else made


def _nbytes(a: StoredKind | None, b: StoredKind | None) -> int:
    if a is None or b is None or a.shape != b.shape:
        return 0
    return math.prod(a.shape) * (a.dtype.itemsize + b.dtype.itemsize)


class _Values:
    """What the parts of two tensors tell about the whole."""

    def __init__(self) -> None:
        self.differing = 0
        self.max_abs = self.max_rel = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Compare two parts of the same shape."""
        if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
            return
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        left, right = _as(a, wide), _as(b, wide)
        is_same = (left == right) | (left.isnan() & right.isnan())
        if a.dtype == b.dtype and not a.is_floating_point() and not a.is_complex():
            # float64 does not hold every int64.
            is_same = a == b
        self.differing += int((~is_same).sum())
        distance = (left - right).abs()
        distance = torch.where(distance.isnan(), math.inf, distance)
        distance = torch.where(is_same, 0.0, distance)
        scale = torch.maximum(left.abs(), right.abs())
        share = torch.where(distance > 0, distance / scale, 0.0)
        share = torch.where(share.isnan(), math.inf, share)
        self.max_abs = max(self.max_abs, float(distance.max()))
        self.max_rel = max(self.max_rel, float(share.max()))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # float8 converts to float32 only.
    return (tensor.float() if tensor.itemsize == 1 and tensor.is_floating_point() else tensor).to(
        dtype
    )
