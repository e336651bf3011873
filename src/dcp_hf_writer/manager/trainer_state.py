"""What a run saves beside the model: one JSON value of the run, and objects of each rank.

Both go into the state dict of the save, so they are part of the same commit. Each object is stored
under a key of its rank, so that every rank gets its own back.
"""

from __future__ import annotations

import io
import json
import random
from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer.errors import (
    ConfigError,
    CorruptCheckpointError,
    MismatchError,
    PickledObjectError,
    StagingError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

STATE_KEY = "dcp_hf_manager"
"""Entry of the state dict that the manager adds. It holds no tensors, so no export needs it."""
METRICS_KEY = "metrics"
"""Key of the metrics of the step in the JSON value of the run. They are part of the commit."""
RNG_NAME = "rng"
"""Name under which the manager keeps the states of the random number generators."""
DATASET_NAMES = frozenset({"dataloader", "dataset", "sampler"})
"""Names of objects that `load_dataset=False` leaves alone."""
SCHEDULER_NAMES = frozenset({"scheduler", "lr_scheduler"})
"""Names of objects that `load_scheduler=False` leaves alone."""

_RUN, _RANKS = "run", "ranks"
_RANK_DIGITS = 6


class RNGState:
    """The states of Python's, NumPy's and torch's random number generators in this process."""

    def state_dict(self) -> dict[str, Any]:
        """Return the states as plain values and tensors."""
        version, words, gauss = random.getstate()
        state: dict[str, Any] = {
            "python": [version, list(words), gauss],
            "torch": torch.get_rng_state(),
        }
        numpy = _numpy()
        if numpy is not None:
            name, keys, *rest = numpy.random.get_state()
            state["numpy"] = [name, keys.tolist(), *rest]
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the generators to states that `state_dict` returned."""
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        torch.set_rng_state(state["torch"])
        numpy = _numpy()
        if "numpy" in state and numpy is not None:
            name, keys, *rest = state["numpy"]
            numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


def _numpy() -> Any:
    # torch works without NumPy, and so does this package.
    try:
        import numpy as np  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return np


def with_trainer_state(
    state_dict: Mapping[str, Any],
    *,
    run: Mapping[str, Any],
    objects: Mapping[str, Any],
    rank: int,
) -> dict[str, Any]:
    """Return a state dict with the trainer state of this rank added.

    Args:
        state_dict: The state dict of the trainer; not changed.
        run: JSON value of the run; only the value of rank 0 is stored.
        objects: Objects with a `state_dict` method, by name.
        rank: This rank.

    Raises:
        ConfigError: If the state dict already has the entry of the manager, or `run` is no JSON.
        StagingError: If the state of an object cannot be stored.
    """
    if STATE_KEY in state_dict:
        raise ConfigError(
            "the state dict has an entry that the manager needs for itself",
            expected=f"no entry {STATE_KEY!r}",
            found=f"{STATE_KEY!r}: {type(state_dict[STATE_KEY]).__name__}",
            hint="pass trainer_state= to the manager instead, or rename the entry",
        )
    added: dict[str, Any] = {}
    if rank == 0:
        added[_RUN] = encode_run(run)
    if objects:
        mine = {name: _encode_object(name, one, rank) for name, one in objects.items()}
        added[_RANKS] = {_rank_key(rank): mine}
    return {**state_dict, STATE_KEY: added} if added else dict(state_dict)


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Return metrics as plain numbers; takes tensors and arrays of one element, too.

    Raises:
        ConfigError: If one is no number.
    """
    if metrics is None:
        return None
    found = {}
    for name, value in metrics.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                "metrics must be numbers",
                expected="a dict of numbers, by name",
                found=f"{name!r}: {type(value).__name__} ({error})",
            ) from error
    return found


def encode_run(run: Mapping[str, Any]) -> str:
    """Encode the JSON value of a run.

    Raises:
        ConfigError: If it is not JSON.
    """
    try:
        return json.dumps(run, allow_nan=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "the trainer state must be JSON",
            expected="numbers, texts, lists and dicts",
            found=str(error),
            hint="give objects to rank_state= instead",
        ) from error


def _encode_object(name: str, one: Any, rank: int) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(one.state_dict(), buffer)
    except Exception as error:
        raise StagingError(
            "the state of an object cannot be stored",
            rank=rank,
            phase="stage",
            fqn=f"{STATE_KEY}.{_RANKS}.{_rank_key(rank)}.{name}",
            expected="an object whose state_dict() torch.save can store",
            found=f"{type(error).__name__}: {error}",
        ) from error
    return buffer.getvalue()


def check_objects(objects: Mapping[str, Any]) -> None:
    """Check the names and the methods of the objects of a rank.

    Raises:
        ConfigError: If one cannot be saved and restored.
    """
    for name, one in objects.items():
        is_name = isinstance(name, str) and name.isidentifier()
        has_methods = hasattr(one, "state_dict") and hasattr(one, "load_state_dict")
        if not is_name or not has_methods:
            raise ConfigError(
                "rank_state must hold objects that can be saved and restored",
                expected="names such as 'dataloader', and objects with state_dict() and "
                "load_state_dict()",
                found=f"{name!r}: {type(one).__name__}",
            )


