"""A headless Chromium that reports all that a page complains about."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
VARIABLE = "DCP_HF_WRITER_CHROMIUM"


def chromium() -> str:
    """Return the path of the browser: the environment variable, or the first one on PATH."""
    for name in (os.environ.get(VARIABLE), *NAMES):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    msg = f"no browser: install one of {', '.join(NAMES)}, or set {VARIABLE}"
    raise RuntimeError(msg)


@dataclass(slots=True)
class Complaints:
    """What went wrong in a page."""

    console: list[str] = field(default_factory=list)
    """Errors and warnings in the console, and exceptions that nothing caught."""
    requests: list[str] = field(default_factory=list)
    """Requests that failed, or that left this machine."""


@contextlib.contextmanager
def browsing(**options: Any) -> Iterator[tuple[Any, Complaints]]:
    """Open a page, and collect its complaints.

    Args:
        **options: Of `Browser.new_context`, such as `viewport` and `color_scheme`.
    """
    from playwright.sync_api import sync_playwright

    complaints = Complaints()
    with sync_playwright() as playwright:
        # Root has no sandbox in a container.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        context = browser.new_context(**options)
        page = context.new_page()
        page.on("console", lambda one: _note_console(one, complaints))
        page.on("pageerror", lambda error: complaints.console.append(str(error)))
        page.on("requestfailed", lambda one: _note_failure(one, complaints))
        page.on("request", lambda one: _note_request(one.url, complaints))
        try:
            yield page, complaints
        finally:
            browser.close()


def _note_console(message: Any, complaints: Complaints) -> None:
    if message.type in {"error", "warning"}:
        complaints.console.append(f"{message.type}: {message.text} ({message.location})")


def _note_failure(request: Any, complaints: Complaints) -> None:
    # A page that is left stops what it still loads.
    if request.failure != "net::ERR_ABORTED":
        complaints.requests.append(f"{request.url}: {request.failure}")


def _note_request(url: str, complaints: Complaints) -> None:
    if not url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:")):
        complaints.requests.append(f"leaves this machine: {url}")


def is_too_wide(page: Any) -> bool:
    """Whether a reader has to scroll the page sideways."""
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    return bool(page.evaluate(wide))


def take_screenshot(page: Any, name: str) -> None:
    """Save a screenshot if somebody asks for it with `DCP_HF_WRITER_SCREENSHOTS=DIRECTORY`."""
    directory = os.environ.get("DCP_HF_WRITER_SCREENSHOTS")
    if directory:
        page.screenshot(path=os.path.join(directory, f"{name}.png"))
