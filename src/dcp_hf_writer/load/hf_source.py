"""Read from the HuggingFace half: find the stored elements for each box of a runtime tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.errors import MismatchError
from dcp_hf_writer.excerpts import MOST_NAMES, some_of
from dcp_hf_writer.formats.strict_json import shortened
from dcp_hf_writer.load.name_prefixes import prefix_difference
from dcp_hf_writer.load.read_phase import is_direct
from dcp_hf_writer.load.read_plan import Fetch, fetch_of_box, fetch_of_copy
from dcp_hf_writer.mapping.load_spec import LoadSpec
from dcp_hf_writer.plan.layout import PartTarget
from dcp_hf_writer.plan.regions import Region, TargetTable
from dcp_hf_writer.plan.weights_once import is_whole
from dcp_hf_writer.tensors.clip_stored import clip_stored
from dcp_hf_writer.tensors.dtypes import CASTABLE, TORCH_BY_NAME
from dcp_hf_writer.tensors.strided_copies import covered, runtime_loops, strides_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from dcp_hf_writer.formats.quantized_tensors import Stored
    from dcp_hf_writer.formats.sharded_safetensors import PiecedTensor
    from dcp_hf_writer.load.hf_directory import HFDirectory
    from dcp_hf_writer.tensors.boxes import Box, Shape
    from dcp_hf_writer.tensors.strided_copies import Copy


@dataclass(frozen=True, slots=True)
class WantedBlock:
    """A box of a runtime tensor, and the tensor in memory to read it into."""

    name: str
    """Name of the runtime tensor within the model."""
    box: Box
    """The part of the runtime tensor to load."""
    target: torch.Tensor
    """Has the shape of the box; any device and strides."""


@dataclass(frozen=True, slots=True)
class Dequantized:
    """Elements that must be computed from several stored tensors, such as codes and scales."""

    stored: Stored
    """The quantised tensor that has the elements."""
    copy: Copy
    """The elements, and where each goes in `target`."""
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class Jobs:
    """The work that loads some blocks."""

    fetches: tuple[Fetch, ...]
    """Elements to read as they are; the number of a target is the index of its block."""
    computed: tuple[Dequantized, ...]
    """Elements to compute from stored ones."""
    padded: tuple[torch.Tensor, ...]
    """Targets that contain padding; fill them with zeros before anything else."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Differences between a checkpoint and the tensors to load; each text starts with a name."""

    missing: tuple[str, ...] = ()
    """Runtime tensors that the checkpoint does not hold in full."""
    mismatched: tuple[str, ...] = ()
    """Runtime tensors whose shape or dtype does not fit the stored tensors."""
    unexpected: tuple[str, ...] = ()
    """Stored tensors that no runtime tensor is loaded from."""

    def refuse(self, path: str, *, entry: str = "", hint: str | None = None) -> None:
        """Raise one error that lists everything.

        Args:
            path: The checkpoint.
            entry: Start of the missing names that is only the entry of the state dict in which
                they lie, such as `"model."`.
            hint: What the caller can do.

        Raises:
            MismatchError: Always.
        """
        kinds = {
            "missing": self.missing,
            "mismatched": self.mismatched,
            "unexpected": self.unexpected,
        }
        found = "; ".join(
            f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names
        )
        missing = [name.removeprefix(entry) for name in self.missing]
        if (prefix := prefix_difference(missing, self.unexpected)) is not None:
            found += f"; {prefix}"
        raise MismatchError(
            "the checkpoint does not fit the state dict; nothing was loaded",
            phase="plan",
            path=path,
            found=found,
            hint=hint,
        )


