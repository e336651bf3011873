"""Find which tensors of a model a HuggingFace directory holds, and what does not fit."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.load.hf_source import Findings
from dcp_hf_writer.staging.same_memory import memory_identity

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    import torch

    from dcp_hf_writer.load.held_tensors import HeldTensor
    from dcp_hf_writer.load.hf_source import HFSource


@dataclass(frozen=True, slots=True)
class HFFit:
    """What a directory gives to the tensors of a model, under one way to read its names."""

    source: HFSource
    """The directory, with the specs of that way."""
    chosen: tuple[str, ...]
    """Names to load: one for each memory, because tied tensors share it."""
    tied: tuple[tuple[str, ...], ...]
    """Names of stored tensors that share one memory, two or more in each group."""
    findings: Findings
    """What does not fit, without what the model declares optional."""

    @property
    def is_empty(self) -> bool:
        """Whether no tensor of the model is stored."""
        return not self.chosen

    def count(self) -> tuple[int, int, int]:
        """Return a key that is lower for a better fit."""
        found = self.findings
        return len(found.missing), len(found.mismatched), len(found.unexpected)


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """The tensors to load into."""

    tensors: Mapping[str, HeldTensor]
    module: torch.nn.Module | None
    """The module that holds them; `None` for a state dict."""
    parameters: Mapping[str, int]
    """A number that identifies the parameter of each tensor, by name; empty for a state dict."""

    def identity(self, name: str) -> Any:
        """Return what identifies the memory of a tensor; equal for tied tensors.

        A shard without elements has no memory, so its parameter identifies it. Without that, such a
        rank would miss a tie that the other ranks see.
        """
        memory = memory_identity(self.tensors[name].tensor)
        return self.parameters.get(name, name) if memory is None else memory

    def fit(
        self,
        source: HFSource,
        *,
        absent: Collection[str] = (),
        failed: Mapping[str, str] | None = None,
        renamed: Mapping[str, str] | None = None,
    ) -> HFFit:
        """Find which tensors are stored, and what does not fit.

        Args:
            source: The directory.
            absent: Names that are not stored, even if the directory has a tensor of this name.
            failed: Why a tensor cannot be loaded, by name.
            renamed: Runtime names of stored tensors that belong to no tensor, by key.
        """
        unfit = dict(failed or {})
        stored: dict[Any, list[str]] = {}
        missing: dict[str, Any] = {}
        for name in self.tensors:
            if name in absent or name in unfit or source.missing_keys(name):
                missing[name] = self.identity(name)
            else:
                stored.setdefault(self.identity(name), []).append(name)
        names = [name for group in stored.values() for name in group]
        for name in names:
            held = self.tensors[name]
            if (fault := source.fault(name, held.shape, held.tensor.dtype)) is not None:
                unfit[name] = fault
        taken = {key for name in names for key in source.keys_of(name)}
        left = [name for name, identity in missing.items() if identity not in stored]
        findings = Findings(
            tuple(name for name in left if name not in unfit),
            tuple(f"{name} ({fault})" for name, fault in unfit.items()),
            tuple(source.stored.keys() - taken),
        )
        return HFFit(
            source,
            tuple(group[0] for group in stored.values()),
            tuple(tuple(group) for group in stored.values() if len(group) > 1),
            _without_expected(findings, self.module, renamed or {}),
        )


def _without_expected(
    findings: Findings, module: torch.nn.Module | None, renamed: Mapping[str, str]
) -> Findings:
    """Drop names that a model declares optional, and buffers that it creates itself.

    Source:
        transformers, `PreTrainedModel._adjust_missing_and_unexpected_keys`.
    """
    if module is None:
        return findings
    buffers = {name for name, _ in module.named_buffers()}
    unexpected = list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        # Old checkpoints hold this buffer once per layer. New models have it only once.
        unexpected.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        # Old checkpoints hold these buffers too. New models compute them.
        unexpected.append(r"(^|\.)position_ids$")
    missing = list(getattr(module, "_keys_to_ignore_on_load_missing", None) or ())
    # transformers compares the runtime names. The patterns of other models may mean stored names.
    names = {key: {key, renamed.get(key, key)} for key in findings.unexpected}
    return replace(
        findings,
        missing=tuple(name for name in findings.missing if not _matches(name, missing)),
        unexpected=tuple(
            key
            for key, both in names.items()
            if not both & buffers and not any(_matches(name, unexpected) for name in both)
        ),
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
