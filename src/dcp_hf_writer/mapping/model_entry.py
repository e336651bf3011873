"""Which entry of a state dict holds the model, and what its tensors are called within it.

Pure. A path is the sequence of keys that leads to a value in the nested state dict. DCP records
the paths when it flattens the state dict, and joins each path with dots to make the FQN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import ModelKeyError
from dcp_hf_writer.excerpts import MOST_NAMES, some_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Path = tuple[str | int, ...]

# Entries that trainers save beside the model and that hold no weights to serve.
NOT_WEIGHTS = frozenset(
    {
        *("optim", "optims", "optimizer", "optimizers", "optimizer_state", "optim_state"),
        *("optimizer_states", "optimizer_state_dict", "optim_state_dict", "param_groups"),
        *("scheduler", "schedulers", "lr_scheduler", "lr_schedulers", "scaler", "grad_scaler"),
        *("scheduler_state_dict", "lr_scheduler_state_dict", "scaler_state_dict"),
        *("dataloader", "data_loader", "sampler", "train_state", "trainer", "rng", "rng_state"),
        *("rng_states", "callbacks", "loops", "hparams", "hyper_parameters", "loss"),
        *("step", "steps", "epoch", "global_step", "iteration", "args", "config", "metrics"),
    }
)

# Tensors that trainers keep beside the tensors of a flat model. A module may have a parameter of
# such a name too: then an optimizer usually has state for it.
_COUNTERS = frozenset(
    {
        *("step", "steps", "epoch", "global_step", "iteration", "loss"),
        *("rng", "rng_state", "rng_states"),
    }
)

# Names that trainers give to the model's entry; the first one that is there counts.
_MODEL_ENTRIES = ("model", "module", "state_dict", "model_state_dict", "model_state")

# `Module.get_extra_state` puts its value under this name, at the top or below a module's name.
_EXTRA_STATE = "_extra_state"

# torch's `flatten_optimizer_state_dict` begins the name of each value with one of these.
_OPTIMIZER = ("state", "param_groups")


def model_prefix(paths: Mapping[str, Path], *, key: str | None) -> Path:
    """Find the path of the entry that holds the model.

    Args:
        paths: Path of each tensor of the state dict, by FQN.
        key: Entry that the user names, with dots between nested entries; `None` to search for it.

    Returns:
        The path of that entry; `()` if the state dict is the model's own.

    Raises:
        ModelKeyError: If `key` leads to no tensor, or if no entry or more than one could hold the
            model.
    """
    if key is not None:
        return _named(paths, key)
    found = _search(_weights(paths), paths)
    if found is None:
        raise _refusal("no entry of the state dict holds tensors of a model", paths)
    return found


def holds_weights(paths: Mapping[str, Path]) -> bool:
    """Whether a state dict has an entry or a tensor that could be a model's.

    Args:
        paths: Path of each tensor of the state dict, by FQN.
    """
    try:
        return _search(_weights(paths), paths) is not None
    except ModelKeyError:
        return True


def names_in_model(paths: Mapping[str, Path], prefix: Path) -> dict[str, str]:
    """Map the FQN of each tensor of the model to its name within the model, in order.

    Extra state of modules is not a tensor of the model, and neither is flattened optimizer state at
    the top of the state dict. If the entry is a list of state dicts, such as the parts of a
    pipeline, the names have no list index.

    Args:
        paths: Path of each tensor of the state dict, by FQN.
        prefix: Path of the model's entry.

    Raises:
        ModelKeyError: If two state dicts in a list have tensors of one name.
    """
    below = {
        fqn: path[len(prefix) :]
        for fqn, path in paths.items()
        if path[: len(prefix)] == prefix and len(path) > len(prefix) and not is_extra_state(path)
    }
    if not prefix:
        below = _of_flat_model(below)
    if below and all(isinstance(path[0], int) and len(path) > 1 for path in below.values()):
        _check_parts(below, prefix)
        below = {fqn: path[1:] for fqn, path in below.items()}
    names = {fqn: ".".join(map(str, path)) for fqn, path in below.items()}
    return names if prefix else without_moments(names)


def is_extra_state(path: Path) -> bool:
    """Whether a path leads to what `Module.get_extra_state` returned, or into it."""
    # A plain loop: a job has hundreds of thousands of paths, and most end after two comparisons.
    for part in path:
        if isinstance(part, str) and part.endswith(_EXTRA_STATE):
            start = part[: -len(_EXTRA_STATE)]
            if not start or start.endswith("."):
                return True
    return False


def without_moments(names: Mapping[str, str]) -> dict[str, str]:
    """Leave out flattened optimizer state, such as `state.<parameter>.exp_avg`.

    Args:
        names: Name of each tensor within one entry, by FQN. Only state of a parameter that is among
            these names is left out.

    Source:
        torch, `StateDictOptions.flatten_optimizer_state_dict`.
    """
    known = frozenset(names.values())
    return {fqn: name for fqn, name in names.items() if not _is_moment(name, known)}


def _is_moment(name: str, names: frozenset[str]) -> bool:
    if not any(f"{word}." in name for word in _OPTIMIZER):
        return False
    parts = name.split(".")
    # A trainer may put the name of an entry before it: `optim.state.<parameter>.exp_avg`.
    return any(
        part in _OPTIMIZER and ".".join(parts[i + 1 : -1]) in names
        for i, part in enumerate(parts[:2])
    )


def left_out_of_model(paths: Mapping[str, Path], prefix: Path, names: Iterable[str]) -> list[str]:
    """Describe the tensors that are not the model's: one text for each entry and kind.

    Args:
        paths: Path of each tensor of the state dict, by FQN.
        prefix: Path of the model's entry.
        names: FQNs of the model's tensors.
    """
    kept = frozenset(names)
    counts: dict[str, int] = {}
    for fqn, path in paths.items():
        if fqn not in kept:
            what = why_left_out(path, prefix)
            counts[what] = counts.get(what, 0) + 1
    return [f"{what} ({count} tensor{'s' * (count > 1)})" for what, count in counts.items()]


def why_left_out(path: Path, prefix: Path) -> str:
    """Name what a tensor that is not the model's belongs to: an entry, or a kind of state."""
    if is_extra_state(path):
        return "extra state of modules, `_extra_state`"
    if path[: len(prefix)] != prefix or (not prefix and len(path) > 1):
        return f"entry {'.'.join(map(str, path[: _depth_beside(path, prefix)]))!r}"
    word = next((one for one in _OPTIMIZER if f"{one}." in str(path[len(prefix)])), None)
    if word is not None:
        return f"flattened optimizer state, `{word}.*`"
    return f"tensor {'.'.join(map(str, path))!r}"


