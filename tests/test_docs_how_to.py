"""The pages that are scripts: their blocks run, and their pictures are those of the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer import verify
from support.page_scripts import PAGES, run_page
from support.pictures import DOCS, pictures
from support.ranks import run_ranks

if TYPE_CHECKING:
    from support.s3_servers import S3Server


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_the_page_run_in_their_order(page: str, tmp_path: Path, moto: S3Server) -> None:
    bucket = moto.new_bucket()
    given = {"url": f"{bucket.url}/run", "options": bucket.storage_options}
    given = given if page == "object-stores.md" else {}
    run_ranks(run_page, PAGES[page].ranks, page, str(tmp_path), given, timeout_s=200)
    found = [path.parent for path in sorted(tmp_path.rglob("dcp-hf.json"))]
    assert [str(path.relative_to(tmp_path)) for path in found] == list(PAGES[page].left)
    for path in found:
        is_apart = "other_half" in json.loads((path / "dcp-hf.json").read_text())
        assert verify(path, storage_options=bucket.storage_options if is_apart else None).ok


def test_pictures_are_those_that_the_source_draws() -> None:
    drawn = pictures()
    assert {path.name for path in DOCS.glob("*.svg")} == drawn.keys()
    for name, text in drawn.items():
        assert (DOCS / name).read_text() == text, f"run python {Path('tests/support/pictures.py')}"


def test_every_picture_is_on_a_page() -> None:
    text = "".join(path.read_text() for path in DOCS.glob("*.md"))
    readme = (DOCS.parent / "README.md").read_text()
    for path in [*DOCS.glob("*.svg"), *DOCS.glob("*.png")]:
        assert f"]({path.name})" in text or f"](docs/{path.name})" in readme, path.name