def skipped_names(*, load_dataset: bool, load_scheduler: bool) -> frozenset[str]:
    """Return the names of the objects that a restore leaves alone."""
    dataset = frozenset() if load_dataset else DATASET_NAMES
    return dataset | (frozenset() if load_scheduler else SCHEDULER_NAMES)


def _rank_key(rank: int) -> str:
    return f"{rank:0{_RANK_DIGITS}d}"


def run_key() -> str:
    """Return the FQN of the JSON value of the run."""
    return f"{STATE_KEY}.{_RUN}"


def stored_objects(fqns: Iterable[str]) -> dict[str, list[int]]:
    """Return the ranks that stored an object of each name, ascending.

    Args:
        fqns: FQNs of the checkpoint.
    """
    found: dict[str, list[int]] = {}
    for fqn in fqns:
        key, _, rest = fqn.partition(".")
        parts = rest.split(".")
        if key == STATE_KEY and len(parts) == 3 and parts[0] == _RANKS and parts[1].isdigit():  # noqa: PLR2004 - ranks.<rank>.<name>
            found.setdefault(parts[2], []).append(int(parts[1]))
    return {name: sorted(ranks) for name, ranks in found.items()}


def template(names: Mapping[str, Sequence[int]], *, with_run: bool) -> dict[str, Any]:
    """Return a state dict to load trainer state into.

    Args:
        names: The ranks whose objects to load, by name of the object.
        with_run: Whether to load the JSON value of the run.
    """
    entry: dict[str, Any] = {_RUN: ""} if with_run else {}
    for name, ranks in names.items():
        for rank in ranks:
            entry.setdefault(_RANKS, {}).setdefault(_rank_key(rank), {})[name] = b""
    return {STATE_KEY: entry} if entry else {}


def loaded_run(loaded: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the JSON value of the run from a loaded template; `None` if it was not loaded.

    Raises:
        CorruptCheckpointError: If it is no JSON object.
    """
    text = loaded.get(STATE_KEY, {}).get(_RUN)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise CorruptCheckpointError(
            "the trainer state is damaged", fqn=run_key(), expected="a JSON object"
        )
    return value


def metrics_of_run(stored: io.BytesIO) -> dict[str, float]:
    """Return the metrics from the stored JSON value of a run; empty if there are none.

    Args:
        stored: The value as DCP stores it.

    Raises:
        CorruptCheckpointError: If it is no JSON object.
    """
    text = torch.load(stored, weights_only=True)
    metrics = (loaded_run({STATE_KEY: {_RUN: text}}) or {}).get(METRICS_KEY)
    found = metrics if isinstance(metrics, dict) else {}
    return {name: float(one) for name, one in found.items() if isinstance(one, (int, float))}


def loaded_object(
    loaded: Mapping[str, Any], name: str, rank: int, *, allow_pickled_objects: bool
) -> Any:
    """Return the state of an object of a rank from a loaded template.

    Raises:
        PickledObjectError: If loading it would run code that the checkpoint names.
    """
    data = loaded[STATE_KEY][_RANKS][_rank_key(rank)][name]
    try:
        return torch.load(io.BytesIO(data), weights_only=not allow_pickled_objects)
    except Exception as error:
        raise PickledObjectError(
            "the state of an object cannot be loaded",
            rank=rank,
            phase="read",
            fqn=f"{STATE_KEY}.{_RANKS}.{_rank_key(rank)}.{name}",
            expected="plain values and tensors",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            hint="pass allow_pickled_objects=True if you trust the checkpoint",
        ) from error


def ranks_to_load(
    wanted: Iterable[str],
    stored: Mapping[str, Sequence[int]],
    *,
    rank: int,
    world_size: int,
    merge: Mapping[str, Any],
    strict: bool,
) -> dict[str, list[int]]:
    """Decide whose objects this rank loads.

    Args:
        wanted: Names of the objects to restore.
        stored: As `stored_objects` returned it.
        rank: This rank.
        world_size: Number of ranks now.
        merge: Functions by name, for a run with another number of ranks.
        strict: Whether every wanted object must be there.

    Returns:
        Ranks by name. A name is left out if it is not stored (`strict=False`). The random number
        generators are also left out if the number of ranks differs and no function merges them.

    Raises:
        MismatchError: If an object is not stored and `strict` is set.
        ConfigError: If the number of ranks differs and no function merges the object.
    """
    found: dict[str, list[int]] = {}
    for name in wanted:
        ranks = list(stored.get(name, ()))
        if not ranks and strict and name != RNG_NAME:
            raise MismatchError(
                "the checkpoint does not hold an object of the ranks",
                rank=rank,
                fqn=f"{STATE_KEY}.{name}",
                found=f"objects {sorted(stored)}" if stored else "no objects of the ranks",
                hint="pass strict=False to go on without it",
            )
        if ranks == list(range(world_size)):
            found[name] = [rank]
        elif ranks and name in merge:
            found[name] = ranks
        elif ranks and name != RNG_NAME:
            raise ConfigError(
                "each rank saved an object of its own, and the number of ranks has changed",
                rank=rank,
                expected=f"{len(ranks)} ranks, which saved {name!r}",
                found=f"{world_size} ranks",
                hint=f"pass merge={{{name!r}: function}} to restore(), or leave the object out "
                "with load_dataset=False or load_scheduler=False",
            )
    return found
