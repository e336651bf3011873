"""`dcp_writer=`: the checkpoint is the same, whoever writes its DCP half."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from dcp_hf_writer import HFDualWriter

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.checkpoint.metadata import StorageMeta


class NamingWriter(FileSystemWriter):
    """A writer that adds a fact of its own to `.metadata`."""

    def storage_meta(self) -> StorageMeta | None:
        meta = super().storage_meta()
        return None if meta is None else replace(meta, modules=["trunk"])


class NamelessWriter(FileSystemWriter):
    """A writer that puts no names into `.metadata`."""

    def storage_meta(self) -> StorageMeta | None:
        return None


def stored_names(path: Path) -> StorageMeta | None:
    """Return what stock torch reads."""
    return FileSystemReader(path).read_metadata().storage_meta


@pytest.mark.parametrize("is_async", [False, True])
def test_metadata_names_the_checkpoint_and_the_save(tmp_path: Path, *, is_async: bool) -> None:
    given = NamingWriter(tmp_path / "unused")
    writer = HFDualWriter(tmp_path / "step-1", dcp_writer=given)
    for path in (tmp_path / "step-1", tmp_path / "step-2"):
        state = {"weight": torch.ones(3)}
        if is_async:
            dcp.async_save(state, storage_writer=writer, checkpoint_id=path).result()
        else:
            dcp.save(state, storage_writer=writer, checkpoint_id=path)
        meta = stored_names(path)
        assert meta is not None
        assert (meta.checkpoint_id, meta.save_id) == (str(path), writer.save_id)
        assert meta.modules == ["trunk"]


def test_metadata_names_nothing_if_the_writer_names_nothing(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "step-1", dcp_writer=NamelessWriter(tmp_path / "unused"))
    dcp.save({"weight": torch.ones(3)}, storage_writer=writer)
    meta = stored_names(tmp_path / "step-1")
    assert meta is not None  # torch's reader adds one for the id of the load
    assert (meta.checkpoint_id, meta.save_id) == (None, None)


def test_the_writer_has_its_own_names_again_after_a_save_and_a_failure(tmp_path: Path) -> None:
    given = FileSystemWriter(tmp_path / "unused")
    writer = HFDualWriter(tmp_path / "step-1", dcp_writer=given)
    dcp.save({"weight": torch.ones(3)}, storage_writer=writer)
    assert "storage_meta" not in vars(given)

    own = given.storage_meta
    given.storage_meta = own  # type: ignore[method-assign]
    given.finish = refuse  # type: ignore[method-assign]
    with pytest.raises(BaseException, match="disk full"):
        dcp.save(
            {"weight": torch.ones(3)}, storage_writer=writer, checkpoint_id=tmp_path / "step-2"
        )
    assert vars(given)["storage_meta"] is own


def refuse(*_: object) -> None:
    msg = "disk full"
    raise OSError(msg)
