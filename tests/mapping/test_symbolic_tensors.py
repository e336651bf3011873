"""Symbolic tensors: what a function does with them is what it does with data."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer import LoadSpec
from dcp_hf_writer.errors import SpecError
from dcp_hf_writer.mapping.specs_from_function import derive, specs_from_function
from dcp_hf_writer.mapping.symbolic_tensors import SymbolicTensor
from support.dense_specs import assemble, compiled, differences

if TYPE_CHECKING:
    from collections.abc import Callable

Tensors = dict[str, Any]
Function = "Callable[[Tensors], Tensors]"


def numbered(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return tensors whose elements all differ."""
    found, first = {}, 0
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        found[name] = torch.arange(first, first + numel, dtype=torch.float32).reshape(shape)
        first += numel
    return found


def check(function: Callable[[Tensors], Tensors], tensors: dict[str, torch.Tensor]) -> None:
    """Compare the specs of a function, carried out, with what it does with data."""
    specs = specs_from_function(function, tensors).values()
    assert [spec.name for spec in specs] == list(tensors)
    # `contiguous` leaves the strides of dimensions of one index as they are.
    expected = {
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in function(dict(tensors)).items()
    }
    assert differences(assemble(specs, tensors), expected) == []
    assert differences(compiled(specs, tensors), expected) == []


@dataclass(frozen=True)
class Step:
    """An operation that can be applied to a tensor."""

    text: str
    apply: Callable[[Any], Any]

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Numbers:
    """What is drawn for one operation on a tensor of a shape."""

    shape: tuple[int, ...]
    dim: int
    other_dim: int
    first: int
    count: int
    step: int
    order: list[int]

    @property
    def size(self) -> int:
        return self.shape[self.dim]

    @property
    def factors(self) -> list[int]:
        return [n for n in range(1, self.size + 1) if self.size % n == 0]


def rotated(tensor: Any, dim: int, by: int) -> Any:
    return torch.cat(
        [tensor.narrow(dim, by, tensor.shape[dim] - by), tensor.narrow(dim, 0, by)], dim
    )


ANY_SHAPE: dict[str, Callable[[Any, Numbers], Any]] = {
    "contiguous": lambda t, _: t.contiguous(),
    "clone": lambda t, _: t.clone(),
    "detach": lambda t, _: t.detach(),
    "squeeze": lambda t, _: t.squeeze(),
    "unsqueeze": lambda t, n: t.unsqueeze(n.dim),
    "flatten": lambda t, _: t.flatten(),
}
WITH_DIMS: dict[str, Callable[[Any, Numbers], Any]] = {
    "narrow": lambda t, n: t.narrow(n.dim, n.first, n.count),
    "slice": lambda t, n: t[(slice(None),) * n.dim + (slice(n.first, n.first + n.count, n.step),)],
    "ellipsis": lambda t, n: t[..., None, n.first % t.shape[-1]],
    "select": lambda t, n: t.select(n.dim, n.first),
    "chunk": lambda t, n: t.chunk(n.count, n.dim)[-1],
    "split": lambda t, n: t.split([n.first, n.size - n.first], n.dim)[1],
    "unbind": lambda t, n: t.unbind(n.dim)[n.first],
    "cat": lambda t, n: rotated(t, n.dim, n.first),
    "stack": lambda t, n: torch.stack(t.unbind(n.dim)[::-1], min(n.other_dim, t.ndim - 1)),
    "transpose": lambda t, n: t.transpose(n.dim, n.other_dim),
    "movedim": lambda t, n: t.movedim(n.dim, n.other_dim),
    "permute": lambda t, n: t.permute(n.order),
    "mT": lambda t, _: t.mT if t.ndim > 1 else t.t(),
    "unflatten": lambda t, n: t.unflatten(n.dim, (-1, n.factors[n.first % len(n.factors)])),
    "reshape": lambda t, n: t.reshape(n.factors[n.first % len(n.factors)], -1),
    "view": lambda t, n: t.contiguous().view(-1, n.factors[n.first % len(n.factors)]),
}


