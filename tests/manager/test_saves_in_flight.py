"""What is told of saves that run, and of those that have just ended."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dcp_hf_writer.manager.saves_in_flight import PublishedSave, find_published

if TYPE_CHECKING:
    from pathlib import Path


def test_size_of_a_published_save_is_that_of_its_files(tmp_path: Path) -> None:
    manifest = {
        "save_id": "one",
        "nbytes": {"dcp": 100, "hf": 50, "other": 7, "shared": 30, "hf sent": 20},
        "timings": {"coordinator": {"total": 2.5}},
        "hf": {},
    }
    (tmp_path / "dcp-hf.json").write_text(json.dumps(manifest))
    assert find_published(str(tmp_path), "one") == PublishedSave(157, 2.5, has_export=True)
    assert find_published(str(tmp_path), "other") is None
