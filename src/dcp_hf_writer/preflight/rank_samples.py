"""Sample what a rank saves under names that other ranks use too.

DCP takes whatever ranks save under one name for replicas, and keeps the value of one rank. So it
silently loses tensors that trainers shard by hand, the optimizer state of pipeline stages that all
number their parameters from 0, and each rank's random state. Each rank sends a sample with its
plan, and the coordinator compares the samples (`compare_ranks`). A sample is smaller than the plan.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import ModelKeyError
from dcp_hf_writer.mapping.model_entry import NOT_WEIGHTS
from dcp_hf_writer.mapping.spec_match import model_names
from dcp_hf_writer.preflight.digest_values import digest_value
from dcp_hf_writer.save.tensor_bytes import host_bytes
from dcp_hf_writer.staging.take_apart import dense_leaves
from dcp_hf_writer.tensors.shards import blocks_of, shards_of
from dcp_hf_writer.torch_seam.planners import HFSavePlanner
from dcp_hf_writer.torch_seam.tensor_forms import is_sharded_tensor, shards_of_some_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from dcp_hf_writer.torch_seam.caller_frames import Planned

# Elements sampled per tensor. A row has 97 bytes; what torch plans for a tensor has more.
VALUES = 32

# Digests per rank; at most 140 kB. If a rank has more values, each digest covers several of them.
MAX_DIGESTS = 8192

# Replicas of weights may drift apart in vectors by design (batch norm statistics).
_MIN_NDIM = 2

# Tensors up to this size are compared byte for byte, in bytes. Integers must be equal then: random
# states that differ in one counter lie far apart in what they generate.
_EXACT_NBYTES = 1 << 20

# The digest of a floating-point number that is sampled: other ranks may hold another kind of value.
_NUMBER = 1

# Where the sampled elements lie: odd multiples of half the distance between two of them.
_ODD = torch.arange(1, 2 * VALUES, 2, device="cpu")

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# State that a module adds to its state dict, such as the scales of float8 layers.
_EXTRA_STATE = "_extra_state"


class Rule(enum.IntEnum):
    """What the coordinator does if a value differs between ranks."""

    WEIGHT = 0
    """Refuse it, unless it looks like drift."""
    LENIENT = 1
    """Log it: one rank's value is as good as another's."""
    STATE = 2
    """Refuse it, unless it looks like drift: anything but a weight."""


TENSOR_ROW = np.dtype(
    [
        *(("name", "<u8"), ("item", "<u8"), ("kind", "<u8"), ("bits", "<u8"), ("rule", "u1")),
        ("values", "<u2", (VALUES,)),
    ]
)
"""A sampled tensor: hashes of its name, of its item in the plan, of what must be equal, and of the
bits that were looked at; then the sampled elements as bits of bfloat16."""

DIGEST_ROW = np.dtype([("name", "<u8"), ("item", "<u8"), ("digest", "<u8"), ("rule", "u1")])
"""Values that are equal if their digests are: `item` is one of them, `name` the hash of all."""


@dataclass(slots=True)
class _Found:
    """What a rank samples."""

    tensors: dict[int, tuple[int, torch.Tensor, Rule]] = field(default_factory=dict)
    """Item and rule of each tensor, by the hash of its name."""
    numbers: dict[int, tuple[float, Rule]] = field(default_factory=dict)
    """Floating-point numbers, by the hash of their item."""
    digests: dict[int, tuple[int, Rule]] = field(default_factory=dict)
    """Digest and rule of each other value, by the hash of its item."""


def samples_of(planned: Planned, *, key: str | None, world_size: int) -> bytes:
    """Sample the values of this rank that DCP may take for replicas of other ranks' values.

    These are plain tensors, DTensors that are replicated everywhere, DTensors and ShardedTensors of
    some ranks only, and values that are no tensors. Tensors within such values are sampled too.

    Args:
        planned: Planner of the save, and what it plans. An `HFSavePlanner` says which tensors are
            shards; these are not sampled. If it declares no shards at all, no tensor is refused for
            its values.
        key: Entry that holds the model, as in `HFExport`.
        world_size: Number of ranks of the save.

    Returns:
        Rows for `rows_of`; empty if this rank saves alone.
    """
    if world_size == 1:
        return b""
    rules = _SampleRules(planned, key)
    found = _Found()
    for fqn, value in planned.state_dict.items():
        if fqn not in rules.declared:
            _add(found, fqn, value, rules, world_size)
    tensors, digests = _tensor_rows(found), _digest_rows(found)
    return len(tensors).to_bytes(8, "big") + tensors.tobytes() + digests.tobytes()


def rows_of(sample: bytes) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the tensor rows and the digest rows of a sample that is not empty."""
    count = int.from_bytes(sample[:8], "big")
    stop = 8 + count * TENSOR_ROW.itemsize
    return np.frombuffer(sample[8:stop], TENSOR_ROW), np.frombuffer(sample[stop:], DIGEST_ROW)


