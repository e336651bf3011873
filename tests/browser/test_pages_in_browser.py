"""The HTML report and the documentation in a headless Chromium: `tox run -e browser`."""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urldefrag

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, HFExport
from support.browser import browsing, is_too_wide, take_screenshot
from support.command import dcp_hf
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
RANKS = 4


def save(rank: int, world_size: int, path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(1 << 20, dtype=torch.float32).view(1024, 1024)
    weights = {f"layers.{i}.w": distribute_tensor(whole + i, mesh, [Shard(0)]) for i in range(6)}
    writer = HFDualWriter(path, export=HFExport(max_shard_size="8MB"))
    dcp.save({"model": weights, "step": 7}, storage_writer=writer)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save on four ranks, and write the HTML report."""
    directory = tmp_path_factory.mktemp("report")
    run_ranks(save, RANKS, directory / "step-7")
    page = directory / "report.html"
    done = dcp_hf("report", directory / "step-7", "--html", page)
    assert done.code == 0, done.err
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_report_shows_each_rank_without_a_network(
    report: Path, size: dict[str, int], scheme: str
) -> None:
    with browsing(viewport=size, color_scheme=scheme, offline=True) as (page, complaints):
        page.goto(report.as_uri())
        take_screenshot(page, f"report-{size['width']}-{scheme}")
        assert page.locator("tbody tr").count() == RANKS
        assert "step-7" in page.title()
        bars = page.locator("tbody rect").all()
        widths = [bar.bounding_box()["width"] for bar in bars]
        assert len(widths) >= RANKS
        assert max(widths) > 20
        assert not is_too_wide(page)
        text, ground = (
            page.evaluate(f"getComputedStyle(document.body).{name}")
            for name in ("color", "backgroundColor")
        )
        assert contrast(text, ground) >= 7
        assert complaints.console == []
        assert complaints.requests == []


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours `rgb(r, g, b)`, as the guidelines of WCAG define it."""

    def luminance(color: str) -> float:
        parts = color[color.index("(") + 1 : -1].split(",")
        values = [float(part) / 255 for part in parts[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the documentation."""
    target = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """Serve the documentation on this machine; yield its URL."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.href)"
IDS = "[...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name)"
BROKEN = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"


def pages_of(site: Path) -> list[Path]:
    """Return all pages but the one for unknown addresses, which needs a server at the root."""
    return [path for path in sorted(site.glob("*.html")) if path.name != "404.html"]


def test_pages_open_from_disk_and_no_link_is_broken(site: Path) -> None:
    pages = pages_of(site)
    assert len(pages) > 10
    links: dict[str, list[str]] = {}
    anchors: dict[str, set[str]] = {}
    with browsing(viewport=WIDE, offline=True) as (page, complaints):
        for path in pages:
            page.goto(path.as_uri())
            links[path.name] = page.evaluate(LINKS)
            anchors[path.as_uri()] = set(page.evaluate(IDS))
            assert page.evaluate(BROKEN) == [], path.name
        assert complaints.console == []
        assert complaints.requests == []
    broken = [
        f"{name}: {link}"
        for name, found in links.items()
        for link in found
        if link.startswith("file:") and not is_there(link, anchors)
    ]
    assert broken == []


def is_there(link: str, anchors: dict[str, set[str]]) -> bool:
    """Whether a link leads to a file, and to a place in it if it is one of the pages."""
    target, anchor = urldefrag(link)
    if not Path(unquote(target.removeprefix("file://"))).is_file():
        return False
    return not anchor or target not in anchors or unquote(anchor) in anchors[target]


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.touch()
    anchors = {page.as_uri(): {"one"}}
    links = [page.as_uri(), f"{page.as_uri()}#one", f"{page.as_uri()}#two", f"{page.as_uri()}l"]
    assert [is_there(link, anchors) for link in links] == [True, True, False, False]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_pages_fit_the_screen(site: Path, served: str, size: dict[str, int], scheme: str) -> None:
    with browsing(viewport=size, color_scheme=scheme) as (page, complaints):
        for name in [path.name for path in pages_of(site)]:
            page.goto(f"{served}/{name}")
            take_screenshot(page, f"{name.removesuffix('.html')}-{size['width']}-{scheme}")
            assert not is_too_wide(page), name
            assert page.evaluate(BROKEN) == [], name
        assert complaints.console == []
        assert complaints.requests == []


def test_search_finds_a_page(served: str) -> None:
    with browsing(viewport=WIDE) as (page, complaints):
        page.goto(f"{served}/index.html")
        page.locator("input.md-search__input").click()
        # The page listens to keys.
        page.keyboard.type("glossary")
        hit = page.locator(".md-search-result__link").first
        hit.wait_for(timeout=60_000)
        take_screenshot(page, "search")
        hit.click()
        page.wait_for_url("**/glossary.html*", timeout=60_000)
        assert complaints.console == []
        assert complaints.requests == []
