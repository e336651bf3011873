"""Save a PyTorch training run in one asynchronous step, both to resume it and to serve it."""

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
from dcp_hf_writer.save.per_rank import PerRank
from dcp_hf_writer.storage.write_slots import WriteSlots
from dcp_hf_writer.stream.bucket_stream import iter_hf_buckets
from dcp_hf_writer.torch_seam.planners import HFLoadPlanner, HFSavePlanner
from dcp_hf_writer.writer import HFDualWriter

__all__ = [
    "CheckpointManager",
    "EverySeconds",
    "EverySteps",
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
    "specs_from_function",
    "specs_from_transformers",
    "verify",
]
