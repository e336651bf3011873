"""load_hf finds the tensors of a hub directory where from_pretrained finds them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, load_hf
from dcp_hf_writer.errors import MismatchError
from dcp_hf_writer.hf_loader import LoadedKeys
from support.hf_models import build
from support.hub_names import CASES, make
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for name, case in CASES.items():
        case.write(root / name)
    return root


def from_pretrained(name: str, hub: Path) -> tuple[Mapping[str, torch.Tensor], set[str], int]:
    """Return the tensors, the missing names, and the number of unexpected names."""
    kind = type(CASES[name].target())
    model, info = kind.from_pretrained(hub / name, output_loading_info=True)
    return model.state_dict(), set(info["missing_keys"]), len(info["unexpected_keys"])


def wrong(name: str, model: nn.Module, keys: LoadedKeys, hub: Path) -> list[str]:
    """Say what differs from `from_pretrained`; the ranks of a sharded model all call this."""
    expected, missing, unexpected = from_pretrained(name, hub)
    before = CASES[name].target().state_dict()
    found = {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in model.state_dict().items()
    }
    assert found.keys() == expected.keys()
    bad = [key for key in missing if not torch.equal(found[key], before[key])]
    bad += [key for key in expected.keys() - missing if not torch.equal(found[key], expected[key])]
    if (set(keys.missing), len(keys.unexpected)) != (missing, unexpected):
        bad.append(f"{keys} instead of {missing} and {unexpected}")
    return [f"{name}: {one}" for one in bad]


@pytest.mark.parametrize("name", CASES)
def test_names_are_those_of_from_pretrained(name: str, hub: Path) -> None:
    model = CASES[name].target()
    if CASES[name].is_partial:
        with pytest.raises(MismatchError):
            load_hf(model, hub / name)
        assert wrong(name, model, load_hf(model, hub / name, strict=False), hub) == []
    else:
        assert wrong(name, model, load_hf(model, hub / name), hub) == []


def load_sharded(rank: int, world_size: int, hub: Path) -> list[str]:
    found = []
    for name, case in CASES.items():
        model = case.target()
        fully_shard(model)
        keys = load_hf(model, hub / name, strict=not case.is_partial)
        found += wrong(name, model, keys, hub)
    return found


def test_names_are_those_of_from_pretrained_under_fsdp(hub: Path) -> None:
    assert run_ranks(load_sharded, 2, hub, timeout_s=200) == [[], []]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_wrapped_model_has_the_names_of_the_model_in_it(hub: Path) -> None:
    name = "gpt2_without_prefix"
    model = CASES[name].target()
    keys = load_hf(torch.compile(model), hub / name)  # type: ignore[arg-type]
    assert wrong(name, model, keys, hub) == []


def test_only_the_names_without_a_partner_are_refused(hub: Path) -> None:
    for name, text in (
        ("llama_into_base", "found 1 unexpected: lm_head.weight"),
        ("bert_gamma_base_into_head", "found 2 missing: classifier.bias; classifier.weight;"),
    ):
        with pytest.raises(MismatchError) as caught:
            load_hf(CASES[name].target(), hub / name)
        assert text in str(caught.value)


def test_missing_expert_is_refused_with_both_shapes(tmp_path: Path) -> None:
    model = build("mixtral")
    model.base_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    left = {key: one for key, one in tensors.items() if ".experts.3." not in key}
    assert len(left) < len(tensors)
    save_file(left, file, {"format": "pt"})
    for strict in (True, False):
        with pytest.raises(MismatchError) as caught:
            load_hf(model, tmp_path, strict=strict)
        assert "experts.down_proj (shape [4, 32, 16], stored as [3, 32, 16])" in str(caught.value)


def test_conversion_that_fails_is_refused_by_name(tmp_path: Path) -> None:
    model = build("mixtral")
    model.base_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if ".experts.2.w2." in key)
    tensors[key] = torch.zeros(5, 7)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MismatchError, match=r"experts\.down_proj \(its conversion fails: "):
        load_hf(model, tmp_path, strict=False)


class Inner(nn.Module):
    """A model that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)


