"""Which entry of a state dict holds the model."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from dcp_hf_writer.errors import ModelKeyError
from dcp_hf_writer.mapping.model_entry import (
    NOT_WEIGHTS,
    holds_weights,
    is_usual_beside,
    left_out_of_model,
    model_prefix,
    names_in_model,
)

W = {"layers.0.w": 0, "norm": 0}
OPTIM = {"state": {"layers.0.w": {"exp_avg": 0}}, "param_groups": [{"lr": 0}]}


def names_of(state_dict: dict[str, object], *, key: str | None = None) -> list[str]:
    """Return the model's names, with the tensors of a state dict that are numbers here."""
    _, paths = flatten_state_dict(state_dict)
    prefix = model_prefix(paths, key=key)
    return list(names_in_model(paths, prefix).values())


@pytest.mark.parametrize(
    "state_dict",
    [
        {"model": W},
        {"model": W, "optim": OPTIM},
        {"model": W, "ema": W, "teacher": W},
        {"net": W, "optimizer": OPTIM},
        {"app": {"model": W, "optim": OPTIM}},
        {"app": {"model": W}, "step": 0},
        W,
        {**W, "optim": OPTIM, "step": 0},
        {**W, "lr_scheduler": {"base_lr": 0}},
    ],
    ids=[
        "model alone",
        "model and optimizer",
        "model before others",
        "one other name",
        "model in an app",
        "model in an app beside a step",
        "bare",
        "bare beside an optimizer",
        "bare beside a scheduler",
    ],
)
def test_model_is_found(state_dict: dict[str, object]) -> None:
    assert names_of(state_dict) == list(W)


def test_names_keep_the_dots_of_keys_and_join_nested_entries() -> None:
    tensor = torch.zeros(1)
    state_dict = {"model": {"a.b": {"c": tensor}, "d": [tensor, tensor]}}
    assert names_of(state_dict) == ["a.b.c", "d.0", "d.1"]


def test_tensor_called_model_is_a_tensor_of_a_bare_model() -> None:
    assert names_of({"model": 0, "head": 0}) == ["model", "head"]


@pytest.mark.parametrize(
    ("key", "state_dict"),
    [
        ("ema", {"model": {"other": 0}, "ema": W}),
        ("app.model", {"app": {"model": W, "ema": {"other": 0}}, "model": {"other": 0}}),
        ("app.v1.model", {"app.v1": {"model": W}, "model": {"other": 0}}),
        ("optim", {"optim": W, "model": {"other": 0}}),
    ],
)
def test_model_is_the_entry_that_is_named(key: str, state_dict: dict[str, object]) -> None:
    assert names_of(state_dict, key=key) == list(W)


@pytest.mark.parametrize(
    ("state_dict", "key"),
    [
        ({"actor": W, "critic": W}, None),
        ({"net": W, "extra": 0}, None),
        ({"app": {"model": W}, "net": W}, None),
        ({"optim": OPTIM, "step": 0}, None),
        ({"model": W}, "ema"),
        ({"model": W}, "mod"),
        ({"model": W, "other": W}, "model.layers.0"),
        ({}, None),
    ],
    ids=[
        "two entries",
        "an entry and a tensor",
        "two that could be meant",
        "nothing but an optimizer",
        "no such entry",
        "the start of a name",
        "the start of a key",
        "nothing",
    ],
)
def test_error_lists_the_choices_when_the_model_is_not_clear(
    state_dict: dict[str, object], key: str | None
) -> None:
    with pytest.raises(ModelKeyError, match="HFExport") as caught:
        names_of(state_dict, key=key)
    nested = sorted(name for name, value in state_dict.items() if isinstance(value, dict))
    assert f"entries with tensors: {nested}" in str(caught.value)


def test_error_counts_tensors_at_the_top_and_says_how_to_name_them() -> None:
    with pytest.raises(
        ModelKeyError, match=r"entries with tensors: \['net'\], 1 tensors"
    ) as caught:
        names_of({"net": W, "extra": 0})
    assert 'put the tensors at the top into an entry "model"' in str(caught.value)


COMMON = [*sorted(NOT_WEIGHTS), "model", "module", "state", "ema", "extra"]


@pytest.mark.parametrize("name", COMMON)
def test_parameter_of_a_bare_model_is_exported_whatever_it_is_called(name: str) -> None:
    assert names_of({name: 0}) == [name]
    assert names_of({**W, name: 0, f"{name}.weight": 0}) == [*W, name, f"{name}.weight"]


@pytest.mark.parametrize("name", ["scaler", "config", "optimizer", "sampler", "metrics", "args"])
def test_parameter_is_exported_when_an_optimizer_lies_beside_a_bare_model(name: str) -> None:
    assert names_of({**W, name: 0, "optim": OPTIM}) == [*W, name]


def test_counter_beside_a_bare_model_is_the_trainers_unless_it_is_trained() -> None:
    assert names_of({**W, "step": 0, "rng_state": 0, "optim": OPTIM}) == list(W)
    for optim in (
        {"state": {"step": {"exp_avg": 0}}},
        {"state.step.exp_avg": 0},
        [{"state": {"step": {"exp_avg": 0}}}],
    ):
        assert names_of({**W, "step": 0, "optim": optim}) == [*W, "step"]


EXTRA = [
    {"_extra_state": 0},
    {"_extra_state": {"amax": 0}},
    {"layers.0._extra_state": 0},
    {"layers.0._extra_state": {"amax": {"history": [0, 0]}}},
]


