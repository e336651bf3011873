"""Save a PyTorch training run in one asynchronous step, both to resume it and to serve it."""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcp_hf_writer import errors
    from dcp_hf_writer.check.materialize import materialize
    from dcp_hf_writer.check.verify import VerifyReport, verify
    from dcp_hf_writer.checkpoint_manager import CheckpointManager
    from dcp_hf_writer.hf_loader import LoadedKeys, load_hf
    from dcp_hf_writer.integrations.transformers import specs_from_transformers
    from dcp_hf_writer.manager.cadence import EverySeconds, EverySteps, FirstStep, LastStep
    from dcp_hf_writer.manager.failure_policy import Retry, SaveFailure
    from dcp_hf_writer.manager.on_signal import OnSignal
    from dcp_hf_writer.manager.retention import KeepBest
    from dcp_hf_writer.manager.save_report import SaveReport
    from dcp_hf_writer.manager.step_names import StepNames
    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.mapping.load_spec import LoadSpec, Piece, ShardSpec
    from dcp_hf_writer.mapping.specs_from_function import specs_from_function
    from dcp_hf_writer.reader import HFDualReader
    from dcp_hf_writer.save.finished_save import FinishedSave
    from dcp_hf_writer.save.mirror_jobs import resume_mirrors
    from dcp_hf_writer.save.mirror_to import FinishedMirror, MirrorTo
    from dcp_hf_writer.save.per_rank import PerRank
    from dcp_hf_writer.storage.write_slots import WriteSlots
    from dcp_hf_writer.stream.bucket_stream import iter_hf_buckets
    from dcp_hf_writer.torch_seam.planners import HFLoadPlanner, HFSavePlanner
    from dcp_hf_writer.writer import HFDualWriter

__all__ = [
    "CheckpointManager",
    "EverySeconds",
    "EverySteps",
    "FinishedMirror",
    "FinishedSave",
    "FirstStep",
    "HFDualReader",
    "HFDualWriter",
    "HFExport",
    "HFLoadPlanner",
    "HFSavePlanner",
    "KeepBest",
    "LastStep",
    "LoadSpec",
    "LoadedKeys",
    "MirrorTo",
    "OnSignal",
    "PerRank",
    "Piece",
    "Retry",
    "SaveFailure",
    "SaveReport",
    "ShardSpec",
    "StepNames",
    "VerifyReport",
    "WriteSlots",
    "errors",
    "iter_hf_buckets",
    "load_hf",
    "materialize",
    "resume_mirrors",
    "specs_from_function",
    "specs_from_transformers",
    "verify",
]

# Where each name comes from. Importing all of them imports torch, which takes seconds, so a name is
# imported when it is used first: `dcp-hf --help` needs none.
_HOME = {
    "CheckpointManager": "checkpoint_manager",
    "EverySeconds": "manager.cadence",
    "EverySteps": "manager.cadence",
    "FinishedMirror": "save.mirror_to",
    "FinishedSave": "save.finished_save",
    "FirstStep": "manager.cadence",
    "HFDualReader": "reader",
    "HFDualWriter": "writer",
    "HFExport": "mapping.hf_export",
    "HFLoadPlanner": "torch_seam.planners",
    "HFSavePlanner": "torch_seam.planners",
    "KeepBest": "manager.retention",
    "LastStep": "manager.cadence",
    "LoadSpec": "mapping.load_spec",
    "LoadedKeys": "hf_loader",
    "MirrorTo": "save.mirror_to",
    "OnSignal": "manager.on_signal",
    "PerRank": "save.per_rank",
    "Piece": "mapping.load_spec",
    "Retry": "manager.failure_policy",
    "SaveFailure": "manager.failure_policy",
    "SaveReport": "manager.save_report",
    "ShardSpec": "mapping.load_spec",
    "StepNames": "manager.step_names",
    "VerifyReport": "check.verify",
    "WriteSlots": "storage.write_slots",
    "errors": "errors",
    "iter_hf_buckets": "stream.bucket_stream",
    "load_hf": "hf_loader",
    "materialize": "check.materialize",
    "resume_mirrors": "save.mirror_jobs",
    "specs_from_function": "mapping.specs_from_function",
    "specs_from_transformers": "integrations.transformers",
    "verify": "check.verify",
}


def __getattr__(name: str) -> object:
    """Import a public name at its first use."""
    home = _HOME.get(name)
    if home is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    module = _import_module(f"{__name__}.{home}")
    found = module if name == home else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