def hash_of_item(fqn: str, offsets: Iterable[int] | None) -> int:
    """Return the hash of an item of a plan; `offsets` is `None` for what is no tensor."""
    return _hash(f"{fqn} {None if offsets is None else tuple(offsets)}")


def _add(found: _Found, fqn: str, value: Any, rules: _SampleRules, world_size: int) -> None:
    if isinstance(value, torch.Tensor):
        rule = rules.of_tensor(fqn, value.ndim)
        for offsets, part in _replicas(value, world_size):
            _add_tensor(found, hash_of_item(fqn, offsets), f"{fqn} {offsets}", part, rule)
        return
    item = hash_of_item(fqn, None)
    rule = rules.of_value(fqn)
    if type(value) is float:
        found.numbers[item] = (value, rule)
        return
    inner: list[torch.Tensor] = []
    digest = digest_value(value, inner)
    if digest is not None:
        found.digests[item] = (digest, rule)
    for number, tensor in enumerate(inner):
        _add_tensor(found, item, f"{fqn} #{number}", tensor, rules.of_tensor(fqn, tensor.ndim))


def _add_tensor(found: _Found, item: int, name: str, value: torch.Tensor, rule: Rule) -> None:
    for number, leaf in enumerate(dense_leaves(value)):
        found.tensors[_hash(f"{name} {number}")] = (item, leaf.detach(), rule)


class _SampleRules:
    """Which rule applies to the values of a state dict."""

    def __init__(self, planned: Planned, key: str | None) -> None:
        planner = planned.planner
        self.declared: frozenset[str] = frozenset()
        """FQNs of tensors whose shards the planner describes."""
        self._keeps_one = False
        if isinstance(planner, HFSavePlanner):
            self.declared, self._keeps_one = planner.declared, not planner.declares_shards
        self._path_of = planned.path_of
        tensors = planned.paths_of_tensors()
        try:
            names = model_names(tensors, key=key)
        except ModelKeyError:
            # Not raised here: planning the export raises it, and there may be no export.
            names = {fqn: fqn for fqn, path in tensors.items() if path[0] not in NOT_WEIGHTS}
        self._names = {fqn: name for fqn, name in names.items() if not _is_optimizer_state(name)}
        self._known = frozenset(self._names.values())

    def of_tensor(self, fqn: str, ndim: int) -> Rule:
        if self._keeps_one:
            return Rule.LENIENT
        if not self._is_weight(fqn):
            return Rule.STATE
        return Rule.WEIGHT if ndim >= _MIN_NDIM else Rule.LENIENT

    def of_value(self, fqn: str) -> Rule:
        return Rule.LENIENT if fqn.endswith(_EXTRA_STATE) else Rule.STATE

    def _is_weight(self, fqn: str) -> bool:
        """Whether a tensor belongs to the model or to a copy of it, such as `ema.<name>`."""
        if fqn in self._names:
            return True
        path = self._path_of(fqn)
        if path[0] in NOT_WEIGHTS:
            return False
        tails = (".".join(map(str, path[depth:])) for depth in (1, 2))
        # Without names of tensors, each entry is one value: it may be the model.
        return not self._known or any(tail in self._known for tail in tails)


def _is_optimizer_state(name: str) -> bool:
    """Whether a name has the form of flattened optimizer state: `state.<name>.<what>`."""
    return name.startswith(("state.", "optim.", "optimizer.", "param_groups."))


