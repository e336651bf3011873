"""load_hf: load a HuggingFace directory straight into sharded parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import ConfigError, PlanningError
from dcp_hf_writer.load.choose_half import find_place, open_hf_source
from dcp_hf_writer.load.exchange_reads import Reading
from dcp_hf_writer.load.hf_source import Findings, HFSource, WantedBlock
from dcp_hf_writer.load.read_hf_blocks import load_blocks
from dcp_hf_writer.mapping.flattening import flat_tensors
from dcp_hf_writer.mapping.hf_export import specs_by_name
from dcp_hf_writer.mapping.model_entry import model_prefix, names_in_model
from dcp_hf_writer.preflight.check_placements import refuse_partial
from dcp_hf_writer.staging.same_memory import memory_identity
from dcp_hf_writer.tensors.boxes import whole
from dcp_hf_writer.tensors.shards import blocks_of, shards_of
from dcp_hf_writer.torch_seam.multi_block_tensors import blocked_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.tensors.boxes import Box, Shape


@dataclass(frozen=True, slots=True)
class LoadedKeys:
    """The names that `load_hf` left out; both tuples are empty with `strict=True`."""

    missing: tuple[str, ...]
    """Runtime tensors that the directory does not hold; they keep their old values. Sorted."""
    unexpected: tuple[str, ...]
    """Tensors of the directory that no runtime tensor was loaded from. Sorted."""


def load_hf(
    model_or_state_dict: torch.nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    specs: Mapping[str, LoadSpec] | Iterable[LoadSpec] | None = None,
    strict: bool = True,
    key: str | None = None,
    verify: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> LoadedKeys:
    """Load a HuggingFace directory into a model, in place.

        model = AutoModelForCausalLM.from_config(config)     # on the meta device
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        model.to_empty(device="cuda")
        load_hf(model, snapshot_download("Qwen/Qwen3-30B-A3B"))     # of huggingface_hub

    The directory may come from `HFDualWriter` or from a hub. Each rank reads only the bytes of its
    own shards; no rank ever holds a full tensor, and there is no communication. Floats are cast to
    the dtype of the parameters; fp8 and mxfp4 weights are dequantised. Buffers that are not in the
    state dict, such as rotary frequencies, keep their values.

    Args:
        model_or_state_dict: A model or its state dict. Each tensor is a DTensor with any
            placements, a plain tensor that its spec declares to be a shard, or a whole tensor.
        path: The directory, one of its files (weights or index), or a checkpoint that contains the
            directory; a local path or an fsspec URL.
        specs: How runtime tensors map to HuggingFace tensors. `None` derives the specs of a
            transformers model; for any other model, it means that the names are the same.
        strict: Refuse names that only the model or only the directory has. Two kinds of names are
            allowed: those that the model declares optional, as transformers models do, and buffers
            that are not in the state dict of the model.
        key: Entry of the state dict that holds the model; `None` finds it as `HFExport` does.
        verify: Compare the bytes with the digests of the manifest before they are loaded; `path`
            must have a manifest.
        storage_options: Options for fsspec, if `path` is a URL.

    Returns:
        The names that were left out.

    Raises:
        ConfigError: If an option cannot be used as given, or a tensor is on the meta device.
        MismatchError: If tensors do not fit or, with `strict`, are missing or unexpected. One error
            lists all of them, before any weights are read.
        PlanningError: If a tensor contradicts its spec or its placements, or if the directory is
            quantised in a way that this package cannot read.
        ReadError: If there are no weights, or they cannot be read.
        CorruptCheckpointError: If files are damaged, or contradict each other.
    """
    by_name = _specs_of(model_or_state_dict, specs)
    tensors = _held(_tensors_of(model_or_state_dict, key), by_name)
    place = find_place(path, "hf", storage_options, with_manifest=verify)
    source, inputs = open_hf_source(place, by_name, names=tensors)
    with inputs:
        chosen, findings = _choose(source, tensors)
        findings = _without_expected(findings, model_or_state_dict)
        bad = findings if strict else Findings(mismatched=findings.mismatched)
        if bad != Findings():
            bad.refuse(place.weights.path, hint=_HINT if findings.missing else None)
        parts = [(name, box, target) for name in chosen for box, target in tensors[name].parts]
        blocks = [WantedBlock(name, box, target) for name, box, target in parts if box.numel]
        alone = Reading(None)
        load_blocks(place, source, inputs, blocks, is_verified=verify, reading=alone)
    return LoadedKeys(tuple(sorted(findings.missing)), tuple(sorted(findings.unexpected)))


_HINT = (
    "if names differ or are tied, pass specs=[LoadSpec(...)], with alias_of for tied names; "
    "strict=False loads what is there"
)


def _tensors_of(
    model_or_state_dict: torch.nn.Module | Mapping[str, Any], key: str | None
) -> dict[str, torch.Tensor]:
    """Return the tensors to load into, by their names within the model."""
    if isinstance(model_or_state_dict, torch.nn.Module):
        # This state dict lacks the prefixes of wrappers: DDP, torch.compile, activation
        # checkpointing.
        state_dict: Mapping[str, Any] = get_model_state_dict(model_or_state_dict)
        found = {name: v for name, v in state_dict.items() if isinstance(v, torch.Tensor)}
    else:
        flat = flat_tensors(model_or_state_dict)
        paths = {fqn: path for fqn, (path, _) in flat.items()}
        prefix = model_prefix(paths, key=key) if paths else ()
        found = {name: flat[fqn][1] for fqn, name in names_in_model(paths, prefix).items()}
    on_meta = [name for name, tensor in found.items() if tensor.is_meta]
    if on_meta:
        raise ConfigError(
            "tensors on the meta device have no memory to load into",
            found=f"{len(on_meta)} of {len(found)}, such as {on_meta[0]!r}",
            hint="shard the model, then call model.to_empty(device=...)",
        )
    return found


def _specs_of(
    model: object, specs: Mapping[str, LoadSpec] | Iterable[LoadSpec] | None
) -> dict[str, LoadSpec]:
    if specs is None and any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    ):
        from dcp_hf_writer.integrations.transformers import (  # noqa: PLC0415 - optional
            specs_from_transformers,
        )

        specs = specs_from_transformers(model)
    return specs_by_name(specs)


def _choose(source: HFSource, tensors: Mapping[str, _Held]) -> tuple[list[str], Findings]:
    """Choose one name for each memory, because tied tensors share it; find what does not fit."""
    chosen: dict[Any, str] = {}
    missing: dict[str, Any] = {}
    taken: set[str] = set()
    for name, held in tensors.items():
        identity = memory_identity(held.tensor) or name
        if source.missing_keys(name):
            missing[name] = identity
        else:
            chosen.setdefault(identity, name)
            taken |= source.keys_of(name)
    faults = {
        name: source.fault(name, tensors[name].shape, tensors[name].tensor.dtype)
        for name in chosen.values()
    }
    findings = Findings(
        tuple(name for name, identity in missing.items() if identity not in chosen),
        tuple(f"{name} ({fault})" for name, fault in faults.items() if fault is not None),
        tuple(source.stored.keys() - taken),
    )
    return list(chosen.values()), findings


def _without_expected(findings: Findings, model: object) -> Findings:
    """Drop names that a model declares optional, and buffers that it creates itself.

    Source:
        transformers, `PreTrainedModel._adjust_missing_and_unexpected_keys`.
    """
    if not isinstance(model, torch.nn.Module):
        return findings
    buffers = {name for name, _ in model.named_buffers()}
    unexpected = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        # Old checkpoints hold this buffer once per layer. New models have it only once.
        unexpected.append(r"rotary_emb\.inv_freq")
    missing = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    return replace(
        findings,
        missing=tuple(name for name in findings.missing if not _matches(name, missing)),
        unexpected=tuple(
            key
            for key in findings.unexpected
            if key not in buffers and not _matches(key, unexpected)
        ),
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


@dataclass(frozen=True, eq=False, slots=True)
class _Held:
    """The parts of one tensor of the model that this rank holds."""

    tensor: torch.Tensor
    """The tensor in the state dict."""
    shape: Shape
    """Shape of the whole tensor."""
    parts: tuple[tuple[Box, torch.Tensor], ...]
    """Blocks of the whole tensor, and the memory of each."""


def _held(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, LoadSpec]) -> dict[str, _Held]:
    """Find the blocks of each tensor that this rank holds."""
    refuse_partial(tensors, phase="read")
    blocked = blocked_tensors(dict(tensors), {}, specs, key=None)
    found = {}
    for name, tensor in tensors.items():
        special = blocked.get(name)
        if special is not None:
            boxes = [block.global_box for block in special.blocks]
            parts = tuple((box, special.part(box.offsets)) for box in boxes)
            found[name] = _Held(tensor, special.shape, parts)
        elif isinstance(tensor, DTensor):
            found[name] = _Held(tensor, tuple(tensor.shape), tuple(_placed(name, tensor)))
        else:
            shape = tuple(tensor.shape)
            found[name] = _Held(tensor, shape, ((whole(shape), tensor.detach()),))
    return found


def _placed(name: str, tensor: DTensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """Yield the block of a DTensor that this rank holds, if it holds any."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return
    local = tensor.to_local().detach()
    shards = shards_of(tensor.placements, tensor.device_mesh.shape, coordinate)
    blocks = blocks_of(tuple(tensor.shape), shards)
    if local.numel() != sum(block.global_box.numel for block in blocks) or len(blocks) > 1:
        raise PlanningError(
            "a rank's part of a tensor does not match its placements",
            phase="plan",
            fqn=name,
            expected=f"blocks of shapes {[list(block.global_box.sizes) for block in blocks]}",
            found=f"one local tensor of shape {list(local.shape)}",
        )
    for block in blocks:
        yield block.global_box, local