class HFSource:
    """A HuggingFace directory, seen as runtime tensors; thread-safe."""

    def __init__(
        self,
        directory: HFDirectory,
        specs: Mapping[str, LoadSpec],
        *,
        names: Collection[str],
        tied: Mapping[str, str],
    ) -> None:
        """Map the stored tensors of a directory to runtime tensors.

        Args:
            directory: The directory.
            specs: Specs by name. A tensor without a spec is stored under its own name.
            names: Names of the runtime tensors to load, as far as they are known. If a model has
                tensors for the scales, its weights are loaded as stored, not dequantised.
            tied: Keys that the directory leaves out because they are tied -> the key that holds
                their bytes.

        Raises:
            PlanningError: If the checkpoint is quantised in a way that this package cannot read.
            CorruptCheckpointError: If scales are missing, or do not fit their weights.
        """
        self.directory = directory
        self._tied = tied
        self._wanted = names
        wanted = {key for spec in specs.values() for key in spec.hf_keys}
        wanted |= {name for name in names if name not in specs}
        self.stored = directory.logical(wanted)
        self.specs = {name: self._as_stored(spec) for name, spec in specs.items()}
        self._own: dict[str, LoadSpec] = {}
        self._targets: dict[str, TargetTable] = {}
        # Tensors whose keys store an element twice; counting elements cannot reveal their padding.
        self._repeated: set[str] = set()
        self._number_of_file = {name: i for i, name in enumerate(directory.headers)}
        self._files = list(directory.headers)

    def with_specs(self, specs: Mapping[str, LoadSpec]) -> HFSource:
        """Return the same directory, seen through other specs."""
        return HFSource(self.directory, specs, names=self._wanted, tied=self._tied)

    def stand_ins(self) -> dict[str, torch.Tensor]:
        """Return tensors without data, of the shapes and dtypes of the stored ones, by key."""
        return {
            key: torch.empty(one.shape, dtype=TORCH_BY_NAME[one.dtype], device="meta")
            for key, one in self.stored.items()
        }

    def _as_stored(self, spec: LoadSpec) -> LoadSpec:
        """Return the spec, or one that renames nothing if the directory uses the runtime name."""
        has_any = any(self._key(key) in self.stored for key in self._keys(spec))
        if has_any or spec.name not in self.stored or not spec.hf_keys:
            return spec
        return LoadSpec(spec.name, spec.name, spec.global_shape, shards=spec.shards)

    def names(self) -> list[str]:
        """Return the names of the runtime tensors that the directory holds in full."""
        taken = {key for spec in self.specs.values() for key in spec.hf_keys}
        found = [name for name in self.specs if not self.missing_keys(name)]
        found += [key for key in self.stored if key not in taken and key not in self.specs]
        known = taken.union(found)
        found += [
            key
            for key, kept in self._tied.items()
            if kept in self.stored and key not in known and key not in self.specs
        ]
        return found

    def spec(self, name: str) -> LoadSpec | None:
        """Return the spec of a runtime tensor; without one, a spec that changes nothing.

        `None` if the tensor has no spec and is not stored.
        """
        spec = self.specs.get(name) or self._own.get(name)
        stored = self.stored.get(self._key(name))
        if spec is None and stored is not None:
            spec = self._own[name] = LoadSpec(name, name, stored.shape)
        return spec

    def missing_keys(self, name: str) -> list[str]:
        """Return the keys that a runtime tensor needs and the directory lacks."""
        spec = self.specs.get(name)
        keys = (name,) if spec is None else self._keys(spec)
        return [key for key in keys if self._key(key) not in self.stored]

    def keys_of(self, name: str) -> set[str]:
        """Return the keys of the directory that a runtime tensor is loaded from."""
        spec = self.specs.get(name)
        return {self._key(key) for key in ((name,) if spec is None else self._keys(spec))}

    def kind(self, name: str) -> tuple[Shape, torch.dtype]:
        """Return the shape of a stored runtime tensor, and the stored dtype of its first key."""
        own = self._unmapped(name)
        if own is not None:
            return own.shape, TORCH_BY_NAME[own.dtype]
        spec = self.specs[name]
        keys = [self._key(key) for key in self._keys(spec)]
        # Nothing is read for a spec without keys, so its dtype does not matter.
        nothing = spec.dtype or torch.float32
        dtype = TORCH_BY_NAME[self.stored[keys[0]].dtype] if keys else nothing
        return spec.global_shape, dtype

    def _unmapped(self, name: str) -> Stored | None:
        """Return the stored tensor of a runtime tensor without a spec; `None` for others."""
        return None if name in self.specs else self.stored.get(self._key(name))

    def fault(self, name: str, shape: Shape, dtype: torch.dtype) -> str | None:
        """Say why a runtime tensor cannot be loaded from what is stored; `None` if it can."""
        own = self._unmapped(name)
        if own is not None and (own.shape, TORCH_BY_NAME[own.dtype]) == (shape, dtype):
            return None
        spec = self.spec(name)
        if spec is None:
            return None
        if spec.global_shape != shape:
            return f"shape {list(shape)}, stored as {list(spec.global_shape)}"
        for part in spec.parts:
            stored = self.stored[self._key(self._alias(spec, part.key))]
            if stored.shape != part.shape:
                return (
                    f"needs shape {list(part.shape)} of key {shortened(part.key)}, "
                    f"stored as {list(stored.shape)}"
                )
            if not can_cast(TORCH_BY_NAME[stored.dtype], dtype):
                return f"{dtype}, stored as {TORCH_BY_NAME[stored.dtype]}"
        return None

    def jobs(self, blocks: Sequence[WantedBlock]) -> Jobs:
        """Plan the work that loads blocks."""
        fetches: list[Fetch] = []
        computed: list[Dequantized] = []
        padded: list[torch.Tensor] = []
        for number, block in enumerate(blocks):
            own = self._unmapped(block.name)
            if own is not None and own.is_plain and own.keys[0] not in self.directory.pieced:
                fetches.append(self._fetch_box(own, number, block))
                continue
            table = self._targets_of(block.name)
            regions = table.regions(block.box)
            count = sum(region.copy.numel for region in regions)
            if len(table) and (count < block.box.numel or block.name in self._repeated):
                padded.append(block.target)
            for region in regions:
                stored = self.stored[region.target.key]
                if stored.is_plain:
                    fetches.append(self._fetch(region, number, block.target))
                else:
                    computed.append(Dequantized(stored, region.copy, block.target))
        return Jobs(tuple(fetches), tuple(computed), tuple(padded))

    def _fetch_box(self, own: Stored, number: int, block: WantedBlock) -> Fetch:
        """Return the fetch of a box of a tensor that is stored unchanged."""
        (key,) = own.keys
        file = self.directory.file_of_key[key]
        dtype = TORCH_BY_NAME[own.dtype]
        return fetch_of_box(
            block.box,
            file=file,
            start=self.directory.headers[file].tensors[key].start,
            dtype=dtype,
            strides=strides_of(own.shape),
            target=number,
            target_strides=block.target.stride(),
            is_direct=is_direct(block.target, dtype),
        )

    def _fetch(self, region: Region, number: int, target: torch.Tensor) -> Fetch:
        dtype = TORCH_BY_NAME[region.target.dtype]
        return fetch_of_copy(
            region.copy,
            file=self._files[region.target.file],
            start=region.target.start,
            dtype=dtype,
            strides=strides_of(region.target.shape),
            target=number,
            target_strides=target.stride(),
            is_direct=is_direct(target, dtype),
        )

    def _targets_of(self, name: str) -> TargetTable:
        found = self._targets.get(name)
        if found is None:
            spec = self.spec(name)
            assert spec is not None
            targets = tuple(self._targets_of_spec(spec))
            if spec.pieces is not None and _has_repeats(targets, spec.global_shape):
                self._repeated.add(name)
            found = self._targets[name] = TargetTable(targets)
        return found

    def _targets_of_spec(self, spec: LoadSpec) -> Iterator[PartTarget]:
        for part in spec.parts:
            key = self._key(self._alias(spec, part.key))
            stored = self.stored[key]
            pieced = self.directory.pieced.get(stored.keys[0])
            if pieced is not None:
                yield from self._targets_of_pieces(key, pieced, part.copies)
                continue
            raw = self.directory.stored(stored.keys[0])
            file = self._number_of_file[self.directory.file_of_key[raw.key]]
            yield PartTarget(key, file, raw.start, stored.dtype, stored.shape, part.copies)

    def _targets_of_pieces(
        self, key: str, pieced: PiecedTensor, copies: Sequence[Copy]
    ) -> Iterator[PartTarget]:
        """Yield the target that each part of a stored tensor is."""
        for piece in pieced.pieces:
            inner = tuple(one for copy in copies for one in clip_stored(copy, piece.box))
            number, start = self._number_of_file[piece.file], piece.stored.start
            if inner:
                yield PartTarget(key, number, start, pieced.dtype, piece.box.sizes, inner)

    def _keys(self, spec: LoadSpec) -> tuple[str, ...]:
        return tuple(self._alias(spec, key) for key in spec.hf_keys)

    def _alias(self, spec: LoadSpec, key: str) -> str:
        """Return `key` if it is stored or not tied, else the key that it is tied to."""
        if spec.alias_of is None or key in self.stored:
            return key
        return spec.alias_of

    def _key(self, key: str) -> str:
        return key if key in self.stored else self._tied.get(key, key)


def _has_repeats(targets: Sequence[PartTarget], shape: Shape) -> bool:
    """Whether some element of a runtime tensor lies in `targets` twice."""
    copies = [copy for target in targets for copy in target.copies]
    if is_whole(copies, shape):
        return False
    found = covered([(copy.start, runtime_loops(copy)) for copy in copies], shape)
    return found < sum(copy.numel for copy in copies)


def can_cast(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether values of one dtype may be cast to another on load: floats may, codes may not."""
    return stored == wanted or {stored, wanted} <= CASTABLE


def _some(names: Iterable[str]) -> str:
    return some_of(sorted(names), most=MOST_NAMES, separator="; ")
