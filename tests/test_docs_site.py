"""The pages of the documentation: all in the navigation, no dead link, all public names."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import dcp_hf_writer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OTHERS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "examples")),
]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def pages_in(nav: Any) -> list[str]:
    """Return the files of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_in(part)]


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and as mkdocs make them."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        kept = re.sub(r"[^\w\s-]", "", title).strip().lower()
        found |= {re.sub(r"\s", "-", kept), re.sub(r"[-\s]+", "-", kept)}
    return found


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        is_outside = page.parent == DOCS and DOCS not in target.resolve().parents
        if is_outside or not target.is_file() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def test_every_page_is_in_the_navigation_once() -> None:
    nav = pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == [page.name for page in PAGES]
    assert nav[0] == "index.md"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_page_has_no_dead_link(page: Path) -> None:
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n[a](#one-two) [b](#none) [c](none.md) [d](https://example.org)\n")
    assert dead_links(page) == ["#none", "none.md"]


def test_every_page_begins_with_a_title() -> None:
    assert [page.name for page in PAGES if not page.read_text().startswith("# ")] == []


def test_api_page_has_each_public_name_once() -> None:
    names = re.findall(r"^::: dcp_hf_writer\.(\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    public = [name for name in names if "." not in name]
    assert sorted(public) == sorted(dcp_hf_writer.__all__)


def test_api_page_has_the_names_that_the_page_on_trainers_imports() -> None:
    imports = re.findall(
        r"from dcp_hf_writer\.(\S+) import (.+)$", (DOCS / "trainers.md").read_text(), re.MULTILINE
    )
    assert imports
    page = (DOCS / "api.md").read_text()
    for module, names in imports:
        for name in names.split(", "):
            assert f"::: dcp_hf_writer.{module}.{name}\n" in page


def test_readme_can_be_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_tox_builds_the_pages_with_the_extra_docs() -> None:
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    deps = tox["testenv:docs"]["deps"].split("\n")
    extra = re.search(r"^docs = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra is not None
    listed = re.findall(r'"([^"]+)"', extra[1])
    assert [one for one in deps if one and not one.startswith("-c")] == listed
    pinned = (ROOT / "constraints.txt").read_text()
    for one in listed:
        name = re.split(r"[\[>=]", one)[0]
        assert re.search(rf"^{name}==", pinned, re.MULTILINE), name
