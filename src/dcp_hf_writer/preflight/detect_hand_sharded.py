"""Refuse different tensors under one name: DCP takes them for replicas and keeps one rank's.

So DCP silently loses tensors that trainers shard by hand, most often experts. Each rank sends a
sample of its tensors with its plan, and the coordinator compares the samples. Size and cost of a
sample are bounded.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import ModelKeyError, PlanningError
from dcp_hf_writer.excerpts import some_ranks
from dcp_hf_writer.mapping.model_entry import NOT_WEIGHTS
from dcp_hf_writer.mapping.spec_match import model_names
from dcp_hf_writer.tensors.shards import blocks_of, shards_of
from dcp_hf_writer.torch_seam.dtensor import local_of
from dcp_hf_writer.torch_seam.planners import HFSavePlanner

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy.typing as npt
    from torch.distributed.checkpoint.planner import SavePlan

    from dcp_hf_writer.mapping.model_entry import Path
    from dcp_hf_writer.torch_seam.caller_frames import Planned

_log = logging.getLogger(__name__)

# Vectors are not compared: replicas may differ in them by design (batch norm statistics, random
# states).
_MIN_NDIM = 2

# Elements sampled per tensor, and tensors sampled per rank: at most 80 kB per rank.
_VALUES = 32
_MAX_TENSORS = 1024

# Replicas that nothing keeps equal in training drift apart by rounding, far less than this fraction
# of their norm. Shards have nothing in common, and differ by more than their norm.
_DRIFT = 0.01

# How many groups of ranks a message names.
_SHOWN = 8

# Where the sampled elements lie: odd multiples of half the distance between two of them.
_ODD = torch.arange(1, 2 * _VALUES, 2, device="cpu")

_KINDS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_ROW = np.dtype([("name", "<u8"), ("kind", "<u8"), ("values", "<u2", (_VALUES,))])

_is_warned = False


def samples_of(planned: Planned, *, key: str | None, world_size: int) -> bytes:
    """Sample the tensors of this rank that DCP may take for replicas of other ranks' tensors.

    These are the plain tensors of the model, and DTensors on a mesh that lacks some ranks.

    Args:
        planned: Planner of the save, and what it plans. An `HFSavePlanner` means that the user has
            declared the shards, so nothing is sampled.
        key: Entry that holds the model, as in `HFExport`.
        world_size: Number of ranks of the save.

    Returns:
        Rows of `_ROW`, sorted by `name`; empty if there is nothing to compare.
    """
    if world_size == 1 or isinstance(planned.planner, HFSavePlanner):
        return b""
    state_dict, paths = planned.state_dict, planned.paths
    found: dict[int, torch.Tensor] = {}
    for fqn in _names(state_dict, paths, key):
        offsets = _offsets_of_replica(state_dict[fqn], world_size)
        if offsets is not None:
            found[_hash(_place(fqn, offsets))] = local_of(state_dict[fqn])
    # Sorted, so that all ranks choose the same tensors of those that they have in common.
    names = sorted(found)[:_MAX_TENSORS]
    rows = np.zeros(len(names), _ROW)
    rows["name"] = names
    for row, name in zip(rows, names, strict=True):
        row["kind"] = _hash(f"{found[name].dtype} {tuple(found[name].shape)}")
        row["values"] = _values(found[name])
    return rows.tobytes()


def check_samples(samples: Sequence[bytes], plans: Iterable[SavePlan]) -> None:
    """Compare the samples that the ranks sent (coordinator).

    Args:
        samples: Sample of each rank, in rank order; empty samples are not compared.
        plans: Plans in which every FQN occurs.

    Raises:
        PlanningError: If tensors differ. The error names one of them, the ranks that differ, and
            what to pass.
    """
    ranks: dict[bytes, list[int]] = {}
    for rank, sample in enumerate(samples):
        if sample:
            ranks.setdefault(sample, []).append(rank)
    if len(ranks) <= 1:
        return
    tables = [np.frombuffer(sample, _ROW) for sample in ranks]
    rows = np.concatenate(tables)
    holders = [holder for holder, table in zip(ranks.values(), tables, strict=True) for _ in table]
    distance = _distance(rows)
    worst = int(np.argmax(distance))
    if distance[worst] == 0:
        return
    alike: dict[bytes, list[int]] = {}
    for i in np.flatnonzero(rows["name"] == rows["name"][worst]):
        alike.setdefault(rows[i].tobytes(), []).extend(holders[i])
    found = " and ".join(
        f"one on ranks {some_ranks(group)}" for group in list(alike.values())[:_SHOWN]
    )
    _refuse_or_warn(
        _fqn_of(int(rows["name"][worst]), plans), found, is_drift=bool(distance[worst] <= _DRIFT)
    )


def _refuse_or_warn(fqn: str | None, found: str, *, is_drift: bool) -> None:
    global _is_warned  # noqa: PLW0603
    if not is_drift:
        raise PlanningError(
            "ranks hold different tensors under one name, and DCP would keep only one of them",
            phase="plan",
            fqn=fqn,
            expected="equal replicas, or declared shards",
            found=found,
            hint="pass planner=HFSavePlanner(specs) to the save, with specs whose shards say what "
            "each rank holds; HFSavePlanner() without specs keeps one of the tensors",
        )
    if not _is_warned:
        _is_warned = True
        _log.warning(
            "the replicas of %s have drifted apart: %s; the save keeps one of them", fqn, found
        )


def _names(
    state_dict: Mapping[str, Any], paths: Mapping[str, Path], key: str | None
) -> Iterator[str]:
    tensors = {
        fqn: tuple(paths.get(fqn, (fqn,)))
        for fqn, value in state_dict.items()
        if isinstance(value, torch.Tensor)
    }
    try:
        names: Iterable[str] = model_names(tensors, key=key)
    except ModelKeyError:
        # Not raised here: planning the export raises it, and there may be no export.
        names = (fqn for fqn, path in tensors.items() if path[0] not in NOT_WEIGHTS)
    yield from (fqn for fqn in names if state_dict[fqn].ndim >= _MIN_NDIM)


def _offsets_of_replica(value: torch.Tensor, world_size: int) -> tuple[int, ...] | None:
    """Return the offsets by which DCP deduplicates a tensor; `None` if it need not be sampled.

    A DTensor on a mesh of all ranks need not be: its placements say what each rank holds.
    """
    local = local_of(value)
    if type(local) not in _KINDS or local.layout is not torch.strided or local.is_meta:
        return None
    if not isinstance(value, DTensor):
        return (0,) * value.ndim
    mesh = value.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None or mesh.size() == world_size:
        return None
    blocks = blocks_of(tuple(value.shape), shards_of(value.placements, mesh.shape, coordinate))
    return blocks[0].global_box.offsets if blocks else None


def _values(tensor: torch.Tensor) -> npt.NDArray[np.uint16]:
    """Return `_VALUES` evenly spread elements of a tensor, as the bits of bfloat16."""
    if not tensor.numel():
        return np.zeros(_VALUES, np.uint16)
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    elif not tensor.is_floating_point() or tensor.itemsize == 1:
        # torch cannot index every integer dtype, nor every 8-bit dtype: view them as these.
        tensor = tensor.view(_INTEGERS[tensor.itemsize])
    places = _ODD.to(tensor.device) * tensor.numel() // (2 * _VALUES)
    if tensor.is_contiguous():
        chosen = tensor.view(-1)[places]
    else:
        chosen = tensor[torch.unravel_index(places, tensor.shape)]
    found: npt.NDArray[np.uint16] = chosen.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
    return found


def _distance(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the distance of each row from the first row of its name, relative to their norm.

    The larger norm of the two counts. Rows of different dtype or shape are infinitely far apart.
    """
    _, first, group = np.unique(rows["name"], return_index=True, return_inverse=True)
    others = rows[first[group]]
    one, other = _floats(rows["values"]), _floats(others["values"])
    norm = np.maximum(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
    distance: npt.NDArray[np.float64] = np.linalg.norm(one - other, axis=1)
    distance[norm > 0] /= norm[norm > 0]
    distance[rows["kind"] != others["kind"]] = np.inf
    return distance


def _floats(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    floats = (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.nan_to_num(floats)


def _place(fqn: str, offsets: Iterable[int]) -> str:
    return f"{fqn} {tuple(offsets)}"


def _hash(text: str) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode()))


def _fqn_of(name: int, plans: Iterable[SavePlan]) -> str | None:
    places = ((item.index.fqn, item.index.offset) for plan in plans for item in plan.items)
    return next(
        (fqn for fqn, at in places if at is not None and _hash(_place(fqn, at)) == name), None
    )
