"""The staged copy of one save, kept until the save has succeeded, so that it can be tried again."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.staging import AsyncStager

from dcp_hf_writer.staging.staged_state_dict import StagedStateDict

if TYPE_CHECKING:
    from dcp_hf_writer.save.async_stager import SlabStager
    from dcp_hf_writer.staging.stager import Copies


class KeptSnapshot(AsyncStager):
    """Stages once; each further `stage` returns the same content to another save."""

    def __init__(self, writer: SlabStager) -> None:
        """Stage through the writer of the save."""
        self._writer = writer
        self._staged: Any = None

    def stage(self, state_dict: dict[str, Any]) -> Any:
        """Copy the state dict the first time; after that, return the copy and ignore it."""
        if self._staged is None:
            self._staged = self._writer.stage(state_dict)
        else:
            self._staged = self._writer.stage_again(self._kept())
        return self._staged

    def _kept(self) -> StagedStateDict:
        staged = self._staged
        # The save is over, so an overlapped staging is, too.
        if isinstance(staged, Future):
            staged = staged.result()
        assert isinstance(staged, StagedStateDict)
        return staged

    @property
    def copies(self) -> Copies | None:
        """The copies of an overlapped staging, for the guard of the optimizer."""
        return self._writer.copies

    @property
    def should_synchronize_after_execute(self) -> bool:
        """As the writer."""
        return self._writer.should_synchronize_after_execute

    def synchronize_staging(self) -> None:
        """As the writer."""
        self._writer.synchronize_staging()

    def close(self) -> None:
        """Do nothing: the memory belongs to the process."""
