"""Settings that hold for every test."""

from __future__ import annotations

import os

import pytest

# Before transformers is imported: no test may look for anything on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Its assertions are those of the test classes that inherit it.
pytest.register_assert_rewrite("support.input_conformance")
