"""`push`: the real client uploads real checkpoints to a hub on this machine."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.cli.json_schemas import SCHEMAS
from dcp_hf_writer.cli.push_command import push
from dcp_hf_writer.errors import ConfigError, CorruptCheckpointError, ReadError
from dcp_hf_writer.integrations.hub_upload import HubTarget
from dcp_hf_writer.integrations.model_card import model_card
from support.checkpoints import flip
from support.command import Completed, dcp_hf
from support.fake_hub import running_hub
from support.json_schema import schema_fault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.fake_hub import FakeHub

# Some tests start processes that import torch.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub, and an environment in which the client talks to it by HTTP alone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    with running_hub() as running:
        yield running


def pushed(hub: FakeHub, *arguments: str | Path) -> Completed:
    return dcp_hf("push", *arguments, "--endpoint", hub.url)


def files_of(directory: Path) -> dict[str, bytes]:
    found = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_push_uploads_every_byte_with_a_card_in_one_commit(hub: FakeHub, models: Path) -> None:
    live = models / "llama" / "live"
    found = pushed(hub, live, "me/tiny", "--private", "--message", "first", "--json")
    assert (found.code, found.err) == (0, "")
    value = json.loads(found.out)
    assert schema_fault(value, SCHEMAS["push"]) is None
    stored = hub.branches["me/tiny", "main"]
    card = stored.pop("README.md").decode()
    assert stored == files_of(live / "hf")
    assert len(stored) > 3
    assert (hub.repos, hub.messages) == ({"me/tiny": True}, ["first"])
    assert hub.authorization == "Bearer hf_of_the_test"
    assert value["url"].startswith(f"{hub.url}/me/tiny/commit/")
    assert value["files"] == sorted([*stored, "README.md"])
    assert value["nbytes"] == sum(map(len, stored.values()))
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n")
    for text in ("# tiny\n", "| architecture | LlamaForCausalLM |", "| dtype | BF16 |"):
        assert text in card
    # Again, to a branch: the repository is there, and so is the card of a person.
    hub.branches["me/tiny", "v2"] = {"README.md": b"by hand"}
    again = pushed(hub, live / "hf", "me/tiny", "--revision", "v2")
    assert again.code == 0, again.err
    assert "made README.md" not in again.out
    assert again.out.splitlines()[0].startswith(f"{hub.url}/me/tiny/commit/")
    assert hub.branches["me/tiny", "v2"] == {**stored, "README.md": b"by hand"}
    assert hub.messages == ["first", "Upload hf"]


def test_refused_push_says_why_without_a_traceback(hub: FakeHub, models: Path) -> None:
    hub.refuses = ("/commit/", 403, "You may not write to this repository")
    found = pushed(hub, models / "llama" / "live", "me/tiny")
    assert (found.code, found.out) == (3, "")
    text = " ".join(found.err.split())
    assert text.startswith("dcp-hf push: the hub did not take the upload")
    for part in (f"{hub.url}/me/tiny", "HTTP 403", "You may not write", "hf auth login"):
        assert part in text
    assert "Traceback" not in found.err
    assert hub.branches["me/tiny", "main"] == {}


def test_damaged_checkpoint_is_not_pushed(hub: FakeHub, models: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(models / "llama" / "live", tmp_path / "live")
    flip(next((damaged / "hf").glob("*.safetensors")), -1)
    with pytest.raises(CorruptCheckpointError, match="damaged, so it was not pushed"):
        push(str(damaged), HubTarget("me/tiny", endpoint=hub.url), message=None, as_json=True)
    assert hub.calls == []


def test_checkpoint_without_export_and_wrong_names_are_refused(models: Path) -> None:
    with pytest.raises(ReadError):
        push(str(models / "llama" / "stock"), HubTarget("me/tiny"), message=None, as_json=True)
    with pytest.raises(ConfigError, match="no name of a repository"):
        push(str(models / "llama" / "live"), HubTarget("a/b/c"), message=None, as_json=True)


def test_push_without_huggingface_hub_names_the_extra(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'dcp-hf-writer\[hub\]'"):
        push(str(models / "llama" / "live"), HubTarget("me/tiny"), message=None, as_json=True)


def test_hub_that_does_not_answer_is_an_error_with_its_address(models: Path) -> None:
    found = dcp_hf(
        *("push", models / "llama" / "live", "me/tiny", "--endpoint", "http://127.0.0.1:9")
    )
    assert found.code == 3
    assert "http://127.0.0.1:9/me/tiny" in "".join(found.err.split())
    assert "Traceback" not in found.err


def test_card_holds_no_markup_of_names_and_needs_no_config() -> None:
    card = model_card("a|b<c>", {}, parameters=5, dtypes=["F32"], step=None, world_size=1)
    assert "# a\\|b\\<c\\>\n" in card
    assert "transformers" not in card
    assert "| saved by | 1 rank |" in card
