"""DeepSeek-V3 as simulated ranks plan it: expert parallelism over 64 ranks, FSDP over 16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer import LoadSpec
from dcp_hf_writer.mapping.load_spec import Piece
from simulated import rank_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.checkpoint.planner import SavePlan

Shape = tuple[int, ...]

HIDDEN, VOCABULARY = 7168, 129_280
DENSE_LAYERS, DENSE_WIDTH = 3, 18_432
EXPERTS, EXPERT_WIDTH = 256, 2048

ATTENTION: dict[str, Shape] = {
    "self_attn.q_a_proj.weight": (1536, HIDDEN),
    "self_attn.q_a_layernorm.weight": (1536,),
    "self_attn.q_b_proj.weight": (24_576, 1536),
    "self_attn.kv_a_proj_with_mqa.weight": (576, HIDDEN),
    "self_attn.kv_a_layernorm.weight": (512,),
    "self_attn.kv_b_proj.weight": (32_768, 512),
    "self_attn.o_proj.weight": (HIDDEN, 16_384),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}
DENSE: dict[str, Shape] = {
    "mlp.gate_proj.weight": (DENSE_WIDTH, HIDDEN),
    "mlp.up_proj.weight": (DENSE_WIDTH, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, DENSE_WIDTH),
}
SPARSE: dict[str, Shape] = {
    "mlp.gate.weight": (EXPERTS, HIDDEN),
    "mlp.gate.e_score_correction_bias": (EXPERTS,),
    "mlp.experts.gate_up_proj": (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN),
    "mlp.experts.down_proj": (EXPERTS, HIDDEN, EXPERT_WIDTH),
    "mlp.shared_experts.gate_proj.weight": (EXPERT_WIDTH, HIDDEN),
    "mlp.shared_experts.up_proj.weight": (EXPERT_WIDTH, HIDDEN),
    "mlp.shared_experts.down_proj.weight": (HIDDEN, EXPERT_WIDTH),
}


@dataclass(frozen=True, slots=True)
class Mesh:
    """How the ranks share the model; experts are cut over `expert` first."""

    expert: int = 64
    """Ranks that share the experts."""
    fsdp: int = 16
    """Ranks that share one expert, along its rows."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.expert * self.fsdp


def runtime_shapes(layers: int) -> dict[str, Shape]:
    """Return the shape of each runtime tensor, in state-dict order; 61 layers are DeepSeek-V3."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        of_layer = ATTENTION | (DENSE if layer < DENSE_LAYERS else SPARSE)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def expert_pieces(layers: int) -> dict[str, list[Piece]]:
    """Return the pieces of each stack of experts: `R[e, 0:I]`, `R[e, I:2I]` and `D[e]`."""
    of_name = {}
    for layer in range(DENSE_LAYERS, layers):
        experts = f"model.layers.{layer}.mlp.experts"
        of_name[f"{experts}.gate_up_proj"] = [
            _rows(f"{experts}.{expert}.{name}_proj.weight", 2 * expert + half, EXPERT_WIDTH, HIDDEN)
            for expert in range(EXPERTS)
            for half, name in enumerate(("gate", "up"))
        ]
        of_name[f"{experts}.down_proj"] = [
            _rows(f"{experts}.{expert}.down_proj.weight", expert, HIDDEN, EXPERT_WIDTH)
            for expert in range(EXPERTS)
        ]
    return of_name


def compile_specs(pieces: dict[str, list[Piece]]) -> list[LoadSpec]:
    """Return the specs of the experts."""
    shapes = {
        "gate_up_proj": SPARSE["mlp.experts.gate_up_proj"],
        "down_proj": SPARSE["mlp.experts.down_proj"],
    }
    return [
        LoadSpec(name, global_shape=shapes[name.rpartition(".")[2]], pieces=parts)
        for name, parts in pieces.items()
    ]


def local_plans(layers: int, mesh: Mesh) -> Iterator[SavePlan]:
    """Yield what DCP's default planner makes of each rank's shards."""
    shapes = runtime_shapes(layers)
    paths = {f"model.{name}": ("model", name) for name in shapes}
    sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
    for rank in range(mesh.size):
        shards = []
        for fqn, (_, name) in paths.items():
            offsets, extent = _chunk(name, shapes[name], rank, mesh)
            shards.append((fqn, torch.Size(offsets), torch.Size(extent), sizes[name]))
        yield rank_plan(rank, paths, shards)


def transposed(key: str, rows: int, columns: int) -> Piece:
    """Return the piece that is the transpose of a whole runtime tensor."""
    return Piece(key, (columns, rows), ((columns, rows, 1), (rows, 1, columns)))


def _rows(key: str, number: int, rows: int, columns: int) -> Piece:
    numel = rows * columns
    return Piece(key, (rows, columns), ((numel, 1, 1),), start=number * numel)


def _chunk(name: str, shape: Shape, rank: int, mesh: Mesh) -> tuple[Sequence[int], Sequence[int]]:
    """Return offsets and sizes of a rank's shard; at the end, and empty, for ranks without one."""
    if ".experts." not in name:
        start, extent = _torch_chunk(shape[0], mesh.size, rank)
        return (start, *[0] * (len(shape) - 1)), (extent, *shape[1:])
    first, experts = _torch_chunk(shape[0], mesh.expert, rank % mesh.expert)
    row, rows = _torch_chunk(shape[1], mesh.fsdp, rank // mesh.expert)
    return (first, row, 0), (experts, rows, shape[2])


def _torch_chunk(extent: int, count: int, index: int) -> tuple[int, int]:
    size = math.ceil(extent / count)
    start = min(index * size, extent)
    return start, min(size, extent - start)