def is_usual_beside(path: Path, prefix: Path) -> bool:
    """Whether a tensor that is not the model's lies in an entry that trainers keep beside it."""
    return path[_depth_beside(path, prefix) - 1] in NOT_WEIGHTS


def _depth_beside(path: Path, prefix: Path) -> int:
    """Return how many parts of a path name the entry that lies beside the model."""
    same = 0
    while same < min(len(path), len(prefix)) - 1 and path[same] == prefix[same]:
        same += 1
    return same + 1


def _weights(paths: Mapping[str, Path]) -> list[Path]:
    """Return the paths of tensors, without extra state and without state of an optimizer."""
    found = [path for path in paths.values() if not is_extra_state(path)]
    leaves = frozenset(str(path[0]) for path in found if len(path) == 1)
    return [path for path in found if not _is_optimizer_state(path, leaves)]


def _is_optimizer_state(path: Path, leaves: frozenset[str]) -> bool:
    # `{**model.state_dict(), **optimizer.state_dict()}`: the second has an entry "state", by the
    # names of parameters or by their numbers.
    if len(path) <= 2 or path[0] != _OPTIMIZER[0]:  # noqa: PLR2004 - state, parameter, value
        return False
    owner = str(path[1])
    return owner in leaves or owner.isdecimal()