def _replicas(
    value: torch.Tensor, world_size: int
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Yield what DCP may take for replicas, with the offsets by which it deduplicates.

    Yields nothing for a DTensor that is sharded over all ranks, or a ShardedTensor of all ranks:
    these say what each rank holds.
    """
    if is_sharded_tensor(value):
        yield from shards_of_some_ranks(value, world_size)
        return
    if not isinstance(value, DTensor):
        yield (0,) * value.ndim, value
        return
    mesh = value.device_mesh
    coordinate = mesh.get_coordinate()
    is_whole = all(placement.is_replicate() for placement in value.placements)
    if coordinate is None or (mesh.size() == world_size and not is_whole):
        return
    blocks = blocks_of(tuple(value.shape), shards_of(value.placements, mesh.shape, coordinate))
    if blocks:
        yield blocks[0].global_box.offsets, value


def _tensor_rows(found: _Found) -> npt.NDArray[Any]:
    rows = np.zeros(len(found.tensors) + len(found.numbers), TENSOR_ROW)
    sampled: dict[torch.dtype, list[tuple[int, torch.Tensor]]] = {}
    for place, (name, (item, tensor, rule)) in enumerate(_sampled(found)):
        chosen = _chosen(tensor)
        rows[place] = (name, item, _hash(_kind(tensor, rule)), _bits(tensor, chosen), rule, 0)
        sampled.setdefault(chosen.dtype, []).append((place, chosen))
    # All at once, because a conversion of 32 elements takes as long as one of thousands.
    for group in sampled.values():
        values = torch.stack([chosen for _, chosen in group]).to(torch.bfloat16)
        rows["values"][[place for place, _ in group]] = values.view(torch.uint16).numpy()
    return rows


def _sampled(found: _Found) -> Iterator[tuple[int, tuple[int, torch.Tensor, Rule]]]:
    """Yield item, tensor and rule of all tensors and numbers, by the hash of their names."""
    for name in sorted({*found.tensors, *found.numbers}):
        if name in found.tensors:
            yield name, found.tensors[name]
        else:
            number, rule = found.numbers[name]
            yield name, (name, torch.tensor(number, dtype=torch.float64, device="cpu"), rule)


def _digest_rows(found: _Found) -> npt.NDArray[Any]:
    # Dtype and shape of all tensors, also of those that are not sampled.
    kinds = {
        name: (
            item,
            _hash(f"{tensor.dtype} {tuple(tensor.shape)}"),
            Rule.STATE if rule is Rule.STATE else Rule.WEIGHT,
        )
        for name, (item, tensor, rule) in found.tensors.items()
    }
    numbers = {item: (item, _NUMBER, rule) for item, (_, rule) in found.numbers.items()}
    values = {item: (item, digest, rule) for item, (digest, rule) in found.digests.items()}
    each = sorted((name, *row) for name, row in {**kinds, **numbers, **values}.items())
    if len(each) > MAX_DIGESTS:
        each = _merged(each)
    return np.array(each, DIGEST_ROW)


def _merged(each: Sequence[tuple[int, int, int, Rule]]) -> list[tuple[int, int, int, Rule]]:
    """Merge rows so that `MAX_DIGESTS` remain. Ranks with the same names merge them alike."""
    groups: dict[tuple[int, Rule], list[tuple[int, int, int, Rule]]] = {}
    for row in each:
        groups.setdefault((row[0] % (MAX_DIGESTS // len(Rule)), row[3]), []).append(row)
    return sorted(
        (_hash(str([r[0] for r in rows])), rows[0][1], _hash(str([r[2] for r in rows])), rule)
        for (_, rule), rows in groups.items()
    )


def _kind(tensor: torch.Tensor, rule: Rule) -> str:
    """Describe what must be equal exactly."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)}"
    is_number = tensor.is_floating_point() or tensor.is_complex()
    if rule is not Rule.LENIENT and not is_number and tensor.nbytes <= _EXACT_NBYTES:
        kind += f" {_hash_bytes(tensor.cpu())}"
    return kind


def _chosen(tensor: torch.Tensor) -> torch.Tensor:
    """Return `VALUES` evenly spread elements of a tensor, in host memory."""
    if not tensor.numel():
        return torch.zeros(VALUES, device="cpu")
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    elif not tensor.is_floating_point() or tensor.itemsize == 1:
        # torch cannot index every integer dtype, nor every 8-bit dtype: view them as these.
        tensor = tensor.view(_INTEGERS[tensor.itemsize])
    places = _places_in(tensor.numel()).to(tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1)[places].cpu()
    return tensor[torch.unravel_index(places, tensor.shape)].cpu()


@functools.lru_cache(maxsize=1024)
def _places_in(count: int) -> torch.Tensor:
    return _ODD * count // (2 * VALUES)


def _bits(tensor: torch.Tensor, chosen: torch.Tensor) -> int:
    """Return the hash of all bits of a small tensor, and of the sampled bits of a large one."""
    return _hash_bytes(tensor.cpu() if tensor.nbytes <= _EXACT_NBYTES else chosen)


def _hash(text: str) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode()))


def _hash_bytes(tensor: torch.Tensor) -> int:
    return int(xxhash.xxh3_64_intdigest(host_bytes(tensor.contiguous())))
