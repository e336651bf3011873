"""The HuggingFace half as a source: which stored elements a box of a runtime tensor is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.errors import MismatchError
from dcp_hf_writer.excerpts import some_of
from dcp_hf_writer.formats.strict_json import shortened
from dcp_hf_writer.load.read_phase import is_direct
from dcp_hf_writer.load.read_plan import Fetch, fetch_of_box, fetch_of_copy
from dcp_hf_writer.mapping.load_spec import LoadSpec
from dcp_hf_writer.plan.layout import PartTarget
from dcp_hf_writer.plan.regions import Region, TargetTable
from dcp_hf_writer.plan.stored_once import is_whole
from dcp_hf_writer.tensors.dtypes import CASTABLE, TORCH_BY_NAME
from dcp_hf_writer.tensors.strided_copies import covered, runtime_loops, strides_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from dcp_hf_writer.formats.quantized_tensors import Stored
    from dcp_hf_writer.load.hf_directory import HFDirectory
    from dcp_hf_writer.tensors.boxes import Box, Shape
    from dcp_hf_writer.tensors.strided_copies import Copy

_MANY = 20
"""How many names of each kind an error lists."""


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a runtime tensor, and the tensor in memory that it goes to."""

    name: str
    """Name of the runtime tensor within the model."""
    box: Box
    """Part of it."""
    target: torch.Tensor
    """Of the box's shape; any device and strides."""


@dataclass(frozen=True, slots=True)
class Dequantized:
    """Elements that must be computed from several stored tensors."""

    stored: Stored
    """What they are elements of."""
    copy: Copy
    """Which, and where they go."""
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class Jobs:
    """What makes up some blocks."""

    fetches: tuple[Fetch, ...]
    """Stored elements; a target's number is the place of its block."""
    computed: tuple[Dequantized, ...]
    """Elements that are no stored ones."""
    padded: tuple[torch.Tensor, ...]
    """Targets with elements that are padding; to be filled with zeros before all else."""


@dataclass(frozen=True, slots=True)
class Findings:
    """How a directory fits what is loaded from it; each as text, by name."""

    missing: tuple[str, ...] = ()
    """Runtime tensors for which the directory lacks something."""
    mismatched: tuple[str, ...] = ()
    """Runtime tensors that are not what the directory holds."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the directory that nobody asked for."""

    def refuse(self, path: str, *, hint: str | None = None) -> None:
        """Raise one error that lists everything.

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
        """Look a directory at through specs.

        Args:
            directory: The directory.
            specs: Specs by name; a tensor without one has its name as its key.
            names: Names of the runtime tensors that are loaded, as far as they are known: a model
                that holds scales itself takes its weights as they are stored.
            tied: Keys that the directory leaves out, and the key that holds their bytes.

        Raises:
            PlanningError: If the checkpoint is quantised in a way that is not known.
            CorruptCheckpointError: If it is, and scales are missing.
        """
        self.directory = directory
        self._tied = tied
        wanted = {key for spec in specs.values() for key in spec.hf_keys}
        wanted |= {name for name in names if name not in specs}
        self.stored = directory.logical(wanted)
        self.specs = {name: self._as_stored(spec) for name, spec in specs.items()}
        self._own: dict[str, LoadSpec] = {}
        self._targets: dict[str, TargetTable] = {}
        # Tensors of which keys hold an element twice, so that counting does not find what is none.
        self._repeated: set[str] = set()
        self._number_of_file = {name: i for i, name in enumerate(directory.headers)}
        self._files = list(directory.headers)

    def _as_stored(self, spec: LoadSpec) -> LoadSpec:
        """Return a spec, or one without renaming for a directory that has the runtime's names."""
        has_any = any(self._key(key) in self.stored for key in self._keys(spec))
        if has_any or spec.name not in self.stored or not spec.hf_keys:
            return spec
        return LoadSpec(spec.name, spec.name, spec.global_shape, shards=spec.shards)

    def names(self) -> list[str]:
        """Return the runtime tensors that the directory holds all of."""
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
        """Return the spec of a runtime tensor, or one that says it is stored under its name."""
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
        """Return the keys of the directory that a runtime tensor takes."""
        spec = self.specs.get(name)
        return {self._key(key) for key in ((name,) if spec is None else self._keys(spec))}

    def kind(self, name: str) -> tuple[Shape, torch.dtype]:
        """Return shape and stored dtype of a tensor that is there; of a fused one the first's."""
        own = self._unmapped(name)
        if own is not None:
            return own.shape, TORCH_BY_NAME[own.dtype]
        spec = self.specs[name]
        keys = [self._key(key) for key in self._keys(spec)]
        # Of one without keys nothing is read, so nothing follows from its dtype.
        nothing = spec.dtype or torch.float32
        dtype = TORCH_BY_NAME[self.stored[keys[0]].dtype] if keys else nothing
        return spec.global_shape, dtype

    def _unmapped(self, name: str) -> Stored | None:
        """Return what is stored of a runtime tensor that no spec maps; `None` for others."""
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
                    f"key {shortened(part.key)} of shape {list(stored.shape)}, "
                    f"where its spec says {list(part.shape)}"
                )
            if not can_cast(TORCH_BY_NAME[stored.dtype], dtype):
                return f"{dtype}, stored as {TORCH_BY_NAME[stored.dtype]}"
        return None

    def jobs(self, blocks: Sequence[Block]) -> Jobs:
        """Find what makes up blocks."""
        fetches: list[Fetch] = []
        computed: list[Dequantized] = []
        padded: list[torch.Tensor] = []
        for number, block in enumerate(blocks):
            own = self._unmapped(block.name)
            if own is not None and own.is_plain:
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

    def _fetch_box(self, own: Stored, number: int, block: Block) -> Fetch:
        """Return what fetches a box of a tensor that is stored as it is."""
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
            raw = self.directory.stored(stored.keys[0])
            file = self._number_of_file[self.directory.file_of_key[raw.key]]
            yield PartTarget(key, file, raw.start, stored.dtype, stored.shape, part.copies)

    def _keys(self, spec: LoadSpec) -> tuple[str, ...]:
        return tuple(self._alias(spec, key) for key in spec.hf_keys)

    def _alias(self, spec: LoadSpec, key: str) -> str:
        """Return the key that holds a tied tensor: its own, if that was stored nevertheless."""
        if spec.alias_of is None or key in self.stored:
            return key
        return spec.alias_of

    def _key(self, key: str) -> str:
        return key if key in self.stored else self._tied.get(key, key)


def _has_repeats(targets: Sequence[PartTarget], shape: Shape) -> bool:
    """Whether targets may hold an element of a runtime tensor twice, and others not at all."""
    copies = [copy for target in targets for copy in target.copies]
    if is_whole(copies, shape):
        return False
    found = covered([(copy.start, runtime_loops(copy)) for copy in copies], shape)
    return found < sum(copy.numel for copy in copies)


def can_cast(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a stored tensor may be loaded into one of another dtype: floats may, codes not."""
    return stored == wanted or {stored, wanted} <= CASTABLE


def _some(names: Iterable[str]) -> str:
    return some_of(sorted(names), most=_MANY, separator="; ")
