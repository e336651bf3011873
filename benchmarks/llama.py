"""State dicts of Llama's shapes on one device, whole, as one GPU of a small job holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Llama:
    """Sizes of a model."""

    title: str
    """For people."""
    vocabulary: int
    """Rows of the embedding."""
    hidden: int
    """Width."""
    inner: int
    """Width within the MLP."""
    kv: int
    """Rows of the key and value projections."""
    layers: int
    """Number of layers."""
    is_tied: bool
    """Whether the output layer is the embedding."""


LLAMA_1B = Llama("1B", 128_256, 2048, 8192, 512, 16, is_tied=True)
LLAMA_8B = Llama("8B", 128_256, 4096, 14_336, 1024, 32, is_tied=False)
LLAMA_TINY = Llama("tiny", 4096, 256, 1024, 64, 2, is_tied=False)


def shapes_of(model: Llama) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in state-dict order."""
    hidden, inner, kv = model.hidden, model.inner, model.kv
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocabulary, hidden)}
    for i in range(model.layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not model.is_tied:
        shapes["lm_head.weight"] = (model.vocabulary, hidden)
    return shapes


def build_on(device: str, model: Llama, *, adam: bool) -> dict[str, Any]:
    """Make the state dict of a model, as `state_of` does."""
    return state_of(device, shapes_of(model), adam=adam)


def state_of(device: str, shapes: dict[str, tuple[int, ...]], *, adam: bool) -> dict[str, Any]:
    """Make the state dict with random bf16 weights, and with `adam` the two fp32 moments too.

    Adam's step counters are in host memory, where `torch.optim.Adam` has them.
    """
    generator = torch.Generator(device).manual_seed(1)

    def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    weights = {name: filled(shape, DTYPE) for name, shape in shapes.items()}
    if not adam:
        return {"model": weights}
    moments = {
        name: {
            "step": torch.tensor(1000.0),
            "exp_avg": filled(shape, torch.float32),
            "exp_avg_sq": filled(shape, torch.float32),
        }
        for name, shape in shapes.items()
    }
    group = {"params": list(shapes), "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
    return {"model": weights, "optim": {"state": moments, "param_groups": [group]}}


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a nested state dict in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else ():
        yield from tensors_of(child)
