"""Save a PyTorch training run for resuming and for serving, in one asynchronous step."""

from dcp_hf_writer import errors
from dcp_hf_writer.export import HFExport
from dcp_hf_writer.slots import WriteSlots
from dcp_hf_writer.spec import LoadSpec
from dcp_hf_writer.writer import HFDualWriter

__all__ = ["HFDualWriter", "HFExport", "LoadSpec", "WriteSlots", "errors"]
