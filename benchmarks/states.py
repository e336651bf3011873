"""State dicts for the benchmarks: shapes of Qwen2-0.5B, scaled to a size, over a real mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

GIB = 1 << 30
Shapes = dict[str, tuple[int, ...]]

_EMBEDDING_SHARE = 0.28
"""Part of the parameters that the embedding of Qwen2-0.5B has."""
_MIN_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """What is saved."""

    gib: float
    """Size of the weights of all ranks together."""
    dtype: str
    """Of the weights: `bfloat16` or `float32`."""
    layout: str
    """`fsdp`: all weights sharded on dim 0. `tp`: every second 2-D weight on dim 1, others on dim
    0, 1-D weights replicated."""
    optim: bool
    """Adam's two moments in fp32 and a step for each weight, beside the weights."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def weights_nbytes(self) -> int:
        """Bytes of the weights, as they are, after scaling."""
        return sum(nbytes_by_key(self).values())

    @property
    def optim_nbytes(self) -> int:
        """Bytes of the optimizer's moments."""
        return 2 * 4 * self.weights_nbytes // self.torch_dtype.itemsize if self.optim else 0

    def describe(self) -> str:
        """One line for people."""
        moments = f" + Adam moments {self.optim_nbytes / GIB:.2f} GiB" if self.optim else ""
        weights = f"{self.weights_nbytes / GIB:.2f} GiB {self.dtype}"
        return f"{weights} weights, {len(model_shapes(self))} tensors{moments}, {self.layout}"


def model_shapes(workload: Workload) -> Shapes:
    """Shapes of the weights in state-dict order; deterministic in `workload`."""
    numel = int(workload.gib * GIB) // workload.torch_dtype.itemsize
    hidden = 896
    while (layers := _layers(numel, hidden)) < _MIN_LAYERS and hidden > 56:
        hidden //= 2
    layer = _layer_shapes(hidden)
    left = numel - layers * _numel(layer)
    # A multiple of 64, as vocabularies are padded to, and thus even on every usual mesh.
    vocabulary = max(64, round(left / hidden / 64) * 64)
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def nbytes_by_key(workload: Workload) -> dict[str, int]:
    """Bytes of each weight, in state-dict order."""
    itemsize = workload.torch_dtype.itemsize
    return {k: torch.Size(s).numel() * itemsize for k, s in model_shapes(workload).items()}


def split_into_files(nbytes: dict[str, int], files: int) -> tuple[int, dict[str, int]]:
    """Find the `max_shard_size` that gives `files` files, and the file (from 1) of each key.

    Greedy in the order given, as `save_pretrained` fills its files.
    """
    low, high = max(sum(nbytes.values()) // files, 1), sum(nbytes.values())
    while low < high:
        middle = (low + high) // 2
        if max(_greedy(nbytes, middle).values()) > files:
            low = middle + 1
        else:
            high = middle
    return low, _greedy(nbytes, low)


def build_state_dict(workload: Workload, mesh: DeviceMesh) -> dict[str, Any]:
    """Make this rank's state dict, `{"model": ...}` and with `optim` the optimizer's entry too.

    Every byte is written, since untouched memory would read as one shared page of zeros.
    """
    sharded_dim = 0
    model: dict[str, DTensor] = {}
    moments: dict[str, dict[str, Any]] = {}
    for index, (key, shape) in enumerate(model_shapes(workload).items()):
        placement: Placement = Shard(0)
        if workload.layout == "tp" and len(shape) == 1:
            placement = Replicate()
        elif workload.layout == "tp":
            placement, sharded_dim = Shard(sharded_dim), 1 - sharded_dim
        model[key] = _filled(shape, workload.torch_dtype, mesh, placement, seed=3 * index)
        if workload.optim:
            moments[key] = {
                "step": torch.tensor(1000.0),
                "exp_avg": _filled(shape, torch.float32, mesh, placement, seed=3 * index + 1),
                "exp_avg_sq": _filled(shape, torch.float32, mesh, placement, seed=3 * index + 2),
            }
    if not workload.optim:
        return {"model": model}
    group = {"params": list(model), "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
    return {"model": model, "optim": {"state": moments, "param_groups": [group]}}


def local_tensors(tree: Any) -> list[torch.Tensor]:
    """This rank's plain tensors in a nested state dict, in order."""
    if isinstance(tree, DTensor):
        return [tree.to_local()]
    if isinstance(tree, torch.Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for child in children for tensor in local_tensors(child)]


def _layer_shapes(hidden: int) -> Shapes:
    inner, kv = hidden * 38 // 7, hidden // 7
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def _numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _layers(numel: int, hidden: int) -> int:
    return int(numel * (1 - _EMBEDDING_SHARE) / _numel(_layer_shapes(hidden)))


def _greedy(nbytes: dict[str, int], max_nbytes: int) -> dict[str, int]:
    files: dict[str, int] = {}
    file, used = 1, 0
    for key, size in nbytes.items():
        if used and used + size > max_nbytes:
            file, used = file + 1, 0
        files[key] = file
        used += size
    return files


def _filled(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mesh: DeviceMesh,
    placement: Placement,
    *,
    seed: int,
) -> DTensor:
    size, _ = compute_local_shape_and_global_offset(shape, mesh, [placement])
    # What is replicated must be equal on all ranks; what is sharded should differ.
    rank = mesh.get_local_rank() if placement.is_shard() else 0
    local = torch.empty(size, dtype=dtype)
    pattern = torch.randn(4099, generator=torch.Generator().manual_seed(seed * 64 + rank)).to(dtype)
    flat = local.view(-1)
    repeats, rest = divmod(flat.numel(), pattern.numel())
    if repeats:
        flat[: repeats * pattern.numel()].view(repeats, -1).copy_(pattern)
    flat[flat.numel() - rest :].copy_(pattern[:rest])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride
    )
