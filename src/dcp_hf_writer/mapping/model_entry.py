"""Which entry of a state dict holds the model, and what its tensors are called within it.

Pure. A path is the sequence of keys that leads to a value in the nested state dict. DCP records
the paths when it flattens the state dict, and joins each path with dots to make the FQN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import ModelKeyError

if TYPE_CHECKING:
    from collections.abc import Mapping

Path = tuple[str | int, ...]

# Entries that trainers save beside the model and that hold no weights to serve.
NOT_WEIGHTS = frozenset(
    {
        *("optim", "optimizer", "optimizers", "optimizer_state", "optim_state"),
        *("scheduler", "schedulers", "lr_scheduler", "lr_schedulers", "scaler", "grad_scaler"),
        *("dataloader", "data_loader", "sampler", "train_state", "trainer", "rng", "rng_state"),
        *("step", "steps", "epoch", "global_step", "iteration", "args", "config", "metrics"),
    }
)

_MODEL = "model"


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
    found = {path for path in paths.values() if len(path) > 1 and path[0] == _MODEL}
    if found:
        return (_MODEL,)
    kept = [path for path in paths.values() if path[0] not in NOT_WEIGHTS]
    if not kept:
        _refuse("no entry of the state dict holds tensors of a model", paths)
    nested = {path[:2] for path in kept if len(path) > 2 and path[1] == _MODEL}  # noqa: PLR2004
    entries = {path[0] for path in kept if len(path) > 1}
    leaves = [path for path in kept if len(path) == 1]
    if len(nested) == 1 and len(entries) == 1 and not leaves:
        return next(iter(nested))
    if leaves and not entries:
        return ()
    if len(entries) == 1 and not leaves:
        return (next(iter(entries)),)
    _refuse("more than one entry of the state dict could hold the model", paths)
    return ()


def _named(paths: Mapping[str, Path], key: str) -> Path:
    # A key of the state dict may itself contain dots, so join the start of each path and compare.
    for path in paths.values():
        for length in range(1, len(path)):
            if ".".join(map(str, path[:length])) == key:
                return path[:length]
    _refuse(f"entry {key!r} holds no tensors", paths)
    return ()


def _refuse(problem: str, paths: Mapping[str, Path]) -> None:
    choices = sorted({str(path[0]) for path in paths.values() if len(path) > 1})
    leaves = sum(len(path) == 1 for path in paths.values())
    found = f"entries with tensors: {choices}" + (
        f", {leaves} tensors at the top" if leaves else ""
    )
    raise ModelKeyError(
        problem,
        phase="plan",
        expected='an entry "model", or a state dict with one entry that holds tensors',
        found=found,
        hint='pass HFExport(key="<entry>")',
    )


def names_in_model(paths: Mapping[str, Path], prefix: Path) -> dict[str, str]:
    """Map the FQN of each tensor below `prefix` to its name within the model, in order."""
    return {
        fqn: ".".join(map(str, path[len(prefix) :]))
        for fqn, path in paths.items()
        if path[: len(prefix)] == prefix and len(path) > len(prefix) and not _beside(path, prefix)
    }


def _beside(path: Path, prefix: Path) -> bool:
    # A state dict of the model itself may hold the optimizer and other entries at the same level.
    return not prefix and (len(path) > 1 or path[0] in NOT_WEIGHTS)