@pytest.mark.parametrize("extra", EXTRA, ids=str)
@pytest.mark.parametrize("entry", [None, "model", "net", "module"])
def test_extra_state_is_no_entry_and_not_exported(
    extra: dict[str, object], entry: str | None
) -> None:
    state_dict = {**W, **extra}
    assert names_of(state_dict if entry is None else {entry: state_dict}) == list(W)


def test_parameter_with_a_name_like_extra_state_is_exported() -> None:
    assert names_of({"my_extra_state": 0, "a.x_extra_state": 0}) == [
        "my_extra_state",
        "a.x_extra_state",
    ]


@pytest.mark.parametrize(
    "moments",
    [
        {"state.layers.0.w.exp_avg": 0, "state.norm.step": 0, "param_groups.norm.lr": 0},
        {"optim.state.layers.0.w.exp_avg": 0},
        {"state": {"norm": {"exp_avg": 0}}, "param_groups": [{"lr": 0}]},
        {"state": {0: {"exp_avg": 0}, 1: {"step": 0}}},
    ],
    ids=["flattened", "flattened with an entry", "by name", "by number"],
)
def test_moments_beside_a_bare_model_are_not_exported(moments: dict[str, object]) -> None:
    assert names_of({**W, **moments}) == list(W)


def test_module_called_state_is_exported() -> None:
    names = ["w", "state.weight", "state.0.bias", "param_groups.x.y", "a.state.b.c"]
    assert names_of(dict.fromkeys(names, 0)) == names


@pytest.mark.parametrize(
    "state_dict",
    [
        {},
        {"optim": OPTIM},
        {"optimizer": {"m": 0}, "step": 0},
        {"state": {0: {"exp_avg": 0}}},
        {"optim": OPTIM, "_extra_state": {"amax": 0}},
    ],
    ids=["nothing", "optimizer", "optimizer and step", "optimizer at the top", "extra state"],
)
def test_state_dict_of_a_trainer_alone_holds_no_weights(state_dict: dict[str, object]) -> None:
    _, paths = flatten_state_dict(state_dict)
    assert not holds_weights(paths)


@pytest.mark.parametrize("state_dict", [W, {"model": W}, {"a": W, "b": W}, {"step": 0}])
def test_state_dict_holds_weights_when_a_model_may_be_in_it(state_dict: dict[str, object]) -> None:
    _, paths = flatten_state_dict(state_dict)
    assert holds_weights(paths)


@pytest.mark.parametrize(
    "state_dict",
    [
        {"module": W, "optimizer": OPTIM, "lr_scheduler": {"last": 0}},
        {"state_dict": W, "optimizer_states": [OPTIM], "callbacks": {"early": {"best": 0}}},
        {"model_state_dict": W, "optimizer_state_dict": OPTIM, "epoch": 0, "loss": 0},
        {"app": {"net": W}},
        {"app": {"module": W, "optim": OPTIM, "lr_scheduler": {"last": 0}}},
        {"train": {"model": W, "optim": OPTIM}},
        {"model": {"model": W, "optim": OPTIM}},
        {"model": [{"layers.0.w": 0}, {"norm": 0}]},
        {"model": [W]},
    ],
    ids=[
        "DeepSpeed",
        "Lightning",
        "tutorial",
        "one other name",
        "module in an app",
        "app of another name",
        "app called model",
        "parts of a pipeline",
        "one part",
    ],
)
def test_model_is_found_where_trainers_put_it(state_dict: dict[str, object]) -> None:
    found = names_of(state_dict)
    assert found == (["net." + name for name in W] if "net" in str(state_dict) else list(W))


def test_module_called_model_in_a_nested_model_keeps_its_name() -> None:
    assert names_of({"model": {"model": {"w": 0}, "lm_head": {"w": 0}}}) == ["model.w", "lm_head.w"]


def test_list_of_whole_models_is_refused_and_the_error_names_one_part() -> None:
    with pytest.raises(ModelKeyError, match=r'HFExport\(key="model.0"\)'):
        names_of({"model": [W, W]})
    assert names_of({"model": [W, {"other": 0}]}, key="model.0") == list(W)


def test_what_is_left_out_is_told_by_entry_and_kind() -> None:
    state_dict = {**W, "_extra_state": 0, "state.norm.step": 0, "optim": OPTIM, "step": 0}
    _, paths = flatten_state_dict(state_dict)
    names = names_in_model(paths, ())
    assert left_out_of_model(paths, (), names) == [
        "extra state of modules, `_extra_state` (1 tensor)",
        "flattened optimizer state, `state.*` (1 tensor)",
        "entry 'optim' (2 tensors)",
        "tensor 'step' (1 tensor)",
    ]


def test_what_lies_beside_a_model_in_an_app_is_told_by_its_own_entry() -> None:
    _, paths = flatten_state_dict({"app": {"model": W, "optim": OPTIM}, "ema": W})
    prefix = model_prefix(paths, key="app.model")
    assert left_out_of_model(paths, prefix, names_in_model(paths, prefix)) == [
        "entry 'app.optim' (2 tensors)",
        "entry 'ema' (2 tensors)",
    ]
    assert [
        is_usual_beside(paths[fqn], prefix) for fqn in ("app.optim.param_groups.0.lr", "ema.norm")
    ] == [
        True,
        False,
    ]
