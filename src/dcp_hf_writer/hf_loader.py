"""load_hf: load a HuggingFace directory straight into sharded parameters."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from dcp_hf_writer.errors import ConfigError, MismatchError
from dcp_hf_writer.excerpts import MOST_NAMES, some_of
from dcp_hf_writer.load.choose_half import find_place, open_hf_source
from dcp_hf_writer.load.exchange_reads import Reading
from dcp_hf_writer.load.held_tensors import held_tensors
from dcp_hf_writer.load.hf_fit import HFFit, LoadTarget
from dcp_hf_writer.load.hf_source import Findings, WantedBlock
from dcp_hf_writer.load.read_hf_blocks import load_blocks
from dcp_hf_writer.load.tied_in_files import refuse_drifted_ties
from dcp_hf_writer.mapping.flattening import flat_tensors
from dcp_hf_writer.mapping.hf_export import specs_by_name
from dcp_hf_writer.mapping.model_entry import model_prefix, names_in_model
from dcp_hf_writer.mapping.wrapped_names import without_wrappers
from dcp_hf_writer.save.model_assets import is_of_transformers
from dcp_hf_writer.tensors.boxes import whole

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from dcp_hf_writer.load.choose_half import CheckpointPlace
    from dcp_hf_writer.load.held_tensors import HeldTensor
    from dcp_hf_writer.load.hf_source import HFSource
    from dcp_hf_writer.mapping.load_spec import LoadSpec

_log = logging.getLogger(__name__)


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
        specs: How runtime tensors map to HuggingFace tensors. `None` finds the names of a
            transformers model as `from_pretrained` finds them: older names, and names with or
            without the prefix of the base model. For any other model, `None` means that the names
            are the same.
        strict: Refuse names that only the model or only the directory has. Two kinds of names are
            allowed: those that the model declares optional, as transformers models do, and buffers
            that are not in the state dict of the model. With `False`, a warning in the log says how
            much was not loaded.
        key: Entry of the state dict that holds the model; `None` finds it as `HFExport` does.
        verify: Compare the bytes with the digests of the manifest before they are loaded; `path`
            must have a manifest.
        storage_options: Options for fsspec, if `path` is a URL.

    Returns:
        The names that were left out.

    Raises:
        ConfigError: If an option cannot be used as given, or a tensor is on the meta device.
        MismatchError: If tensors do not fit or, with `strict`, are missing or unexpected. One error
            lists all of them, before any weights are loaded. Also if no tensor of the model is
            there, or if the directory holds different values for tensors that the model ties.
        PlanningError: If a tensor contradicts its spec or its placements, or if the directory is
            quantised in a way that this package cannot read.
        ReadError: If there are no weights, or they cannot be read.
        CorruptCheckpointError: If files are damaged, or contradict each other.
    """
    model = _transformers_model(model_or_state_dict)
    by_name = _specs_of(model, specs)
    tensors = held_tensors(_tensors_of(model_or_state_dict, key), by_name)
    place = find_place(path, "hf", storage_options, with_manifest=verify)
    source, inputs = open_hf_source(place, by_name, names=tensors)
    with inputs:
        target = _target(tensors, model_or_state_dict if model is None else model)
        fit = target.fit(source)
        if fit.findings != Findings() and model is not None and specs is None:
            fit = min(fit, _fit_as_from_pretrained(model, source, target), key=HFFit.count)
        _check(fit, target, place, strict=strict)
        dtypes = {name: held.tensor.dtype for name, held in tensors.items()}
        refuse_drifted_ties(place, fit.source, inputs, fit.tied, dtypes)
        parts = [(name, box, to) for name in fit.chosen for box, to in tensors[name].parts]
        blocks = [WantedBlock(name, box, to) for name, box, to in parts if box.numel]
        alone = Reading(None)
        load_blocks(place, fit.source, inputs, blocks, is_verified=verify, reading=alone)
    if fit.findings != Findings():
        _log_left_out(fit.findings, tensors, place.weights.path)
    return LoadedKeys(tuple(sorted(fit.findings.missing)), tuple(sorted(fit.findings.unexpected)))


_HINT = (
    "if names differ or are tied, pass specs=[LoadSpec(...)], with alias_of for tied names; "
    "strict=False loads what is there"
)
_UNEXPECTED_HINT = "strict=False leaves out what the model does not have"


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


def _transformers_model(given: object) -> Any:
    """Return the transformers model inside wrappers; `None` if there is none."""
    while isinstance(given, DistributedDataParallel) or hasattr(given, "_orig_mod"):
        is_ddp = isinstance(given, DistributedDataParallel)
        given = given.module if is_ddp else given._orig_mod  # type: ignore[attr-defined] # noqa: SLF001
    return given if is_of_transformers(given, "PreTrainedModel") else None


def _target(tensors: Mapping[str, HeldTensor], given: object) -> LoadTarget:
    if not isinstance(given, torch.nn.Module):
        return LoadTarget(tensors, None, {})
    named = given.named_parameters(remove_duplicate=False)
    return LoadTarget(tensors, given, {without_wrappers(name): id(one) for name, one in named})


def _specs_of(
    model: Any, specs: Mapping[str, LoadSpec] | Iterable[LoadSpec] | None
) -> dict[str, LoadSpec]:
    if specs is None and model is not None:
        from dcp_hf_writer.integrations.transformers import (  # noqa: PLC0415 - optional
            specs_from_transformers,
        )

        specs = specs_from_transformers(model)
    return specs_by_name(specs)


def _fit_as_from_pretrained(model: Any, source: HFSource, target: LoadTarget) -> HFFit:
    """Read the names of the directory as `from_pretrained` reads them."""
    from dcp_hf_writer.integrations.transformers_hub_names import (  # noqa: PLC0415 - optional
        hub_names,
    )

    names = hub_names(model, source.stand_ins())
    return target.fit(
        source.with_specs(names.specs),
        absent=names.absent,
        failed=names.failed,
        renamed=names.unused,
    )


def _check(fit: HFFit, target: LoadTarget, place: CheckpointPlace, *, strict: bool) -> None:
    """Refuse a directory that does not fit.

    Raises:
        MismatchError: If it does not fit, or holds no tensor of the model.
    """
    path, found = place.weights.path, fit.findings
    bad = found if strict else Findings(mismatched=found.mismatched)
    if fit.is_empty:
        bad = Findings(tuple(target.tensors), found.mismatched, tuple(fit.source.stored))
        if bad == Findings():
            raise MismatchError("there are no tensors to load", phase="plan", path=path)
    if bad != Findings():
        is_named = found.missing or fit.is_empty
        bad.refuse(path, hint=_HINT if is_named else _UNEXPECTED_HINT if bad.unexpected else None)


def _log_left_out(findings: Findings, tensors: Mapping[str, HeldTensor], path: str) -> None:
    every = {name: whole(held.shape).numel for name, held in tensors.items()}
    left = sum(every[name] for name in findings.missing)
    _log.warning(
        "load_hf: %d of %d tensors of the model (%d of %d elements) are not in %s and keep their "
        "values: %s; %d tensors there were not loaded: %s",
        len(findings.missing),
        len(every),
        left,
        sum(every.values()),
        path,
        some_of(sorted(findings.missing), most=MOST_NAMES) or "none",
        len(findings.unexpected),
        some_of(sorted(findings.unexpected), most=MOST_NAMES) or "none",
    )
