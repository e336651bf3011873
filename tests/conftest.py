"""Settings that hold for every test."""

from __future__ import annotations

import os

# Before transformers is imported: no test may look for anything on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
