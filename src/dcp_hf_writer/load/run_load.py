"""One load through `dcp.load`, from either half: describe it, check that it fits, read it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType

from dcp_hf_writer.errors import ConfigError, MismatchError, ModelKeyError
from dcp_hf_writer.formats.names_on_disk import METADATA_NAME
from dcp_hf_writer.load.choose_half import open_hf_source, read_dcp_metadata
from dcp_hf_writer.load.dcp_source import DCPSource, Wanted, fetch_of_archive
from dcp_hf_writer.load.exchange_reads import Reading
from dcp_hf_writer.load.hf_source import Findings, WantedBlock
from dcp_hf_writer.load.mismatches import loaded_values, misfits
from dcp_hf_writer.load.planned_items import gives_own_tensors, item_faults
from dcp_hf_writer.load.read_hf_blocks import load_blocks
from dcp_hf_writer.load.read_phase import run_reads
from dcp_hf_writer.load.read_plan import plan_reads
from dcp_hf_writer.load.tied_in_files import refuse_drifted_ties
from dcp_hf_writer.load.verify_while_reading import verify_ranges
from dcp_hf_writer.mapping.flattening import flat_tensors
from dcp_hf_writer.mapping.model_entry import model_prefix, names_in_model
from dcp_hf_writer.mapping.wrapped_names import unwrapped_names
from dcp_hf_writer.staging.same_memory import memory_identity
from dcp_hf_writer.storage.open_inputs import OpenInputs
from dcp_hf_writer.tensors.boxes import Box
from dcp_hf_writer.torch_seam.keyed_loads import paths_of_fqns

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch.distributed as dist
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

    from dcp_hf_writer.load.choose_half import CheckpointPlace
    from dcp_hf_writer.load.read_plan import Fetch
    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.mapping.model_entry import Path
    from dcp_hf_writer.torch_seam.stream_transforms import StreamTransforms


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The options of a reader that a load needs."""

    specs: Mapping[str, LoadSpec]
    key: str | None
    is_verified: bool
    allow_pickled_objects: bool
    group: dist.ProcessGroup | None
    """The ranks that read together and send each other what they read; `None` reads alone."""
    load_id: str
    """Id of the load, which torch keeps in the metadata."""
    transforms: StreamTransforms
    """Undoes what extensions of torch's writer did to the bytes."""


