"""What a release consists of: one version, workflows that run what tox has, no secret settings."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def tox() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.read(ROOT / "tox.ini")
    return found


def matrices(workflow: Path) -> list[dict[str, Any]]:
    """Return the matrix of each job."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [job["strategy"]["matrix"] for job in jobs]


def environments() -> dict[str, str | None]:
    """Return the environments of tox that the workflows run, with the Python of each."""
    found: dict[str, str | None] = {}
    for matrix in [one for workflow in WORKFLOWS for one in matrices(workflow)]:
        found |= dict.fromkeys(matrix.get("environment", ()))
        found |= {one["environment"]: one["python"] for one in matrix.get("include", ())}
    return found


def test_version_is_written_in_one_place() -> None:
    (version,) = re.findall(r'^version = "([^"]+)"$', PYPROJECT, re.MULTILINE)
    holders = [
        path
        for path in (ROOT / "src").rglob("*.py")
        if re.search(rf"[\"']{re.escape(version)}[\"']", path.read_text())
    ]
    assert holders == []
    newest = re.search(
        r"^## \[(.+)\](?:: (.+)| - .+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert newest is not None
    assert version in newest.groups()


def test_workflows_run_environments_that_tox_has() -> None:
    known = {name.removeprefix("testenv:") for name in tox().sections()} | {"test"}
    assert environments().keys() <= known
    matrix = {name for name in known if name.startswith("matrix-")}
    assert {"lint", "test", "docs", "release", "browser", "slow"} | matrix <= environments().keys()


def test_workflows_use_the_python_of_the_environment() -> None:
    settings = tox()
    for name, python in environments().items():
        wanted = settings.get(f"testenv:{name}", "base_python", fallback=None)
        if wanted is not None:
            assert f"python{python}" == wanted, name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_may_only_read_and_has_a_time_limit(workflow: Path) -> None:
    settings = yaml.safe_load(workflow.read_text())
    assert settings["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 120 for job in settings["jobs"].values())


def test_pages_that_issue_forms_name_exist() -> None:
    text = "".join(form.read_text() for form in FORMS)
    named = set(re.findall(r"\b(?:docs/)?[A-Za-z-]+\.md\b", text))
    assert named == {"SECURITY.md", "docs/errors.md"}
    assert [name for name in named if not (ROOT / name).is_file()] == []