def test_prefix_that_nobody_resolves_is_named(tmp_path: Path) -> None:
    model = Inner()
    save_file(
        {f"net.{key}": one for key, one in model.state_dict().items()}, tmp_path / "a.safetensors"
    )
    for target in (model, model.state_dict()):
        with pytest.raises(MismatchError, match=r"have the prefix 'net\.', which the "):
            load_hf(target, tmp_path / "a.safetensors")
    with pytest.raises(MismatchError, match=r"prefix 'net\.'"):
        load_hf(model, tmp_path / "a.safetensors", strict=False)
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    outer = nn.ModuleDict({"net": nn.ModuleDict({"body": model})})
    with pytest.raises(MismatchError, match=r"lack the prefix 'net\.body\.' of the"):
        load_hf(outer, tmp_path / "b.safetensors")
    reader = HFDualReader(tmp_path / "b.safetensors", source="hf")
    with pytest.raises(CheckpointException, match=r"lack the prefix 'net\.body\.' of the"):
        dcp.load({"model": outer.state_dict()}, storage_reader=reader, no_dist=True)


def test_lenient_load_logs_how_much_it_left(hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "bert_gamma_base_into_head"
    model = CASES[name].target()
    every = sum(one.numel() for one in model.state_dict().values())
    with caplog.at_level(logging.WARNING, "dcp_hf_writer"):
        load_hf(model, hub / name, strict=False)
    (line,) = caplog.messages
    assert f"2 of {len(model.state_dict())} tensors of the model (66 of {every} elements)" in line
    assert "classifier.bias, classifier.weight" in line
    caplog.clear()
    load_hf(CASES["bert_gamma"].target(), hub / "bert_gamma", strict=False)
    assert caplog.messages == []


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_load_of_nothing_is_refused(tmp_path: Path, strict: bool) -> None:  # noqa: FBT001
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    model = Inner()
    model._keys_to_ignore_on_load_missing = ["."]  # type: ignore[assignment]
    for target in (model, model.state_dict(), {}):
        with pytest.raises(MismatchError, match="other"):
            load_hf(target, tmp_path, strict=strict)


def drifted(directory: Path) -> PreTrainedModel:
    """Save a model whose config says that the head is tied, and whose head is not."""
    model = build("llama_tied")
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach() + 1)
    export = HFExport(assets=model)
    state_dict = {"model": model.state_dict()}
    dcp.save(state_dict, storage_writer=HFDualWriter(directory, export=export), no_dist=True)
    return model


TIE = r"lm_head\.weight \(tied to model\.embed_tokens\.weight in the model, but stored with other"


def test_tie_that_drifted_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    saved = drifted(tmp_path / "x").state_dict()
    model = make("llama_tied", "LlamaForCausalLM", seed=2)
    before = {key: one.clone() for key, one in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(MismatchError, match=TIE):
            load_hf(model, tmp_path / "x", strict=strict)
    reader = HFDualReader(tmp_path / "x", source="hf")
    with pytest.raises(CheckpointException, match=TIE):
        dcp.load({"model": model.state_dict()}, storage_reader=reader, no_dist=True)
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
    # What the message advises.
    untied = make("llama", "LlamaForCausalLM", seed=2)
    load_hf(untied, tmp_path / "x")
    assert all(torch.equal(one, saved[key]) for key, one in untied.state_dict().items())


def test_tie_that_is_stored_twice_with_equal_values_is_loaded(tmp_path: Path) -> None:
    model = build("llama_tied")
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": weight.detach().clone()}, file, {"format": "pt"})
    other = make("llama_tied", "LlamaForCausalLM", seed=2)
    assert load_hf(other, tmp_path) == LoadedKeys((), ())
    assert torch.equal(other.lm_head.weight.nan_to_num(), weight.nan_to_num())
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(98, 32)}, file, {"format": "pt"})
    with pytest.raises(MismatchError, match=r"lm_head\.weight \(.*\[98, 32\]"):
        load_hf(other, tmp_path)


def refuse_drifted(rank: int, world_size: int, directory: Path) -> str:
    model = make("llama_tied", "LlamaForCausalLM", seed=2)
    fully_shard(model)
    with pytest.raises(MismatchError) as caught:
        load_hf(model, directory)
    return str(caught.value)


def test_every_rank_refuses_a_tie_of_which_one_row_drifted(tmp_path: Path) -> None:
    model = build("llama_tied")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, file, {"format": "pt"})
    first, second = run_ranks(refuse_drifted, 2, tmp_path)
    assert first == second
    assert "1 mismatched: lm_head.weight (tied to model.embed_tokens.weight" in first