@st.composite
def steps(draw: st.DrawFn, shape: tuple[int, ...]) -> Step:
    """Draw one operation that a tensor of a shape allows."""
    ndim = len(shape)
    kinds = ANY_SHAPE | WITH_DIMS if ndim else ANY_SHAPE
    kind = draw(st.sampled_from(sorted(kinds)))
    dim, other_dim = (draw(st.integers(0, max(ndim - 1, 0))) for _ in range(2))
    size = shape[dim] if ndim else 1
    first = draw(st.integers(0, size - 1))
    numbers = Numbers(
        shape,
        dim,
        other_dim,
        first,
        count=draw(st.integers(1, size - first)),
        step=draw(st.integers(1, 3)),
        order=draw(st.permutations(range(ndim))),
    )
    return Step(f"{kind} {numbers}", lambda t: kinds[kind](t, numbers))


shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_specs_do_what_the_function_does(data: st.DataObject) -> None:
    shape = data.draw(shapes, "shape")
    tensors = numbered(w=shape)
    value, done = tensors["w"], []
    for _ in range(data.draw(st.integers(1, 6), "steps")):
        if not value.numel():
            break
        done.append(data.draw(steps(tuple(value.shape)), "step"))
        value = done[-1].apply(value)

    def function(given: Tensors) -> Tensors:
        found = given["w"]
        for step in done:
            found = step.apply(found)
        return {"hf": found}

    check(function, tensors)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_specs_join_tensors_as_the_function_does(data: st.DataObject) -> None:
    dim, ndim = data.draw(st.sampled_from([(0, 1), (0, 2), (1, 2), (1, 3)]), "dims")
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4), "sizes")
    others = [2, 3, 4][:ndim]
    made = {f"w{i}": (*others[:dim], n, *others[dim + 1 :]) for i, n in enumerate(sizes)}
    after = data.draw(steps((*others[:dim], sum(sizes), *others[dim + 1 :])), "after")

    def function(given: Tensors) -> Tensors:
        joined = torch.cat(list(given.values()), dim)
        return {"joined": after.apply(joined), "copy": joined.transpose(0, -1).reshape(-1)}

    check(function, numbered(**made))


def split_experts(given: Tensors) -> Tensors:
    """Split stacked experts as the hub has them."""
    found = {}
    for name, half in zip(("gate", "up"), given["gate_up"].chunk(2, dim=1), strict=True):
        for e, one in enumerate(torch.chunk(half.contiguous(), half.shape[0])):
            found[f"{e}.{name}"] = one.squeeze(0)
    for e, one in enumerate(given["down"].unbind()):
        found[f"{e}.down"] = one
    return found


def permute_heads(given: Tensors) -> Tensors:
    rows = given["q"]
    turned = rows.view(4, 3, 2, 5).transpose(1, 2).reshape(24, 5).clone()
    return {"q": turned, "k": given["k"]}


def interleave(given: Tensors) -> Tensors:
    both = torch.stack([given["gate"], given["up"]], dim=1)
    return {"both": both.reshape(-1, both.shape[-1])}


def deinterleave(given: Tensors) -> Tensors:
    w = given["w"]
    return {"gate": w[::2], "up": w[1::2]}


