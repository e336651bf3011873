"""HFDualReader: `dcp.load` reads either half of a checkpoint through it. Wiring only."""

from __future__ import annotations

import logging
import re
import threading
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dcp_hf_writer.errors import CheckpointError, ConfigError, ReadError
from dcp_hf_writer.load.choose_half import find_place
from dcp_hf_writer.load.mismatches import check_blocks
from dcp_hf_writer.load.planned_items import has_methods_of, plans_all, plans_alone
from dcp_hf_writer.load.run_load import DCPLoad, HFLoad, Load, LoadOptions
from dcp_hf_writer.mapping.flattening import flat_tensors
from dcp_hf_writer.mapping.hf_export import specs_by_name
from dcp_hf_writer.mapping.option_values import check_flag, check_text, check_word
from dcp_hf_writer.preflight.check_placements import refuse_partial
from dcp_hf_writer.storage.open_directory import is_readable
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.torch_seam.caller_frames import TorchLoad, find_load, other_planner, unknown_load
from dcp_hf_writer.torch_seam.keyed_loads import keys_without_values
from dcp_hf_writer.torch_seam.stream_transforms import StreamTransforms

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    import torch.distributed as dist
    from torch.distributed.checkpoint._extension import ExtensionRegistry
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

    from dcp_hf_writer.load.choose_half import SourceName
    from dcp_hf_writer.mapping.load_spec import LoadSpec

_log = logging.getLogger(__name__)

# Metadata files that torch writes, one for each rank, when it saves without collectives.
_RANK_METADATA = re.compile(r"__\d+\.metadata")


