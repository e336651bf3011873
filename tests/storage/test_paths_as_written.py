"""Paths as users write them: `~`, `file://`, pathlib, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.storage.paths_as_written import hub_hint, plain_path


class Foreign:
    """A path of another library."""

    def __init__(self, text: Any) -> None:
        self.text = text

    def __fspath__(self) -> Any:
        return self.text

    def __repr__(self) -> str:
        # Every process that runs tests must give them the same names.
        return f"Foreign({self.text!r})"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a/b", "a/b"),
        (Path("a/b"), "a/b"),
        (Foreign("a/b"), "a/b"),
        ("~", "/of/a/user"),
        ("~/x", "/of/a/user/x"),
        (Path("~/x"), "/of/a/user/x"),
        (Foreign("~/x"), "/of/a/user/x"),
        ("./~/x", "./~/x"),
        ("a~b", "a~b"),
        ("file:///x/y", "/x/y"),
        ("local:///x/y", "/x/y"),
        ("file://localhost/x/y", "/x/y"),
        (Path("file:///x/y"), "/x/y"),
        ("file:///x/a%20b", "/x/a%20b"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("memory://x", "memory://x"),
    ],
    ids=repr,
)
def test_path_becomes_plain_text(
    value: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/of/a/user")
    assert plain_path(value) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "found None"),
        (3, "found 3"),
        ("", "not empty"),
        (b"x", "b'x'"),
        (Foreign(b"x"), "text or a pathlib.Path"),
        ("a\0b", "text or a pathlib.Path"),
        (["x"], "text or a pathlib.Path"),
        ("file://host/x", "the host 'host'"),
        ("file://x", "file:///absolute/path"),
        ("file://", "no path"),
        ("~no-such-user/x", "./~no-such-user/x for a directory of that name"),
        (Path("s3://bucket/x"), "pass the URL as text"),
        (Path("gs://bucket/x"), "pass the URL as text"),
    ],
    ids=repr,
)
def test_path_is_refused_when_it_cannot_be_meant(value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match="like") as caught:
        plain_path(value, option="like")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["gpt2", "Qwen/Qwen3-30B-A3B", "openai-community/gpt2"])
def test_hint_names_the_call_when_a_path_looks_like_the_id_of_a_repository(text: str) -> None:
    assert f"snapshot_download({text!r})" in str(hub_hint(text))


@pytest.mark.parametrize("text", ["/models/gpt2", "./gpt2", "../gpt2", "a/b/c", "~/x", "s3://b/x"])
def test_no_hint_is_given_when_a_path_cannot_be_the_id_of_a_repository(text: str) -> None:
    assert hub_hint(text) is None
