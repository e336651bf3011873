"""What an `ExportError` says: where the published half is, what is missing, and how much room."""

from __future__ import annotations

import errno
import logging
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, load_hf
from dcp_hf_writer.errors import CheckpointError, ExportError, ReadError
from support.mounts import mount_tmpfs, needs_mounts
from support.own_errors import own_errors
from support.processes import in_fresh_process
from support.unwilling import Unwilling

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def state() -> dict[str, Any]:
    return {"model": {"w": torch.ones(1024, 1024, dtype=torch.bfloat16)}, "step": 3}


EXPORTS: dict[str, dict[str, Any]] = {
    # The weights alone take 4 MiB, and 2 MiB in the DCP half; the device has 5 MiB.
    "weights": {"dtype": torch.float32},
    "asset": {"assets": {"big.bin.txt": bytes(8 * MIB)}},
    "asset that fails": {"assets": [Unwilling()]},
}


def failed(root: Path, what: str, how: str) -> tuple[CheckpointError, list[str], bool, str]:
    mount_tmpfs(root, "size=5m" if what != "weights" else "size=3m")
    path = root / "run" / "step-1"
    writer = HFDualWriter(path, export=HFExport(**EXPORTS[what]))
    try:
        if how == "save":
            dcp.save(state(), storage_writer=writer, no_dist=True)
        else:
            dcp.async_save(state(), storage_writer=writer).result()
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        (found,) = own_errors(error)
    loaded = {"model": {"w": torch.zeros(1024, 1024, dtype=torch.bfloat16)}, "step": 0}
    dcp.load(loaded, storage_reader=HFDualReader(path), no_dist=True)
    is_whole = torch.equal(loaded["model"]["w"], state()["model"]["w"])  # type: ignore[index]
    try:
        load_hf(loaded["model"], path)  # type: ignore[arg-type]
        said = ""
    except ReadError as error:
        said = str(error)
    return found, sorted(os.listdir(path)), is_whole, said


@needs_mounts
@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.parametrize("what", EXPORTS)
def test_export_error_names_the_published_half_and_what_is_missing(
    what: str, how: str, tmp_path: Path
) -> None:
    error, files, is_whole, said = in_fresh_process(failed, tmp_path, what, how)
    path = tmp_path / "run" / "step-1"
    assert type(error) is ExportError
    assert error.path == str(path)
    text = str(error)
    assert "the DCP half is published, the HuggingFace half is missing" in text
    assert f"expected {path}/hf/" in text
    assert ".incomplete" not in text
    assert "nothing was published" not in text
    assert files == [".metadata", "__0_0.distcp", "dcp-hf", "dcp-hf.json"]
    assert is_whole
    # The manifest keeps the reason, and a load of the missing half gives it.
    assert "the HuggingFace half is missing" in said
    if what == "asset that fails":
        assert "no vocabulary" in text
    else:
        assert error.errno == errno.ENOSPC
        needed, free = re.search(r"room for (\d+) bytes.* (\d+) bytes are free", text).groups()  # type: ignore[union-attr]
        assert int(needed) >= (4 * MIB if what == "weights" else 10 * MIB)
        assert int(free) < int(needed)


def test_warning_says_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export = HFExport(assets=[Unwilling()])
    writer = HFDualWriter(tmp_path / "step-1", export=export, on_export_error="warn")
    with caplog.at_level(logging.WARNING):
        dcp.save(state(), storage_writer=writer, no_dist=True)
    assert f"the HuggingFace half is missing ({tmp_path / 'step-1'})" in caplog.text
    assert "no vocabulary" in caplog.text
