"""docs/errors.md: it has every class of errors, and quotes messages that the source has."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict

from dcp_hf_writer import errors
from dcp_hf_writer.errors import CheckpointError
from support.folders import ROOT
from support.messages import messages

PAGE = (ROOT / "docs" / "errors.md").read_text()
ROW = re.compile(r"^\| `(.+?)` \| (.+?) \| (.+?) \|$", re.MULTILINE)


def sections() -> dict[str, str]:
    """Return the text below the heading of each class."""
    parts = re.split(r"^### (\w+)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def quoted() -> dict[str, list[str]]:
    """Return the messages that the page quotes, by class: from its tables and its paragraphs."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for kind, text in sections().items():
        found[kind] += [row[0] for row in ROW.findall(text)]
        if text.lstrip().startswith("`"):
            found[kind] += re.findall(r"`([^`]+)`", text.split(":", 1)[0])
    return found


def test_page_has_every_class_of_errors() -> None:
    classes = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, CheckpointError)
    }
    assert set(sections()) == classes
    assert [name for name, text in sections().items() if not text.strip()] == []


def test_page_quotes_messages_that_the_source_has() -> None:
    known = messages()
    pairs = [(kind, text) for kind, texts in quoted().items() for text in texts]
    assert [pair for pair in pairs if pair[1] not in known[pair[0]] | known[""]] == []
    assert len(pairs) > 80


def test_page_quotes_every_message_of_the_source() -> None:
    listed = {text for texts in quoted().values() for text in texts}
    known = [(kind, text) for kind, texts in messages().items() if kind for text in texts]
    assert len(known) > 300
    assert [pair for pair in known if pair[1] not in listed] == []


def test_every_row_has_a_cause_and_a_cure() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert [line for line in lines if ROW.fullmatch(line) is None] == []


def test_messages_are_found_in_the_source() -> None:
    """The control: messages of each form."""
    known = messages()
    assert "the ranks save to different paths" in known["ConfigError"]
    assert "... must be True or False" in known["ConfigError"]
    assert "the DCP half is published, the HuggingFace half is missing" in known["ExportError"]
