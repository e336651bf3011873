"""What pyproject.toml claims to support is what the oldest environment installs."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parent.parent
PINNED = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>[0-9.]+)$", re.MULTILINE)
BOUND = re.compile(r'"(?P<name>[a-z0-9-]+)>=(?P<version>[0-9.]+)"')


def test_lower_bounds_are_the_oldest_versions_that_are_tested() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = text[text.index("[project]") : text.index("[tool.hatch")]
    pins = PINNED.finditer((ROOT / "constraints-oldest.txt").read_text())
    tested = {pin["name"]: Version(pin["version"]) for pin in pins}
    claimed = [(one["name"], Version(one["version"])) for one in BOUND.finditer(project)]
    assert {"torch", "transformers", "numpy", "safetensors"} <= dict(claimed).keys()
    assert [(name, tested.get(name)) for name, _ in claimed] == claimed


def test_every_dependency_has_a_lower_bound() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = text[text.index("dependencies = [") : text.index("[project.optional")]
    names = re.findall(r'^    "(.+)",$', listed, re.MULTILINE)
    assert names
    assert [name for name in names if not BOUND.fullmatch(f'"{name}"')] == []


def test_oldest_python_is_the_one_that_is_claimed() -> None:
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()
    assert "base_python = python3.10\n" in (ROOT / "tox.ini").read_text()
