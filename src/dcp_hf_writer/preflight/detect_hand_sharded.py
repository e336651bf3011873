"""Refuse different tensors under one name: DCP takes them for replicas, and keeps one rank's.

So it loses what trainers shard by hand, experts above all, without a word. Each rank sends a sample
of its tensors along with its plan, of bounded size and cost, and the coordinator compares them.
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
    from dcp_hf_writer.torch_seam.frames import Planned

_log = logging.getLogger(__name__)

# Vectors are what replicas may differ in by design: statistics of batch norms, random states.
_MIN_NDIM = 2

# Elements of a tensor that are compared, and tensors of a rank: 80 kB in all at most.
_VALUES = 32
_MAX_TENSORS = 1024

# Replicas that are trained without being kept equal drift apart by rounding, far below this part
# of their norm; shards have nothing in common, and differ by more than their norm.
_DRIFT = 0.01

# Groups of ranks that a message names, and ranks of each.
_SHOWN = 8

# Places of the values, in halves of their distance.
_ODD = torch.arange(1, 2 * _VALUES, 2, device="cpu")

_KINDS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_ROW = np.dtype([("name", "<u8"), ("kind", "<u8"), ("values", "<u2", (_VALUES,))])

_is_warned = False


def samples_of(planned: Planned, *, key: str | None, world_size: int) -> bytes:
    """Sample this rank's tensors that DCP may take for replicas of other ranks'.

    Those are plain tensors of the model, and DTensors on meshes that not all ranks are in.

    Args:
        planned: Planner of the save, and what it plans. An `HFSavePlanner` means that the user has
            declared what is sharded, so that nothing is sampled.
        key: Entry that holds the model, as `HFExport` takes it.
        world_size: Number of ranks of the save.

    Returns:
        Rows of `_ROW`, by name; empty if there is nothing to compare.
    """
    if world_size == 1 or isinstance(planned.planner, HFSavePlanner):
        return b""
    state_dict, paths = planned.state_dict, planned.paths
    found: dict[int, torch.Tensor] = {}
    for fqn in _names(state_dict, paths, key):
        offsets = _offsets_of_replica(state_dict[fqn], world_size)
        if offsets is not None:
            found[_hash(_place(fqn, offsets))] = local_of(state_dict[fqn])
    # The same ones on every rank, whatever else each holds.
    names = sorted(found)[:_MAX_TENSORS]
    rows = np.zeros(len(names), _ROW)
    rows["name"] = names
    for row, name in zip(rows, names, strict=True):
        row["kind"] = _hash(f"{found[name].dtype} {tuple(found[name].shape)}")
        row["values"] = _values(found[name])
    return rows.tobytes()


def check_samples(samples: Sequence[bytes], plans: Iterable[SavePlan]) -> None:
    """Compare what the ranks sent (coordinator).

    Args:
        samples: Of each rank, by rank; empty ones are not compared.
        plans: Plans in which every FQN occurs.

    Raises:
        PlanningError: Naming a tensor, the ranks that differ, and what to pass.
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
    _say(_fqn_of(int(rows["name"][worst]), plans), found, is_drift=bool(distance[worst] <= _DRIFT))


def _say(fqn: str | None, found: str, *, is_drift: bool) -> None:
    global _is_warned  # noqa: PLW0603
    if not is_drift:
        raise PlanningError(
            "ranks hold different tensors under one name, of which DCP would keep one",
            phase="plan",
            fqn=fqn,
            expected="replicas, or shards that are declared",
            found=found,
            hint="pass planner=HFSavePlanner(specs) to the save, with specs whose shards say what "
            "each rank holds; with HFSavePlanner() one of them is kept",
        )
    if not _is_warned:
        _is_warned = True
        _log.warning("the replicas of %s have drifted apart: %s; one of them is saved", fqn, found)


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
        # Raised when the export is planned; there may be none.
        names = (fqn for fqn, path in tensors.items() if path[0] not in NOT_WEIGHTS)
    yield from (fqn for fqn in names if state_dict[fqn].ndim >= _MIN_NDIM)


def _offsets_of_replica(value: torch.Tensor, world_size: int) -> tuple[int, ...] | None:
    """Return the offsets under which DCP compares a tensor with others'; `None` if it is no case.

    DTensors on a mesh of all ranks are what they say.
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
    """Return elements of a tensor, evenly spread, as bfloat16."""
    if not tensor.numel():
        return np.zeros(_VALUES, np.uint16)
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    elif not tensor.is_floating_point() or tensor.itemsize == 1:
        # Not every type of integer, nor of 8-bit numbers, can be indexed.
        tensor = tensor.view(_INTEGERS[tensor.itemsize])
    places = _ODD.to(tensor.device) * tensor.numel() // (2 * _VALUES)
    if tensor.is_contiguous():
        chosen = tensor.view(-1)[places]
    else:
        chosen = tensor[torch.unravel_index(places, tensor.shape)]
    found: npt.NDArray[np.uint16] = chosen.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
    return found


def _distance(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return how far each row is from the first one of its name, as a part of their norm."""
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
