"""The layout of an export against the headers of the checkpoint that the model came from."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcp_hf_writer import HFExport
from dcp_hf_writer.errors import ConfigError, CorruptCheckpointError, SpecError
from dcp_hf_writer.integrations.compare_with_base_model import swapped_dims
from dcp_hf_writer.integrations.transformers import specs_from_transformers
from support.compare import tensor_difference
from support.dense_specs import assemble
from support.hf_models import build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

Tensors = dict[str, torch.Tensor]


def based(
    model: PreTrainedModel, directory: Path, change: Callable[[Tensors], Tensors] = dict
) -> Tensors:
    """Save a model as a base in one file, changed, and return what the base has."""
    model.save_pretrained(directory)
    tensors = change(load_file(directory / "model.safetensors"))
    tensors = {key: one.contiguous() for key, one in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def found_in(model: PreTrainedModel, base: Path) -> tuple[list[str], list[str]]:
    """Return the lines of the error and of the warning that a check gives."""
    lines: tuple[list[str], list[str]] = ([], [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refused: SpecError | None = None
        try:
            specs_from_transformers(model, base=base)
        except SpecError as error:
            refused = error
    if refused is not None:
        assert refused.path == str(base)
        assert str(refused).startswith("plan: the export would have another layout than its base")
        lines[0].extend(refused.found.split("\n  - ")[1:])
    for one in caught:
        assert one.filename == __file__
        lines[1].extend(str(one.message).split("\n  - ")[1:])
    return lines


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "qwen2_vl", "ernie4_5_vl_moe"])
def test_nothing_is_said_when_the_base_has_the_same_layout(tmp_path: Path, name: str) -> None:
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert found_in(model, tmp_path) == ([], [])


def transposed(tensors: Tensors) -> Tensors:
    """Turn the experts as the hub has those of qwen3_vl_moe: (E, H, 2I) and (E, I, H)."""
    return {key: one.transpose(1, 2) if "experts" in key else one for key, one in tensors.items()}


def test_transposed_experts_are_found(tmp_path: Path) -> None:
    model = build("qwen3_vl_moe")
    based(model, tmp_path, transposed)
    errors, _ = found_in(model, tmp_path)
    # The fused projections are square here, so that only the others show it.
    assert errors[0] == (
        "looks transposed in dims 1, 2: [4, 32, 16], in the base [4, 16, 32]; orientation='base' "
        "transposes them: model.language_model.layers.0.mlp.experts.down_proj, "
        "model.language_model.layers.1.mlp.experts.down_proj"
    )
    assert errors[1].startswith(
        "square, so shapes cannot show whether the base has them transposed: "
    )
    assert len(errors) == 2


def test_specs_follow_the_orientation_of_the_base(tmp_path: Path) -> None:
    model = build("qwen3_vl_moe")
    base = based(model, tmp_path, transposed)
    specs = specs_from_transformers(model, base=tmp_path, orientation="base")
    assert tensor_difference(assemble(specs.values(), model.state_dict()), base) is None
    made = HFExport.from_transformers(model, base=tmp_path, orientation="base")
    assert made.spec_by_fqn == specs


def test_orientation_of_a_base_that_is_not_transposed_changes_nothing(tmp_path: Path) -> None:
    model = build("qwen3_vl_moe")
    based(model, tmp_path)
    specs = specs_from_transformers(model, base=tmp_path, orientation="base")
    assert specs == specs_from_transformers(model)


def test_square_tensors_that_may_be_transposed_are_named(tmp_path: Path) -> None:
    model = build("qwen3_vl_moe")
    based(model, tmp_path)
    errors, said = found_in(model, tmp_path)
    assert errors == []
    assert said == [
        (
            "square, so shapes cannot show whether the base has them transposed: "
            "'model.language_model.layers.0.mlp.experts.gate_up_proj', "
            "'model.language_model.layers.1.mlp.experts.gate_up_proj'"
        )
    ]


@pytest.mark.parametrize(
    ("shape", "base", "dims"),
    [
        ((4, 8, 6), (4, 6, 8), (1, 2)),
        ((4, 6), (6, 4), (0, 1)),
        ((4, 8, 6), (6, 8, 4), (0, 2)),
        ((4, 8, 6), (8, 6, 4), None),
        ((4, 8), (4, 8), None),
        ((4, 8), (4, 8, 1), None),
        ((4, 8), (4, 6), None),
    ],
)
def test_swapped_dims(shape: Any, base: Any, dims: Any) -> None:
    assert swapped_dims(shape, base) == dims


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        return {
            new + key.removeprefix(old) if key.startswith(old) else key: one
            for key, one in tensors.items()
        }

    return change


def test_dropped_prefix_is_found(tmp_path: Path) -> None:
    model = build("llama4")
    tensors = based(model, tmp_path, renamed("", "language_model."))
    errors, said = found_in(model, tmp_path)
    assert said == []
    assert len(errors) == 1
    assert errors[0].startswith("* is called language_model.* in the base: ")
    assert errors[0].endswith(f" and {len(tensors) - 8} more")


def test_changed_prefix_is_found(tmp_path: Path) -> None:
    model = build("qwen3")
    based(model, tmp_path, renamed("model.", "model.language_model."))
    errors, _ = found_in(model, tmp_path)
    assert [text.partition(":")[0] for text in errors] == [
        "model.* is called model.language_model.* in the base"
    ]


def test_layers_beyond_those_of_the_model_are_named(tmp_path: Path) -> None:
    def with_mtp(tensors: Tensors) -> Tensors:
        more = {
            "model.layers.2.eh_proj.weight": torch.zeros(32, 64),
            "mtp.fc.weight": torch.ones(2),
        }
        return tensors | more | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    model = build("deepseek_v3")
    based(model, tmp_path, with_mtp)
    errors, said = found_in(model, tmp_path)
    assert errors == []
    assert sorted(said) == [
        (
            "MTP layers, which the model does not have; the export lacks them: "
            "model.layers.2.eh_proj.weight, mtp.fc.weight"
        ),
        (
            "buffers that the model now computes and does not store: "
            "model.layers.0.self_attn.rotary_emb.inv_freq"
        ),
    ]


def test_keys_that_the_model_ignores_are_named(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model._keys_to_ignore_on_load_unexpected = {r"^talker"}
    type(model)._keys_to_ignore_on_load_unexpected = {r"^talker"}
    try:
        based(model, tmp_path, lambda tensors: tensors | {"talker.weight": torch.zeros(2)})
        errors, said = found_in(model, tmp_path)
    finally:
        type(model)._keys_to_ignore_on_load_unexpected = None
    assert errors == []
    assert said == ["ignored when the model is loaded; the export lacks them: talker.weight"]


def test_missing_and_added_tensors_are_refused(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        del tensors["model.layers.1.mlp.down_proj.weight"]
        return tensors | {"score.weight": torch.zeros(2, 32)}

    model = build("llama")
    based(model, tmp_path, change)
    assert found_in(model, tmp_path) == (
        [
            "not in the base: model.layers.1.mlp.down_proj.weight",
            "only in the base, missing from the export: score.weight",
        ],
        [],
    )


def test_other_shape_is_refused_but_a_resized_vocabulary_is_not(tmp_path: Path) -> None:
    model = build("llama")
    based(model, tmp_path, lambda tensors: tensors | {"model.norm.weight": torch.zeros(16)})
    model.resize_token_embeddings(104)
    errors, _ = found_in(model, tmp_path)
    assert errors[0] == "has another shape: [32], in the base [16]: model.norm.weight"
    based(build("llama"), tmp_path)
    assert found_in(model, tmp_path) == (
        [],
        [
            (
                "has another number of rows, as after resize_token_embeddings: [104, 32], "
                "in the base [97, 32]: lm_head.weight, model.embed_tokens.weight"
            )
        ],
    )


@pytest.mark.parametrize("name", ["llama_tied", "gemma3_vision"])
def test_tied_tensor_of_the_base_is_not_missed(tmp_path: Path, name: str) -> None:
    key = {"llama_tied": "lm_head.weight", "gemma3_vision": "language_model.lm_head.weight"}[name]
    model = build(name)
    based(model, tmp_path, lambda tensors: tensors | {key: torch.zeros(97, 32)})
    assert found_in(model, tmp_path) == ([], [])


def test_quantised_base_is_a_warning(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        fp8, packed = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
        scale = {f"{fp8}_scale_inv": torch.ones(1, 1)}
        blocks = {f"{packed}_blocks": torch.zeros(48, 1, 16, dtype=torch.uint8)}
        scales = {f"{packed}_scales": torch.zeros(48, 1, dtype=torch.uint8)}
        tensors[fp8] = tensors[fp8].to(torch.float8_e4m3fn)
        del tensors[packed]
        return tensors | scale | blocks | scales

    model = build("llama")
    based(model, tmp_path, change)
    assert found_in(model, tmp_path) == (
        [],
        [
            (
                "the base is quantised in model.layers.0.mlp.up_proj.weight, "
                "model.layers.0.mlp.up_proj.weight_scale_inv, "
                "model.layers.1.mlp.up_proj.weight_blocks, "
                "model.layers.1.mlp.up_proj.weight_scales; the export holds the model's own dtypes"
            )
        ],
    )


def test_other_floating_dtype_is_no_difference(tmp_path: Path) -> None:
    model = build("llama")
    based(model, tmp_path, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    assert found_in(model, tmp_path) == ([], [])


def test_base_is_refused_when_it_is_no_model_directory(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="base must be a local model directory"):
        specs_from_transformers(model, base="someone/llama")
    with pytest.raises(ConfigError, match="base has no weights"):
        specs_from_transformers(model, base=tmp_path)


def test_base_is_refused_when_a_file_of_it_cannot_be_read(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shutil.move(shards[0], tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="base cannot be read") as caught:
        specs_from_transformers(model, base=tmp_path)
    assert caught.value.path == str(shards[0])
    shards[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CorruptCheckpointError):
        specs_from_transformers(model, base=tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ConfigError, match="the index of base cannot be read"):
        specs_from_transformers(model, base=tmp_path)
