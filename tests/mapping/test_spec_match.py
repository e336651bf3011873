"""Which tensors of a state dict a spec holds for."""

from __future__ import annotations

import pytest

from dcp_hf_writer.errors import ModelKeyError
from dcp_hf_writer.mapping.load_spec import LoadSpec
from dcp_hf_writer.mapping.spec_match import match_specs

NAME = "layers.0.w"
SPECS = {name: LoadSpec(name, name, (4, 2)) for name in (NAME, "w", "optim.factor")}


def owner(
    *path: str | int, key: str | None = None, model: str = "model"
) -> tuple[str, bool] | None:
    """Return the name of the spec that a tensor beside the model belongs to, and how."""
    fqn = ".".join(map(str, path))
    paths = {f"{model}.{NAME}": (model, NAME), fqn: path}
    match = match_specs(paths, SPECS, key=key).get(fqn)
    return None if match is None else (match.spec.name, match.is_kept_beside)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        # The parameter itself, its key flat or nested.
        (("model", NAME), (NAME, False)),
        (("model", "layers", 0, "w"), (NAME, False)),
        (("model", "w"), ("w", False)),
        # Within the model, only the whole name counts.
        (("model", "other." + NAME), None),
        (("model", "state." + NAME + ".exp_avg"), None),
        # Optimizer state: nested, flattened by torch, and flattened whole.
        (("optim", "state", NAME, "exp_avg"), (NAME, True)),
        (("optim", f"state.{NAME}.exp_avg"), (NAME, True)),
        ((f"optim.state.{NAME}.exp_avg",), (NAME, True)),
        (("optim", 0, "state", NAME, "exp_avg"), (NAME, True)),
        (("optim", "state", "w", "exp_avg"), ("w", True)),
        # That of another parameter whose name ends alike, or begins alike.
        (("optim", "state", f"other.{NAME}", "exp_avg"), None),
        (("optim", "state", f"{NAME}.deeper", "exp_avg"), None),
        (("optim", "state", 0, "exp_avg"), None),
        (("optim", "param_groups", NAME, "lr"), None),
        # A module that is called state.
        (("optim", "state", "state.w", "exp_avg"), ("w", True)),
        # Copies of the model.
        (("ema", NAME), (NAME, True)),
        (("ema", "model", NAME), (NAME, True)),
        (("ema", "layers", 0, "w"), (NAME, True)),
        (("optim", "state", NAME), (NAME, True)),
        (("ema", f"other.{NAME}"), None),
        (("a", "b", "c", NAME), None),
        # A tensor that a spec names by its whole path.
        (("optim", "factor"), ("optim.factor", False)),
    ],
    ids=str,
)
def test_spec_holds_for(path: tuple[str | int, ...], found: tuple[str, bool] | None) -> None:
    assert owner(*path) == found


def test_the_entry_that_is_named_is_the_model() -> None:
    assert owner("ema", NAME, key="ema") == (NAME, False)
    with pytest.raises(ModelKeyError):
        match_specs({"a.w": ("a", "w"), "b.w": ("b", "w")}, SPECS, key=None)


def test_a_state_dict_without_a_model_has_optimizer_state_only() -> None:
    path = ("optim", "state", NAME, "exp_avg")
    found = match_specs({".".join(path): path}, SPECS, key=None)
    assert found[".".join(path)].is_kept_beside


def test_a_state_dict_that_is_the_model_has_it_at_the_top() -> None:
    paths = {NAME: (NAME,), "optim.state.w.x": ("optim", "state", "w", "x")}
    found = match_specs(paths, SPECS, key=None)
    assert {fqn: match.is_kept_beside for fqn, match in found.items()} == {
        NAME: False,
        "optim.state.w.x": True,
    }
