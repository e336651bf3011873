"""Commands that need no tensors start without torch, whose import takes seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import CheckpointManager, HFExport
from support.small_states import state_of

if TYPE_CHECKING:
    from pathlib import Path

SLOW = ("torch", "transformers", "safetensors", "matplotlib", "fsspec")
CODE = f"""
import sys
from dcp_hf_writer.cli.entry_point import main
try:
    main()
except SystemExit as end:
    print([name for name in {SLOW} if name in sys.modules], end.code, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    manager = CheckpointManager(root, save_every=1, export=HFExport())
    for step in (1, 2):
        manager.step(step, state_of(step))
        manager.wait()
    manager.close()
    return root


def start(*arguments: str) -> tuple[str, str]:
    """Run a command; return what it prints, and the slow modules that it imported."""
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout, done.stderr.strip()


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), ("schema", "ls"), ("export", "--help")],
    ids=" ".join,
)
def test_command_starts_without_torch(arguments: tuple[str, ...]) -> None:
    printed, imported = start(*arguments)
    assert imported == "[] 0"
    assert printed


@pytest.mark.parametrize("command", ["ls", "latest"])
def test_listing_of_a_run_starts_without_torch(saved: Path, command: str) -> None:
    printed, imported = start(command, str(saved))
    assert imported == "[] 0"
    assert "step-2" in printed if command == "latest" else re.search(r"2 +committed", printed)


def test_listing_imports_torch_for_a_checkpoint_without_a_manifest(
    saved: Path, tmp_path: Path
) -> None:
    dcp.save(state_of(3), checkpoint_id=tmp_path / "step-3")
    printed, imported = start("ls", str(tmp_path))
    assert "'torch'" in imported
    assert re.search(r"3 +unverified", printed)


def test_version_is_that_of_the_package() -> None:
    printed, _ = start("--version")
    assert re.fullmatch(r"dcp-hf-writer (\d+\.\d+\.\d+|of a source tree .*)\n", printed)


def test_import_of_the_package_imports_no_torch() -> None:
    code = "import sys, dcp_hf_writer; dir(dcp_hf_writer); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == "False\n"