class Load(ABC):
    """One load on one rank."""

    metadata: Metadata
    """The metadata that DCP's planner gets."""

    def __init__(self, place: CheckpointPlace, inputs: OpenInputs, options: LoadOptions) -> None:
        """Read from `place`, whose files are `inputs`."""
        self._place, self._inputs, self._options = place, inputs, options

    @abstractmethod
    def check(self, planner: LoadPlanner, given: Mapping[str, Any]) -> None:
        """Check that the checkpoint holds everything that the planner loads, in a form that fits.

        Only for planners that load their whole state dict. For other planners, `check_items` checks
        what they plan.

        Args:
            planner: Planner of the load.
            given: The nested state dict that it was set up with.

        Raises:
            MismatchError: If it does not; lists everything that is missing or does not fit.
        """

    def check_items(self, items: Sequence[ReadItem]) -> None:
        """Check that the checkpoint holds every item of a plan. Reads nothing.

        Raises:
            MismatchError: If it does not; lists everything that is missing or does not fit.
            ConfigError: If the reader cannot undo how the bytes of an item were transformed.
        """
        missing, faults = item_faults(items, self.metadata)
        if missing or faults:
            Findings(tuple(missing), tuple(faults)).refuse(self._place.files.path)

    @abstractmethod
    def _load_tensors(self, wanted: Sequence[Wanted], reading: Reading) -> None:
        """Read parts of tensors into their targets; calls `reading.run` exactly once."""

    def _read_objects(self, items: Sequence[ReadItem]) -> list[tuple[ReadItem, Any]]:
        assert not items
        return []

    def read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """Read the items of a plan.

        Raises:
            CheckpointError: If an item cannot be read, or must not be loaded.
        """
        with self._inputs, Reading(self._options.group) as reading:
            objects = self._read_objects(
                [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
            )
            tensors = [item for item in plan.items if item.type == LoadItemType.TENSOR]
            steps = [tensors]
            is_own = gives_own_tensors(planner)
            if is_own and self._options.group is None:
                steps = [[item] for item in tensors]
            for step in steps:
                wanted = [Wanted(item, _resolved(planner, item)) for item in step]
                if is_own:
                    _check_distinct(wanted, planner)
                self._load_tensors(wanted, reading)
                for one in wanted:
                    planner.commit_tensor(one.item, one.target)
        for item, data in objects:
            planner.load_bytes(item, data)

    def close(self) -> None:
        """Close the open files of a load that ends before it reads."""
        self._inputs.close()

    def _verify(self, fetches: Sequence[Fetch], **others: Collection[str]) -> None:
        if self._options.is_verified:
            # `find_place` refuses a verified load that has no manifest.
            assert self._place.manifest is not None
            verify_ranges(self._place, self._place.manifest, fetches, **others)


def _check_distinct(wanted: Sequence[Wanted], planner: LoadPlanner) -> None:
    """Check that a planner that gives its own tensors did not give one for several items."""
    there: dict[tuple[int, int], Wanted] = {}
    for one in wanted:
        if one.target.numel():
            first = there.setdefault((one.target.data_ptr(), one.target.numel()), one)
            if first is not one:
                raise ConfigError(
                    "an exchange fills all tensors at once, but the planner gives one buffer for "
                    "several items",
                    phase="read",
                    fqn=one.item.dest_index.fqn,
                    expected="a tensor for each item",
                    found=f"the tensor of {first.item.dest_index.fqn!r} again, from "
                    f"{type(planner).__name__}",
                    hint="leave out exchange=True",
                )


def _resolved(planner: LoadPlanner, item: ReadItem) -> torch.Tensor:
    target = planner.resolve_tensor(item).detach()
    if target.shape != item.lengths:
        raise MismatchError(
            "the planner returns a tensor of the wrong shape for an item",
            phase="read",
            fqn=item.dest_index.fqn,
            expected=f"shape {list(item.lengths)}",
            found=f"shape {list(target.shape)}",
        )
    return target


class DCPLoad(Load):
    """A load from the DCP half."""

    def __init__(self, place: CheckpointPlace, options: LoadOptions, *, rank: int | None) -> None:
        """Read the metadata.

        Args:
            place: Where the checkpoint is.
            options: The options of the reader.
            rank: Read the metadata that this rank saved without collectives; `None` reads that of
                the whole checkpoint.

        Raises:
            ReadError: If there is no metadata, or it cannot be read.
            CorruptCheckpointError: If it is not valid DCP metadata.
        """
        super().__init__(place, OpenInputs(place.files), options)
        self.metadata = read_dcp_metadata(place.files, rank)
        if self.metadata.storage_meta is None:
            self.metadata.storage_meta = StorageMeta()
        self.metadata.storage_meta.load_id = options.load_id
        if self.metadata.planner_data is None:
            # A planner that does not flatten writes none, and torch's keyed loads need it.
            self.metadata.planner_data = paths_of_fqns(self.metadata.state_dict_metadata)
        self._source = DCPSource(self._inputs, self.metadata, options.transforms)

    def check(self, planner: LoadPlanner, given: Mapping[str, Any]) -> None:
        """Check that what is loaded is there; see `Load.check`."""
        missing, faults = misfits(planner, given, self.metadata)
        if missing or faults:
            mismatched = (f"{fqn} ({fault})" for fqn, fault in faults.items())
            Findings(tuple(missing), tuple(mismatched)).refuse(self._place.files.path)

    def check_items(self, items: Sequence[ReadItem]) -> None:
        """Check that the checkpoint holds every item of a plan; see `Load.check_items`."""
        super().check_items(items)
        self._source.check_transforms(items)

    def _read_objects(self, items: Sequence[ReadItem]) -> list[tuple[ReadItem, Any]]:
        allow = self._options.allow_pickled_objects
        files = {self._source.file_of(item) for item in items}
        self._verify((), whole=(METADATA_NAME,), objects_in=files)
        found = self._source.read_objects(items, allow_pickled_objects=allow)
        return list(zip(items, found, strict=True))

    def _load_tensors(self, wanted: Sequence[Wanted], reading: Reading) -> None:
        fetches, whole, expected = self._source.guessed_fetches(wanted)
        self._verify([*fetches, *map(fetch_of_archive, whole)])
        targets = [one.target for one in wanted]
        differing = reading.run(self._inputs, plan_reads(fetches, expected), targets)
        if differing:
            wrong = {wanted[number].item.storage_index for number in differing}
            again = [one for one in wanted if one.item.storage_index in wrong]
            fetches, unusual = self._source.fetches(again)
            run_reads(self._inputs, plan_reads(fetches), [one.target for one in again])
            whole += unusual
        for read in whole:
            self._source.load_whole(read)


class HFLoad(Load):
    """A load from a HuggingFace directory, through specs."""

    def __init__(
        self, place: CheckpointPlace, options: LoadOptions, *, state_dict: Mapping[str, Any] | None
    ) -> None:
        """Read index and headers, and describe the stored tensors as runtime tensors.

        Args:
            place: Where the directory is.
            options: The options of the reader.
            state_dict: The state dict to load into: it shows which entry holds the model. `None` if
                it is unknown.

        Raises:
            ReadError: If there are no weights, or they cannot be read.
            CorruptCheckpointError: If headers or index are damaged.
            PlanningError: If it is not clear which entry is the model.
        """
        tensors = {} if state_dict is None else flat_tensors(state_dict)
        paths = {fqn: path for fqn, (path, _) in tensors.items()}
        prefix, unclear = _model_prefix(paths, options.key)
        self._start = "".join(f"{part}." for part in prefix)
        in_model = {} if unclear is not None else names_in_model(paths, prefix)
        in_model = unwrapped_names(in_model, options.specs.keys())
        names = set(in_model.values())
        self._source, inputs = open_hf_source(place, options.specs, names=names)
        super().__init__(place, inputs, options)
        self._name_of = {f"{self._start}{name}": name for name in self._source.names()}
        # Wrappers, and the parts of a pipeline, have other FQNs.
        stored = frozenset(self._name_of.values())
        self._name_of |= {fqn: name for fqn, name in in_model.items() if name in stored}
        if options.key is None and not self._name_of.keys() & in_model.keys():
            # torch's writer of such directories knows no entries: its names are the FQNs.
            self._name_of |= {fqn: fqn for fqn in tensors if fqn in stored}
        if unclear is not None and not self._name_of.keys() >= tensors.keys():
            inputs.close()
            raise unclear
        self._name_of |= self._tied_in_memory({fqn: tensors[fqn][1] for fqn in in_model})
        self.metadata = Metadata(
            {fqn: self._entry(name) for fqn, name in self._name_of.items()},
            planner_data=paths_of_fqns(self._name_of),
            storage_data={},
            storage_meta=StorageMeta(load_id=options.load_id),
        )

    def _tied_in_memory(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Find tensors that are not stored, but share their memory with a tensor that is."""
        there: dict[Any, str] = {}
        found: dict[str, str] = {}
        if tensors.keys() <= self._name_of.keys():
            return found
        for fqn, tensor in tensors.items():
            if fqn in self._name_of:
                there[memory_identity(tensor)] = self._name_of[fqn]
        for fqn, tensor in tensors.items():
            identity = memory_identity(tensor)
            if fqn not in self._name_of and identity is not None and identity in there:
                found[fqn] = there[identity]
        return found

    def _entry(self, name: str) -> TensorStorageMetadata:
        shape, dtype = self._source.kind(name)
        size = torch.Size(shape)
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
        return TensorStorageMetadata(TensorProperties(dtype), size, [chunk])

    def check(self, planner: LoadPlanner, given: Mapping[str, Any]) -> None:
        """Check that what is loaded is there; see `Load.check`."""
        missing, faults = misfits(planner, given, self.metadata)
        values = loaded_values(planner, given)
        # A planner that loads through tensors of its own casts as it likes.
        compared = {} if gives_own_tensors(planner) else values
        for fqn, value in compared.items():
            if isinstance(value, torch.Tensor) and fqn in self._name_of and fqn not in faults:
                fault = self._source.fault(self._name_of[fqn], tuple(value.shape), value.dtype)
                if fault is not None:
                    faults[fqn] = fault
        if not missing and not faults:
            self._refuse_drifted_ties(values)
            return
        taken = {
            key
            for fqn in values
            if fqn in self._name_of
            for key in self._source.keys_of(self._name_of[fqn])
        }
        Findings(
            tuple(missing),
            tuple(f"{fqn} ({fault})" for fqn, fault in faults.items()),
            tuple(self._source.stored.keys() - taken),
        ).refuse(self._place.weights.path, entry=self._start, hint=_HINT)

    def _refuse_drifted_ties(self, values: Mapping[str, Any]) -> None:
        groups: dict[Any, list[str]] = {}
        for fqn, value in values.items():
            identity = memory_identity(value) if isinstance(value, torch.Tensor) else None
            if identity is not None and fqn in self._name_of:
                groups.setdefault(identity, []).append(fqn)
        tied = [[self._name_of[fqn] for fqn in group] for group in groups.values()]
        dtypes = {self._name_of[fqn]: values[fqn].dtype for one in groups.values() for fqn in one}
        refuse_drifted_ties(self._place, self._source, self._inputs, tied, dtypes)

    def check_items(self, items: Sequence[ReadItem]) -> None:
        """Check that the directory holds every item of a plan; see `Load.check_items`."""
        super().check_items(items)
        objects = {item.storage_index.fqn for item in items if item.type == LoadItemType.BYTE_IO}
        if objects:
            faults = (f"{fqn} (read as an object, stored as a tensor)" for fqn in sorted(objects))
            Findings(mismatched=tuple(faults)).refuse(self._place.weights.path)

    def _check_dtypes(self, wanted: Sequence[Wanted]) -> None:
        faults: dict[str, str] = {}
        for one in wanted:
            fqn, dtype = one.item.storage_index.fqn, one.target.dtype
            shape, stored = self._source.kind(self._name_of[fqn])
            fault = None
            if dtype != stored:
                fault = self._source.fault(self._name_of[fqn], shape, dtype)
            if fault is not None:
                faults[fqn] = fault
        if faults:
            texts = tuple(f"{fqn} ({fault})" for fqn, fault in faults.items())
            Findings(mismatched=texts).refuse(self._place.weights.path)

    def _load_tensors(self, wanted: Sequence[Wanted], reading: Reading) -> None:
        self._check_dtypes(wanted)
        blocks = {}
        for one in wanted:
            item = one.item
            name = self._name_of[item.storage_index.fqn]
            box = Box(tuple(item.storage_offsets), tuple(item.lengths))
            # Tied tensors share one memory: fill it once.
            where = (name, box, one.target.data_ptr(), one.target.stride(), one.target.dtype)
            blocks[where] = WantedBlock(name, box, one.target)
        load_blocks(
            self._place,
            self._source,
            self._inputs,
            list(blocks.values()),
            is_verified=self._options.is_verified,
            reading=reading,
        )


def _model_prefix(paths: Mapping[str, Path], key: str | None) -> tuple[Path, ModelKeyError | None]:
    """Return the path of the model's entry, or why it is unclear which entry that is."""
    if not paths:
        return (() if key is None else (key,)), None
    try:
        return model_prefix(paths, key=key), None
    except ModelKeyError as error:
        if key is not None:
            raise
        return (), error


_HINT = (
    "a HuggingFace directory holds only the model, so load {'model': ...} from it; if names differ "
    "or are tied, pass specs=[LoadSpec(...)], with alias_of for tied names"
)
