"""Resume: find the newest checkpoint that is good and load it on all ranks; else an older one."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load

from dcp_hf_writer.check.verify import verify
from dcp_hf_writer.errors import (
    CheckpointError,
    CorruptCheckpointError,
    MismatchError,
    PickledObjectError,
    ReadError,
)
from dcp_hf_writer.load.choose_half import read_dcp_metadata
from dcp_hf_writer.manager import trainer_state
from dcp_hf_writer.manager.rank_messages import sendable_error
from dcp_hf_writer.mapping.model_entry import NOT_WEIGHTS
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.torch_seam.future_guard import own_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch.distributed as dist
    from torch.distributed.checkpoint.planner import LoadPlanner
    from torch.distributed.checkpoint.storage import StorageReader

    from dcp_hf_writer.manager.rank_messages import Messages, World
    from dcp_hf_writer.manager.run_storage import Address, StoredStep
    from dcp_hf_writer.storage.input_contract import InputFiles

_log = logging.getLogger(__name__)

OPTIMIZER_ENTRIES = frozenset(
    {"optim", "optimizer", "optimizers", "optimizer_state", "optim_state"}
)
"""Entries of a state dict that `load_optimizer=False` leaves alone."""

_T = TypeVar("_T")

_TRAIN_STATE_FILES = ("train_state.json", "sft_train_state.json")


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore loaded."""

    step: int
    """Step of the checkpoint."""
    path: str
    """Path of the checkpoint."""
    trainer_state: Mapping[str, Any] = field(default_factory=dict)
    """JSON value of the run, as it was given to the manager that saved."""
    objects: tuple[str, ...] = ()
    """Names of the objects of this rank that were restored."""
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that were not loaded, each with the reason."""


@dataclass(frozen=True)
class RestoreOptions:
    """How to restore."""

    load_optimizer: bool
    strict: bool
    skipped_objects: frozenset[str]
    """Names of objects that stay as they are."""
    merge: Mapping[str, Callable[[Sequence[Any], int, int], Any]]
    allow_pickled_objects: bool
    planner: LoadPlanner | None


@dataclass(frozen=True)
class RestoreTools:
    """What a restore needs from the manager."""

    messages: Messages
    group: dist.ProcessGroup | None
    reader: Callable[[str, str], StorageReader]
    """Makes the reader of a path and a source, `"dcp"`, `"hf"` or `"auto"`."""
    timeout_s: float
    address: Callable[[str], Address]
    """Says how to reach a path of the run."""

    @property
    def world(self) -> World:
        """The ranks."""
        return self.messages.world

    def open(self, path: str) -> InputFiles:
        """Return the files below a path of the run."""
        return open_directory(*self.address(path))


class Restore:
    """One restore on one rank; all ranks run it together."""

    def __init__(self, key: str, tools: RestoreTools, options: RestoreOptions) -> None:
        """Prepare a restore.

        Args:
            key: Prefix of its messages; the same on every rank, and used once.
            tools: What the manager provides.
            options: How to restore.
        """
        self._key, self._tools, self._options = key, tools, options
        self._skipped: list[str] = []

    def run(
        self,
        candidates: Callable[[], Sequence[StoredStep]],
        state_dict: dict[str, Any],
        objects: Mapping[str, Any],
    ) -> Restored | None:
        """Load the newest candidate that is good; returns `None` if there is no candidate.

        Args:
            candidates: Finds the whole checkpoints, oldest first, and the broken ones among them;
                called on the coordinator.
            state_dict: Loaded in place.
            objects: Objects of this rank, by name; each gets its state back.

        Raises:
            CorruptCheckpointError: If there are checkpoints, and none can be loaded.
            CheckpointError: If the newest good one does not fit what is to be loaded, or the
                storage cannot be listed.
        """
        number = 0
        for number, stored in enumerate(self._shared(candidates), 1):
            problem: BaseException | str | None = stored.problem
            restored = None
            if stored.facts is not None:
                restored, problem = self._tried(stored, number, state_dict, objects)
            if restored is not None:
                return restored
            self._skip(stored.path, problem)
        if number == 0:
            return None
        raise CorruptCheckpointError(
            "no checkpoint of the run can be loaded",
            phase="read",
            found="; ".join(self._skipped),
            hint="look at them with verify(path); to start anew, move them away",
        )

    def _skip(self, path: str, problem: object) -> None:
        self._skipped.append(f"{path}: {problem}")
        if self._tools.world.is_coordinator:
            _log.warning("not resuming from %s: %s", path, problem)

    def _shared(self, candidates: Callable[[], Sequence[StoredStep]]) -> list[StoredStep]:
        """Return the coordinator's candidates on every rank, newest first."""
        tools, key = self._tools, f"{self._key}/candidates"
        if tools.world.is_alone:
            return list(candidates())[::-1]
        if tools.world.is_coordinator:
            try:
                tools.messages.put(key, list(candidates())[::-1])
            except CheckpointError as error:
                tools.messages.put(key, error)
        found = tools.messages.take_from_coordinator(key, timeout_s=tools.timeout_s, doing="read")
        if isinstance(found, CheckpointError):
            raise found
        return list(found)

    def _tried(
        self,
        stored: StoredStep,
        number: int,
        state_dict: dict[str, Any],
        objects: Mapping[str, Any],
    ) -> tuple[Restored | None, BaseException | None]:
        """Load one checkpoint on all ranks; the outcome is the same on each.

        Raises:
            CheckpointError: If another checkpoint would not help.
        """
        # Without the first agreement, an error on one rank would leave the others waiting in a
        # collective of the load.
        key, path = f"{self._key}/{number}", stored.path
        ranks, error = self._together(
            lambda: self._ranks_to_load(stored, objects), f"{key}/look", path
        )
        if error is not None:
            return None, error
        return self._together(
            lambda: self._load(stored, state_dict, objects, ranks), f"{key}/load", path
        )

    def _together(
        self, act: Callable[[], _T], key: str, path: str
    ) -> tuple[_T | None, CheckpointError | None]:
        """Do a part of the load on all ranks; if it fails on one, it fails on all.

        Returns:
            The result, or the error if an older checkpoint may be loaded instead.

        Raises:
            CheckpointError: If another checkpoint would not help.
        """
        result: _T | None = None
        error: BaseException | None = None
        try:
            result = act()
        except (Exception, CheckpointException) as problem:  # noqa: BLE001 - all ranks agree on it
            error = own_error(problem) or problem
        error = self._agreed(error, key, path)
        if isinstance(error, (CorruptCheckpointError, ReadError)):
            return None, error
        if error is not None:
            raise error
        return result, None

    def _ranks_to_load(
        self, stored: StoredStep, objects: Mapping[str, Any]
    ) -> dict[str, list[int]] | None:
        """Return whose objects this rank loads; `None` if the manager did not write them."""
        facts = stored.facts
        if facts is None or facts.kind in {"parts", "hf"}:
            return None
        there = read_dcp_metadata(self._tools.open(stored.path)).state_dict_metadata
        return trainer_state.ranks_to_load(
            [name for name in objects if name not in self._options.skipped_objects],
            trainer_state.stored_objects(there),
            rank=self._tools.world.rank,
            world_size=self._tools.world.size,
            merge=self._options.merge,
            strict=self._options.strict and trainer_state.run_key() in there,
        )

    def _agreed(self, error: BaseException | None, key: str, path: str) -> BaseException | None:
        """Return the first error of any rank, so that all ranks go on alike."""
        tools = self._tools
        if tools.world.is_alone:
            return _as_damage(error, tools.address(path))
        own = sendable_error(error, otherwise=CheckpointError)
        tools.messages.put(f"{key}/result/{tools.world.rank}", own)
        if tools.world.is_coordinator:
            errors = []
            for rank in range(tools.world.size):
                name = f"{key}/result/{rank}"
                errors.append(
                    tools.messages.take(
                        name, timeout_s=tools.timeout_s, sender=f"rank {rank}", doing="read"
                    )
                )
                tools.messages.drop(name)
            first = _as_damage(
                next((one for one in errors if one is not None), None), tools.address(path)
            )
            tools.messages.put(f"{key}/verdict", first)
        verdict = tools.messages.take_from_coordinator(
            f"{key}/verdict", timeout_s=tools.timeout_s, doing="read"
        )
        assert verdict is None or isinstance(verdict, BaseException)
        return verdict

    def _load(
        self,
        stored: StoredStep,
        state_dict: dict[str, Any],
        objects: Mapping[str, Any],
        ranks: dict[str, list[int]] | None,
    ) -> Restored:
        facts = stored.facts
        assert facts is not None
        wanted = {name: one for name, one in state_dict.items() if self._is_wanted(name)}
        if facts.kind == "parts":
            self._load_parts(stored, wanted)
            state_dict.update(wanted)
            return self._restored(stored, _train_state_beside(self._tools.open(stored.path)), ())
        if facts.kind == "hf":
            self._load_export(stored, wanted)
            state_dict.update(wanted)
            return self._restored(stored, {}, ())
        return self._load_whole(stored, state_dict, wanted, objects, ranks or {})

    def _load_whole(
        self,
        stored: StoredStep,
        state_dict: dict[str, Any],
        wanted: dict[str, Any],
        objects: Mapping[str, Any],
        ranks: dict[str, list[int]],
    ) -> Restored:
        there = read_dcp_metadata(self._tools.open(stored.path)).state_dict_metadata
        extra = trainer_state.template(ranks, with_run=trainer_state.run_key() in there)
        loaded = {**wanted, **extra}
        self._dcp_load(loaded, stored.path, "dcp")
        run = trainer_state.loaded_run(loaded) or {}
        # Decode all states before setting any: a bad one must not leave half of them restored.
        states = {name: self._state(loaded, name, ranks[name]) for name in ranks}
        state_dict.update({name: loaded[name] for name in wanted})
        for name, state in states.items():
            objects[name].load_state_dict(state)
        if trainer_state.RNG_NAME in objects and trainer_state.RNG_NAME not in states:
            _log.warning("the states of the random number generators were not restored")
        return self._restored(stored, run.get("user", {}), tuple(states))

    def _state(self, loaded: Mapping[str, Any], name: str, ranks: Sequence[int]) -> Any:
        options, world = self._options, self._tools.world
        states = [
            trainer_state.loaded_object(
                loaded, name, rank, allow_pickled_objects=options.allow_pickled_objects
            )
            for rank in ranks
        ]
        if ranks == [world.rank]:
            return states[0]
        return options.merge[name](states, world.rank, world.size)

    def _restored(
        self, stored: StoredStep, run: Mapping[str, Any], objects: tuple[str, ...]
    ) -> Restored:
        return Restored(stored.step, stored.path, run, objects, tuple(self._skipped))

    def _is_wanted(self, name: str) -> bool:
        return self._options.load_optimizer or name not in OPTIMIZER_ENTRIES

    def _dcp_load(self, state_dict: dict[str, Any], path: str, source: str) -> None:
        planner = self._options.planner
        if planner is None and not self._options.strict:
            planner = DefaultLoadPlanner(allow_partial_load=True)
        load(
            state_dict,
            storage_reader=self._tools.reader(path, source),
            planner=planner,
            process_group=self._tools.group,
        )

    def _load_export(self, stored: StoredStep, wanted: dict[str, Any]) -> None:
        """Load the weights from a directory that holds nothing but an export."""
        others = sorted(set(wanted) & NOT_WEIGHTS)
        if others and self._options.load_optimizer and self._options.strict:
            raise MismatchError(
                "the checkpoint is a HuggingFace directory, which holds weights only",
                path=stored.path,
                found=f"the state dict also has {others}",
                hint="pass load_optimizer=False to load the weights alone",
            )
        weights = {name: one for name, one in wanted.items() if name not in NOT_WEIGHTS}
        self._dcp_load(weights, stored.path, "hf")
        wanted.update(weights)

    def _load_parts(self, stored: StoredStep, wanted: dict[str, Any]) -> None:
        """Load entries that another trainer saved apart, each into a subdirectory of its own."""
        assert stored.facts is not None
        missing = set(wanted)
        for part in stored.facts.parts:
            path = os.path.join(stored.path, part)
            there = read_dcp_metadata(self._tools.open(path)).state_dict_metadata
            for name in sorted(missing):
                if any(fqn == name or fqn.startswith(f"{name}.") for fqn in there):
                    one = {name: wanted[name]}
                    self._dcp_load(one, path, "dcp")
                    wanted[name] = one[name]
                elif isinstance(wanted[name], Mapping) and _is_bare(wanted[name], there):
                    bare = dict(wanted[name])
                    self._dcp_load(bare, path, "dcp")
                    wanted[name] = bare
                else:
                    continue
                missing.discard(name)
        if missing and self._options.strict:
            raise MismatchError(
                "no subdirectory of the checkpoint holds an entry of the state dict",
                path=stored.path,
                expected=f"entries {sorted(missing)}",
                found=f"subdirectories {list(stored.facts.parts)}",
                hint="leave these entries out of the state dict, or pass strict=False",
            )