LAYOUTS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, torch.Tensor]]] = {
    "experts": (split_experts, numbered(gate_up=(4, 6, 5), down=(4, 5, 3))),
    "heads": (permute_heads, numbered(q=(24, 5), k=(8, 5))),
    "interleave": (interleave, numbered(gate=(4, 3), up=(4, 3))),
    "deinterleave": (deinterleave, numbered(w=(8, 3))),
    "reshape": (lambda t: {"conv": t["w"].reshape(4, 3, 2, 2, 2)}, numbered(w=(4, 24))),
    "transpose": (lambda t: {"w": t["w"].transpose(1, 2).contiguous()}, numbered(w=(3, 4, 5))),
    "unequal": (
        lambda t: {"qkv": torch.cat([t["q"], t["k"], t["v"]])},
        numbered(q=(8, 3), k=(2, 3), v=(2, 3)),
    ),
    "scalar": (
        lambda t: {"s": t["s"].reshape(1, 1), "v": t["v"].squeeze()},
        numbered(s=(), v=(1,)),
    ),
    "copies": (lambda t: {"s": copy.deepcopy(t["s"]).data.detach()}, numbered(s=(3, 4))),
    "uneven reshape": (
        lambda t: {"w": t["w"][1:, 1:].reshape(-1)[2:26].view(6, 4).T.reshape(3, 8)},
        numbered(w=(5, 8)),
    ),
    "empty parts": (
        lambda t: {"w": torch.cat([t["none"], t["w"]]), "none": t["none"]},
        numbered(none=(0,), w=(4,)),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_specs_say_the_layout(name: str) -> None:
    if name == "empty parts":
        function, tensors = LAYOUTS[name]
        specs = specs_from_function(function, tensors).values()
        assert differences(assemble(specs, tensors), function(tensors)) == []
        return
    check(*LAYOUTS[name])


def test_plain_forms_are_found() -> None:
    tensors = numbered(same=(4, 3), old=(4, 3), qkv=(8, 6), gate_up=(2, 6, 3), turned=(2, 3))
    specs = specs_from_function(
        lambda t: {
            "same": t["same"],
            "new": t["old"].clone(),
            **dict(zip("qkv", t["qkv"].split([4, 2, 2]), strict=True)),
            **dict(zip(("gate", "up"), t["gate_up"].chunk(2, dim=1), strict=True)),
            "w.T": t["turned"].T,
        },
        tensors,
    )
    assert specs["same"] == LoadSpec("same", "same", (4, 3))
    assert specs["old"] == LoadSpec("old", "new", (4, 3))
    assert specs["qkv"] == LoadSpec("qkv", ("q", "k", "v"), (8, 6), 0, fused_sizes=(4, 2, 2))
    assert specs["gate_up"] == LoadSpec("gate_up", ("gate", "up"), (2, 6, 3), 1)
    assert specs["turned"].pieces is not None


def test_parts_in_another_order_are_no_plain_form() -> None:
    tensors = numbered(w=(4, 3))
    specs = specs_from_function(
        lambda t: dict(zip("ba", t["w"].chunk(2)[::-1], strict=True)), tensors
    )
    assert specs["w"].hf_keys == ("b", "a")
    assert specs["w"].pieces is not None


def test_keys_that_share_memory_are_one_group() -> None:
    function, tensors = LAYOUTS["experts"]
    derived = derive(function, tensors)
    assert derived.groups == tuple(
        tuple(f"{e}.{name}" for e in range(4)) for name in ("gate", "up", "down")
    )
    real = function(tensors)
    pointers = [{real[key].untyped_storage().data_ptr() for key in one} for one in derived.groups]
    assert all(len(one) == 1 for one in pointers)
    assert len(set.union(*pointers)) == len(pointers)


def test_left_out_tensor_gets_a_spec_without_keys() -> None:
    specs = specs_from_function(lambda t: {"w": t["w"]}, numbered(w=(2,), step=(3,)))
    assert specs["step"] == LoadSpec("step", (), (3,), pieces=())
    assert specs["step"].parts == ()


def test_cast_becomes_the_dtype_of_the_spec() -> None:
    tensors = numbered(w=(4, 3), v=(2,))
    function: Any = lambda t: {"w": t["w"].to(torch.bfloat16), "v": t["v"].to(torch.float32)}  # noqa: E731
    specs = specs_from_function(function, tensors)
    assert specs["w"] == LoadSpec("w", "w", (4, 3), dtype=torch.bfloat16)
    assert specs["v"] == LoadSpec("v", "v", (2,))
    check(function, tensors)


def test_device_moves_change_nothing() -> None:
    specs = specs_from_function(lambda t: {"w": t["w"].cpu().to("cpu")}, numbered(w=(2,)))
    assert specs["w"] == LoadSpec("w", "w", (2,))


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "add": (lambda w: w + 1, "aten.add.Tensor"),
    "in place": (lambda w: w.add_(1), "aten.add_.Tensor"),
    "assignment": (lambda w: w.__setitem__(0, w[1]) or w, "aten.copy_"),
    "matmul": (lambda w: w @ w.mT, "aten"),
    "index by list": (lambda w: w[[1, 0]], "aten.index.Tensor"),
    "mask": (lambda w: w[w > 0], "aten.gt.Scalar"),
    "flip": (lambda w: w.flip(0), "aten.flip"),
    "roll": (lambda w: w.roll(1, 0), "aten.roll"),
    "repeat": (lambda w: w.repeat(2, 1), "aten.repeat"),
    "expand": (lambda w: w[None].expand(3, -1, -1), "expand"),
    "repeat_interleave": (lambda w: w.repeat_interleave(2, 0), "expand"),
    "unfold": (lambda w: w.unfold(0, 2, 1), "repeats elements"),
    "pad": (lambda w: torch.nn.functional.pad(w, (0, 1)), "aten.constant_pad_nd"),
    "fill": (torch.zeros_like, "aten.zeros_like"),
    "cat with others": (lambda w: torch.cat([w, torch.zeros(1, 3)]), "aten.cat"),
    "copy into others": (lambda w: torch.zeros(4, 3).copy_(w), "aten.copy_"),
    "other bits": (lambda w: w.view(torch.int32), "aten.view.dtype"),
    "value": (lambda w: w[0, 0].item(), "aten._local_scalar_dense"),
    "condition": (lambda w: w if w[0, 0] > 0 else -w, "aten.gt"),
    "numpy": (lambda w: torch.from_numpy(w.numpy()), "access to the data"),
    "list": (lambda w: torch.tensor(w.tolist()), "access to the data"),
    "storage": (lambda w: w[: w.untyped_storage().nbytes()], "access to the data"),
    "cast to integers": (lambda w: w.long(), "a cast from torch.float32 to torch.int64"),
    "rounded twice": (lambda w: w.bfloat16().float(), "a cast from torch.bfloat16"),
    "fp8": (lambda w: w.to(torch.float8_e4m3fn), "a cast from torch.float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_function_is_refused_when_it_does_more_than_copy(name: str) -> None:
    apply, found = REFUSED[name]
    with pytest.raises(SpecError, match="does more than copy elements") as caught:
        specs_from_function(lambda t: {"hf": apply(t["w"])}, numbered(w=(4, 3)))
    assert caught.value.fqn == "w"
    assert found in caught.value.found


def test_function_is_refused_when_it_returns_other_tensors() -> None:
    with pytest.raises(SpecError, match="not made of the model's tensors") as caught:
        specs_from_function(lambda _: {"hf": torch.zeros(2)}, numbered(w=(4, 3)))
    assert caught.value.key == "hf"


def test_function_is_refused_when_it_casts_parts_to_several_dtypes() -> None:
    with pytest.raises(SpecError, match="cast to several dtypes") as caught:
        specs_from_function(lambda t: {"a": t["w"][:2], "b": t["w"][2:].half()}, numbered(w=(4, 3)))
    assert caught.value.fqn == "w"


def test_error_of_the_function_itself_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        specs_from_function(lambda t: {"hf": t["w"].view(5, 5)}, numbered(w=(4, 3)))


def test_symbolic_tensor_looks_like_the_real_one() -> None:
    seen = []

    def function(given: Tensors) -> Tensors:
        seen.append(given["w"].transpose(0, 1))
        return given

    specs_from_function(function, {"w": torch.zeros(4, 3, dtype=torch.bfloat16)})
    (w,) = seen
    real = torch.zeros(4, 3, dtype=torch.bfloat16).transpose(0, 1)
    assert isinstance(w, SymbolicTensor)
    assert (w.shape, w.size(0), w.ndim, w.dim(), w.numel()) == (real.shape, 3, 2, 2, 12)
    assert (w.dtype, w.device, w.stride()) == (real.dtype, real.device, real.stride())
    assert (w.is_contiguous(), w.itemsize, w.nbytes) == (False, 2, 24)
    assert repr(w) == "SymbolicTensor([3, 4], torch.bfloat16, of ['w'])"


def test_addresses_are_those_of_aligned_memory() -> None:
    def function(given: Tensors) -> Tensors:
        w, v = given["w"], given["v"]
        assert w.data_ptr() % 64 == 0
        assert w.data_ptr() == w.view(-1).data_ptr() != v.data_ptr()
        assert w[1].data_ptr() - w.data_ptr() == 12
        assert w.clone().data_ptr() != w.data_ptr()
        return given

    specs_from_function(function, numbered(w=(4, 3), v=(4, 3)))


def test_large_model_takes_seconds() -> None:
    # The experts of ten layers of DeepSeek-V3: 20 tensors that become 7,680.
    shapes = {"gate_up": (256, 4096, 7168), "down": (256, 7168, 2048)}
    tensors = {
        f"{layer}.{name}": torch.empty(shape, device="meta")
        for layer in range(10)
        for name, shape in shapes.items()
    }

    def function(given: Tensors) -> Tensors:
        found = {}
        for layer in range(10):
            named = {name: given[f"{layer}.{name}"] for name in shapes}
            found |= {f"{layer}.{key}": one for key, one in split_experts(named).items()}
        return found

    start = time.monotonic()
    specs = specs_from_function(function, tensors)
    assert sum(len(spec.hf_keys) for spec in specs.values()) == 7_680
    # Half a second where this was written; the bound is for a machine under load.
    assert time.monotonic() - start < 10
