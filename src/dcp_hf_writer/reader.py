"""HFDualReader: a StorageReader for `dcp.load`, from either half of a checkpoint. Wiring only."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dcp_hf_writer.errors import CheckpointError, ConfigError, ReadError
from dcp_hf_writer.load.choose_half import find_place
from dcp_hf_writer.load.mismatches import check_blocks, has_methods_of, plans_alone
from dcp_hf_writer.load.planned_load import DCPLoad, HFLoad, Load, LoadOptions
from dcp_hf_writer.mapping.hf_export import specs_by_name
from dcp_hf_writer.preflight.check_options import one_of
from dcp_hf_writer.torch_seam.frames import TorchLoad, find_load, other_planner, unknown_load

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch.distributed as dist
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

    from dcp_hf_writer.load.choose_half import SourceName
    from dcp_hf_writer.mapping.load_spec import LoadSpec

# What ranks write that save without collectives.
_RANK_METADATA = re.compile(r"__\d+\.metadata")


class HFDualReader(StorageReader):
    """Reads a checkpoint into a state dict, sharded in any way, on any number of ranks.

        dcp.load(state_dict, storage_reader=HFDualReader("ckpt/step-100"))

    The DCP half of a checkpoint of `HFDualWriter`, with weights that are stored once; any
    checkpoint that torch's own writer made; and any HuggingFace directory, ours or a hub's, into
    sharded parameters, as `specs` say what its tensors are called. Each rank reads only its own
    bytes, straight into its tensors where they are contiguous and of the stored dtype; floats are
    cast where the target has another dtype.

    Nothing that a checkpoint names is run, and no file outside of it is read. What does not fit is
    refused before anything is read, in one error that lists all of it; an error while reading
    leaves the state dict in part as it was.

    Thread safety: several threads may load through one reader at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        specs: Mapping[str, LoadSpec] | Iterable[LoadSpec] | None = None,
        source: SourceName = "auto",
        verify: bool = False,
        key: str | None = None,
        process_group: dist.ProcessGroup | None = None,
        exchange: bool = False,
        allow_pickled_objects: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Set up a reader; touches no storage.

        Args:
            path: A checkpoint or a HuggingFace directory, as a local path or an fsspec URL. Of
                the latter also a file: the one of its safetensors files, or the index, to take.
            specs: How runtime tensors stand for HuggingFace tensors, for `source="hf"`; which
                plain tensors are shards, for both.
            source: `"dcp"` is the DCP half, `"hf"` a HuggingFace directory: `path` itself or the
                export within it. `"auto"` is the DCP half where `path` has one, else the other.
            verify: Compare what is read with the digests of the manifest, before any of it is
                loaded. Whole blocks are read for it.
            key: Entry of the state dict that holds the model, dots for nested entries, for
                `source="hf"`; `None` finds it as `HFExport` does.
            process_group: Group whose ranks exchange what they read: a gloo group that nothing else
                uses, of all ranks of the load or of those of one host. Not that of the load, and
                one load at a time.
            exchange: Read what several ranks of `process_group` want once, and pass it on: for
                storage that is slower than the network between them.
            allow_pickled_objects: Load objects of any class from the DCP half, which runs what the
                checkpoint names. Otherwise only what `torch.load(weights_only=True)` takes.
            storage_options: Options of an fsspec URL.

        Raises:
            ConfigError: If an option cannot be used as given.
        """
        super().__init__()
        one_of("source", source, ("auto", "dcp", "hf"))
        self.path = os.fspath(path)
        self.source = source
        self.verify = verify
        self._storage_options = storage_options
        if exchange and process_group is None:
            raise ConfigError(
                "exchange needs a group of ranks to exchange with",
                expected='process_group=dist.new_group(backend="gloo")',
                found="None",
            )
        self._options = LoadOptions(
            specs=specs_by_name(specs),
            key=key,
            is_verified=verify,
            allow_pickled_objects=allow_pickled_objects,
            group=process_group if exchange else None,
        )
        # Torch runs a load from one thread, and may run others beside it.
        self._thread = threading.local()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take `checkpoint_id=` of a load as the path of loads in this thread."""
        self._forget()
        if checkpoint_id is not None:
            self._thread.path = os.fspath(checkpoint_id)

    @property
    def checkpoint_id(self) -> str:
        """Path that a load in this thread reads."""
        path: str = getattr(self._thread, "path", self.path)
        return path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this kind of reader can read there."""
        text = os.fspath(checkpoint_id)
        return isinstance(text, str) and bool(text) and "\0" not in text

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        """Describe what is there, for the planner; torch calls this first.

        Args:
            **kwargs: `rank`: read what that rank saved without collectives.

        Raises:
            CheckpointError: If there is no checkpoint, or one that cannot be trusted. Within
                `dcp.load`, which would drop its type, `set_up_storage_reader` raises it instead.
        """
        self._forget()
        rank = kwargs.get("rank")
        torch_load = self._thread.torch_load = find_load()
        try:
            load = self._begin(None if torch_load is None else torch_load.given, rank)
        except CheckpointError as error:
            if torch_load is None or (rank is None and self._has_rank_metadata()):
                raise
            self._thread.failed = error
            return Metadata({}, planner_data={}, storage_data={})
        self._thread.load = load
        return load.metadata

    def _begin(self, state_dict: Mapping[str, Any] | None, rank: int | None) -> Load:
        place = find_place(
            self.checkpoint_id,
            self.source if rank is None else "dcp",
            self._storage_options,
            with_manifest=self.verify,
        )
        if place.subdir is None:
            return DCPLoad(place, self._options, rank=rank)
        return HFLoad(place, self._options, state_dict=state_dict)

    def set_up_storage_reader(
        self,
        metadata: Metadata,  # noqa: ARG002 - of this load, as `read_metadata` returned it
        is_coordinator: bool,  # noqa: ARG002, FBT001 - torch's
        *_: Any,
        **__: Any,
    ) -> None:
        """Check that all that is loaded is there.

        Raises:
            UnsupportedTorchError: If the load, or its planner, cannot be found.
            MismatchError: Listing all that is not, or is something else.
            CheckpointError: What `read_metadata` found wrong.
        """
        failed = getattr(self._thread, "failed", None)
        if failed is not None:
            raise failed
        self._current().check(self._torch_load().planner, self._torch_load().given)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Check that blocks are planned as what they are.

        Returns:
            The plan without its items, if neither a planner nor a subclass looks at the plans of
            all ranks: torch would send each to the coordinator and back, which there takes longer
            with each rank.

        Raises:
            PlanningError: If a rank holds several blocks of a tensor that are planned as one.
        """
        planner, given = self._torch_load().planner, self._torch_load().given
        check_blocks(plan, planner, given, self._options.specs, key=self._options.key)
        steps = ("prepare_local_plan", "prepare_global_plan", "read_data")
        if not plans_alone(planner) or not has_methods_of(HFDualReader, self, *steps):
            return plan
        self._thread.items = plan.items
        return replace(plan, items=[])

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a plan says; it is in place on return.

        Raises:
            CheckpointError: If something cannot be read, or may not be.
        """
        load = self._current()
        if self._torch_load().planner is not planner:
            raise other_planner("load")
        items = getattr(self._thread, "items", None)
        if items is not None:
            plan = replace(plan, items=items)
        try:
            load.read(plan, planner)
        finally:
            self._forget()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _current(self) -> Load:
        load: Load | None = getattr(self._thread, "load", None)
        if load is None:
            raise ConfigError(
                "a reader is asked for data before it has read the metadata",
                expected="read_metadata in the same thread first, as dcp.load does",
            )
        return load

    def _torch_load(self) -> TorchLoad:
        found: TorchLoad | None = getattr(self._thread, "torch_load", None)
        if found is None:
            raise unknown_load()
        return found

    def _forget(self) -> None:
        load: Load | None = getattr(self._thread, "load", None)
        self._thread.load = self._thread.failed = self._thread.items = None
        self._thread.torch_load = None
        if load is not None:
            load.close()

    def _has_rank_metadata(self) -> bool:
        try:
            place = find_place(
                self.checkpoint_id, "dcp", self._storage_options, with_manifest=False
            )
            return any(_RANK_METADATA.fullmatch(name) for name in place.files.names())
        except (ReadError, ConfigError):
            return False