def _search(weights: list[Path], paths: Mapping[str, Path]) -> Path | None:
    """Return the path of the model's entry; `None` if there are no weights."""
    leaves = {path[0] for path in weights if len(path) == 1}
    entries = {path[0] for path in weights if len(path) > 1}
    for name in _MODEL_ENTRIES:
        if name in entries:
            return _within_app(name, weights)
    likely = entries - NOT_WEIGHTS
    sure = leaves if not entries else leaves - NOT_WEIGHTS
    if sure and not likely:
        return ()
    if len(likely) == 1 and not sure:
        return _within_app(next(iter(likely)), weights)
    if not likely and not sure:
        return None
    raise _refusal("more than one entry of the state dict could hold the model", paths)


def _within_app(entry: str | int, weights: list[Path]) -> Path:
    """Return the path of the model in an entry, which may be an object with a model and more."""
    below = [path[1:] for path in weights if path[0] == entry and len(path) > 1]
    inner = {path[0] for path in below if len(path) > 1}
    models = [name for name in _MODEL_ENTRIES if name in inner]
    others = inner.difference(models[:1])
    is_app = bool(others) or entry not in _MODEL_ENTRIES
    if models and is_app and others <= NOT_WEIGHTS and all(len(p) > 1 for p in below):
        return (entry, models[0])
    return (entry,)


def _of_flat_model(below: Mapping[str, Path]) -> dict[str, Path]:
    """Return the tensors of a state dict that is the model's own.

    Whatever a parameter is called, it is one. But beside entries such as `optim`, a tensor `step`
    is the trainer's, unless an optimizer has state for it.
    """
    leaves: dict[str, Path] = {fqn: path for fqn, path in below.items() if len(path) == 1}
    beside = [path for path in below.values() if len(path) > 1]
    if not beside:
        return leaves
    trained = {str(part) for path in beside for part in path[1:-1]}
    trained |= {str(part) for path in beside for part in str(path[-1]).split(".")[:-1]}
    return {
        fqn: path
        for fqn, path in leaves.items()
        if path[0] not in _COUNTERS or str(path[0]) in trained
    }


def _check_parts(below: Mapping[str, Path], prefix: Path) -> None:
    first: dict[Path, Path] = {}
    for path in below.values():
        other = first.setdefault(path[1:], path)
        if other is not path:
            start = ".".join(map(str, prefix))
            raise ModelKeyError(
                "two state dicts in the list that holds the model have a tensor of one name",
                phase="plan",
                fqn=".".join(map(str, (*prefix, *path))),
                expected="parts of one model, with distinct names",
                found=f"{'.'.join(map(str, path[1:]))!r} in parts {other[0]} and {path[0]}",
                hint=f'name the part to export: HFExport(key="{start}.{other[0]}")',
            )


def _named(paths: Mapping[str, Path], key: str) -> Path:
    # A key of the state dict may itself contain dots, so join the start of each path and compare.
    for path in paths.values():
        for length in range(1, len(path)):
            if ".".join(map(str, path[:length])) == key:
                return path[:length]
    raise _refusal(f"entry {key!r} holds no tensors", paths)


def _refusal(problem: str, paths: Mapping[str, Path]) -> ModelKeyError:
    shown = [path for path in paths.values() if not is_extra_state(path)]
    choices = sorted({str(path[0]) for path in shown if len(path) > 1})
    leaves = [str(path[0]) for path in shown if len(path) == 1]
    found = f"entries with tensors: {choices}"
    hint = 'pass HFExport(key="<entry>")'
    if leaves:
        names = some_of(map(repr, leaves), most=MOST_NAMES)
        found += f", {len(leaves)} tensors at the top: {names}"
        hint += ', or put the tensors at the top into an entry "model"'
    return ModelKeyError(
        problem,
        phase="plan",
        expected='an entry "model", or a state dict with one entry that holds tensors',
        found=found,
        hint=hint,
    )
