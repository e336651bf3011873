"""Checkpoints that the tests of the command share; no test changes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.cli_checkpoints import make_models, make_run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run."""
    root = tmp_path_factory.mktemp("run")
    make_run(root)
    return root


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories `llama` and `mixtral`, with `live` and `stock` in each."""
    root = tmp_path_factory.mktemp("models")
    make_models(root)
    return root