class HFDualReader(StorageReader):
    """Reads a checkpoint into a state dict, sharded in any way, on any number of ranks.

        dcp.load(state_dict, storage_reader=HFDualReader("ckpt/step-100"))

    It reads the DCP half of a checkpoint of `HFDualWriter`, weights that are stored once included,
    and any checkpoint of torch's own writer. It also reads any HuggingFace directory, from
    `HFDualWriter` or from a hub; `specs` then map its tensors to the parameters.

    Each rank reads only its own bytes. They go straight into its tensors if these are contiguous
    and have the stored dtype. If a target has another dtype, floats are cast.

    Unless `allow_pickled_objects` is set, the reader runs no code that a checkpoint names. It reads
    no file outside the checkpoint. Before it reads any tensor, it refuses a checkpoint that does
    not fit, with one error that lists every mismatch. An error during reading leaves the state dict
    partly loaded.

    Thread safety: several threads may load through one reader at the same time.
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
        _extension_registry: ExtensionRegistry | None = None,
    ) -> None:
        """Set up a reader. Reads no file.

        Args:
            path: A checkpoint or a HuggingFace directory, as a local path or an fsspec URL. In a
                HuggingFace directory, `path` may also name the one safetensors file or index to
                read.
            specs: For `source="hf"`, they map runtime tensors to HuggingFace tensors. For both
                sources, they say which plain tensors are shards.
            source: `"dcp"` reads the DCP half. `"hf"` reads a HuggingFace directory: `path` itself,
                or the export within it. `"auto"` reads the DCP half if there is one, else the
                HuggingFace directory.
            verify: Compare the bytes with the digests of the manifest before loading any of them.
                This reads whole blocks.
            key: Entry of the state dict that holds the model, with dots between nested entries. For
                `source="hf"` only; `None` searches for the entry, as `HFExport` does.
            process_group: Group for `exchange`: a gloo group that nothing else uses, neither the
                load itself nor a second load at the same time. Its ranks are all ranks of the load,
                or those of one host.
            exchange: If several ranks of `process_group` need the same bytes, one rank reads them
                and sends them to the others. Use it if storage is slower than the network.
            allow_pickled_objects: Load objects of any class from the DCP half. This runs code that
                the checkpoint names. `False` loads only plain values, tensors, and objects of the
                standard library and numpy that hold data, and what `torch.load(weights_only=True)`
                loads.
            storage_options: Options for fsspec, if `path` is a URL.
            _extension_registry: The extensions that undo what `FileSystemWriter(_extensions=...)`
                did to the bytes, as torch's `FileSystemReader` takes them. `None` knows torch's
                own, `ZStandard`.

        Raises:
            ConfigError: If an option cannot be used as given.
        """
        super().__init__()
        check_word("source", source, ("auto", "dcp", "hf"))
        self.path = plain_path(path)
        check_flag("verify", verify)
        check_flag("exchange", exchange)
        check_flag("allow_pickled_objects", allow_pickled_objects)
        if key is not None:
            check_text("key", key)
        self.source = source
        self.verify = verify
        self._storage_options = storage_options
        if process_group is not None and not exchange:
            raise ConfigError(
                "process_group is the group of an exchange, and there is none",
                expected="exchange=True, or no process_group",
                found="exchange=False",
                hint="pass the process group of the load to dcp.load(process_group=...)",
            )
        if exchange and process_group is None:
            raise ConfigError(
                "exchange=True needs a process_group, whose ranks exchange what they read",
                expected='process_group=dist.new_group(backend="gloo")',
                found="None",
            )
        self._options = LoadOptions(
            specs=specs_by_name(specs),
            key=key,
            is_verified=verify,
            allow_pickled_objects=allow_pickled_objects,
            group=process_group,
            load_id=str(uuid.uuid4()),
            transforms=StreamTransforms(_extension_registry),
        )
        # torch runs one load in one thread; other threads may run other loads at the same time.
        self._thread = threading.local()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget the last load of this thread, and take `checkpoint_id` as the path of the next."""
        self._forget()
        self._thread.storage_data = {}
        self._thread.load_id = str(uuid.uuid4())
        if checkpoint_id is not None:
            self._thread.path = plain_path(checkpoint_id)

    @property
    def checkpoint_id(self) -> str:
        """Path that loads in this thread read."""
        path: str = getattr(self._thread, "path", self.path)
        return path

    @property
    def load_id(self) -> str:
        """Id of the loads in this thread, until `reset`."""
        found: str = getattr(self._thread, "load_id", self._options.load_id)
        return found

    @property
    def storage_data(self) -> dict[Any, Any]:
        """Where the items of the last load in this thread are stored, by `MetadataIndex`.

        Empty before the first load, after `reset`, and for a HuggingFace directory.
        """
        found: dict[Any, Any] = getattr(self._thread, "storage_data", {})
        return found

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether readers can read from such a place: a local path, or a URL that fsspec supports.

        It does not look whether there is a checkpoint.
        """
        return is_readable(checkpoint_id)

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        """Read the metadata that the planner needs. torch calls this method first.

        Args:
            **kwargs: With `rank`, read the metadata that this rank saved without collectives.

        Raises:
            CheckpointError: If there is no checkpoint, or if it cannot be trusted. `dcp.load` would
                lose the type of this error, so within it `set_up_storage_reader` raises the error.
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
        options = replace(self._options, load_id=self.load_id)
        if place.subdir is None:
            return DCPLoad(place, options, rank=rank)
        return HFLoad(place, options, state_dict=state_dict)

    def set_up_storage_reader(
        self,
        metadata: Metadata,  # noqa: ARG002 - `read_metadata` has returned it
        is_coordinator: bool,  # noqa: ARG002, FBT001 - torch's
        *_: Any,
        **__: Any,
    ) -> None:
        """Check that the checkpoint holds everything that the planner loads.

        A planner that plans in its own way may leave out what does not fit. For such a planner,
        `prepare_local_plan` checks the plan, before anything is read.

        Raises:
            UnsupportedTorchError: If torch's load, or its planner, cannot be found.
            MismatchError: If something is missing or does not fit; lists all of it.
            PlanningError: If a DTensor to load into has a `Partial` placement.
            CheckpointError: The error that `read_metadata` met.
        """
        failed = getattr(self._thread, "failed", None)
        if failed is not None:
            raise failed
        load, planner, given = self._current(), self._torch_load().planner, self._torch_load().given
        refuse_partial({fqn: one for fqn, (_, one) in flat_tensors(given).items()}, phase="read")
        if plans_all(planner):
            load.check(planner, given)
        lost = keys_without_values(planner, load.metadata)
        if lost:
            _log.warning("%s holds nothing under the keys %s", self.checkpoint_id, lost)
        self._thread.storage_data = load.metadata.storage_data or {}
        self._thread.checked = {"set_up_storage_reader"}

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Check that the plan treats the blocks of a tensor one by one.

        torch sends each plan to the coordinator and back, which takes longer with every rank. If
        neither the planner nor a subclass of this reader looks at these plans, this rank keeps the
        items and sends an empty plan.

        Returns:
            The plan, or the plan without its items.

        Raises:
            PlanningError: If a rank holds several blocks of a tensor, but the plan joins them.
            MismatchError: If the checkpoint lacks what is planned; lists all of it.
            ConfigError: If the reader cannot undo how the bytes of an item were transformed.
        """
        planner, given = self._torch_load().planner, self._torch_load().given
        self._current().check_items(plan.items)
        check_blocks(plan, planner, given, self._options.specs, key=self._options.key)
        self._thread.checked.add("prepare_local_plan")
        steps = ("prepare_local_plan", "prepare_global_plan", "read_data")
        if not plans_alone(planner) or not has_methods_of(HFDualReader, self, *steps):
            return plan
        self._thread.items = plan.items
        return replace(plan, items=[])

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of a plan; the tensors are loaded on return.

        Raises:
            ConfigError: If a subclass has skipped the checks.
            CheckpointError: If an item cannot be read, or must not be loaded.
        """
        load = self._current()
        if self._torch_load().planner is not planner:
            raise other_planner("load")
        skipped = {"set_up_storage_reader", "prepare_local_plan"} - self._thread.checked
        if skipped:
            raise ConfigError(
                "the checks of this load were skipped",
                phase="read",
                expected=f"calls of HFDualReader.{' and '.join(sorted(skipped))} before read_data",
                found=f"a {type(self).__name__} that does not make them",
                hint="call the method of HFDualReader in the method that replaces it",
            )
        items = getattr(self._thread, "items", None)
        if items is not None:
            plan = replace(plan, items=items)
        else:
            load.check_items(plan.items)
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
                "the reader has no load in flight in this thread",
                expected="a call of read_metadata in the same thread first, as in dcp.load",
                found="none",
                hint="load through dcp.load",
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
        self._thread.checked = set()
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
