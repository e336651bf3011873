"""Which entry of a state dict holds the model."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from dcp_hf_writer.errors import ModelKeyError
from dcp_hf_writer.mapping.model_entry import NOT_WEIGHTS, model_prefix, names_in_model

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


def test_error_counts_tensors_at_the_top() -> None:
    with pytest.raises(ModelKeyError, match=r"entries with tensors: \['net'\], 1 tensors"):
        names_of({"net": W, "extra": 0})


def test_entries_that_hold_no_weights_are_left_out_of_a_bare_model() -> None:
    assert names_of({**W, **dict.fromkeys(NOT_WEIGHTS, 0)}) == list(W)