def _as_damage(error: BaseException | None, address: Address) -> BaseException | None:
    """Return the damage that `verify` finds, if an error may come from damaged data.

    Zeros where an object should be look like an object that nobody knows.
    """
    if error is None or (
        isinstance(error, CheckpointError) and not isinstance(error, PickledObjectError)
    ):
        return error
    report = verify(address.place, progress=False, storage_options=address.storage_options)
    if report.checked == "digests" and not report.ok:
        try:
            report.raise_if_bad()
        except CorruptCheckpointError as damage:
            return damage
    return error


def _is_bare(entry: Mapping[str, Any], there: Iterable[str]) -> bool:
    """Whether a part holds the content of an entry without the name of the entry."""
    heads = {fqn.partition(".")[0] for fqn in there}
    keys = {str(key).partition(".")[0] for key in entry}
    return bool(keys) and keys <= heads


def _train_state_beside(files: InputFiles) -> dict[str, Any]:
    for name in _TRAIN_STATE_FILES:
        if files.has(name):
            try:
                value = json.loads(files.read_whole(name, max_nbytes=64 << 20))
            except ValueError as error:
                raise CorruptCheckpointError(
                    "the trainer state is damaged", path=f"{files.path}/{name}", found=str(error)
                ) from error
            return value if isinstance(value, dict) else {}
    return {}
