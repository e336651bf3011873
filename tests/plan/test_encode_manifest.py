"""The manifest accounts for every byte of a checkpoint."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import ExportError
from dcp_hf_writer.formats.names_on_disk import digests_file_name
from dcp_hf_writer.plan.encode_manifest import encode_manifest
from dcp_hf_writer.plan.layout import Layout, PlannedFile
from dcp_hf_writer.plan.parse_manifest import parse_manifest
from dcp_hf_writer.plan.rank_report import DCPFile, DigestsFile, RankReport
from support.audit import MANIFEST_NAME, faults, file_fault, read_manifest
from support.ranks import run_ranks
from support.small_states import MODEL, state_of

if TYPE_CHECKING:
    from pathlib import Path

ASSETS = {"config.json": b"{}", "nested/tokenizer.json": b"[1, 2]"}


def save(rank: int, world_size: int, root: Path) -> None:
    """Save all that is written in one way or another: fused, cast, columns, metadata, assets."""
    mesh = init_device_mesh("cpu", (world_size,))
    state = state_of(100, mesh)
    state["model"]["tied"] = state["model"]["embed"]
    state["model"]["none"] = torch.zeros(0, 3)
    export = HFExport(
        specs=[LoadSpec("layers.0.w", ["q", "k"], MODEL["layers.0.w"][0], 0)],
        dtype=torch.bfloat16,
        keep_dtype=("^k$", "norm"),
        max_shard_size=100,
        assets=ASSETS,
        metadata={"run": "one"},
    )
    writer = HFDualWriter(root / "step-100", export=export)
    dcp.async_save(state, storage_writer=writer).result()
    writer = HFDualWriter(root / "dcp-only", export=None)
    dcp.async_save(state, storage_writer=writer).result()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("manifest")
    run_ranks(save, 2, root)
    return root


@pytest.fixture(scope="module")
def manifest(root: Path) -> dict[str, Any]:
    return read_manifest(root / "step-100")


@pytest.mark.parametrize("name", ["step-100", "dcp-only"])
def test_every_digest_is_that_of_the_bytes_and_every_file_is_listed(root: Path, name: str) -> None:
    assert faults(root / name) == []


def test_any_changed_byte_of_any_file_is_seen(root: Path, manifest: dict[str, Any]) -> None:
    directory = root / "step-100"
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    kinds = {path.suffix for path in paths if path.name != MANIFEST_NAME}
    assert kinds == {"", ".distcp", ".json", ".safetensors"}
    unseen = []
    for path in paths:
        if path.name == MANIFEST_NAME:
            continue
        name = str(path.relative_to(directory))
        content = bytearray(path.read_bytes())
        for position in range(len(content)):
            content[position] ^= 1 << position % 8
            if file_fault(manifest, name, bytes(content)) is None:
                unseen.append((name, position))
            content[position] ^= 1 << position % 8
        assert file_fault(manifest, name, bytes(content)) is None
        assert file_fault(manifest, name, bytes(content[:-1])) is not None
        assert file_fault(manifest, name, bytes(content + b"\0")) is not None
    assert unseen == []


def test_manifest_ends_with_the_digest_of_what_stands_above(
    root: Path, manifest: dict[str, Any]
) -> None:
    content = (root / "step-100" / MANIFEST_NAME).read_bytes()
    above, last, rest = content.rpartition(b'"digest_above": ')
    assert last
    assert json.loads(rest.strip().removesuffix(b"}")) == xxhash.xxh3_64_hexdigest(above)
    assert list(manifest)[-1] == "digest_above"


def test_missing_and_additional_files_are_seen(root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    directory.mkdir()
    (directory / MANIFEST_NAME).write_bytes((root / "dcp-only" / MANIFEST_NAME).read_bytes())
    (directory / "stray").touch()
    (directory / "dcp-hf").mkdir()
    for path in (root / "dcp-only" / "dcp-hf").iterdir():
        (directory / "dcp-hf" / path.name).write_bytes(path.read_bytes())
    assert faults(directory) == [
        ".metadata is missing",
        "__0_0.distcp is missing",
        "__1_0.distcp is missing",
        "stray is not accounted for",
    ]


def test_totals_are_the_bytes_of_the_files(root: Path, manifest: dict[str, Any]) -> None:
    directory = root / "step-100"
    size = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    headers = sum(file["header_nbytes"] for file in manifest["hf"]["files"].values())
    digests = sum(n for path, n in size.items() if path.parent.name == "dcp-hf")
    weights = sum(n for path, n in size.items() if path.suffix == ".safetensors") - digests
    dcp_half = sum(n for path, n in size.items() if path.suffix == ".distcp")
    others = sum(size.values()) - weights - dcp_half - digests - size[directory / MANIFEST_NAME]
    # On a file system that cannot clone, nothing is shared; these tensors are too small anyway.
    expected = {"dcp": dcp_half, "hf": weights - headers, "other": others, "shared": 0}
    expected["digests"] = digests
    assert manifest["nbytes"] == expected


def test_manifest_says_what_was_saved_and_by_whom(root: Path, manifest: dict[str, Any]) -> None:
    assert manifest["target"] == str(root / "step-100")
    assert (manifest["step"], manifest["world_size"]) == (100, 2)
    assert read_manifest(root / "dcp-only")["step"] is None
    assert re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{8}-\d+-[0-9a-f]{12}", manifest["save_id"])
    assert manifest["save_id"] != read_manifest(root / "dcp-only")["save_id"]
    assert manifest["owner"]["pid"] == int(manifest["save_id"].split("-")[2])
    assert manifest["export_error"] is None


def test_ties_keys_and_files_are_those_of_the_export(root: Path, manifest: dict[str, Any]) -> None:
    index = json.loads((root / "step-100" / "hf" / "model.safetensors.index.json").read_bytes())
    file_of_key = {
        key: name for name, file in manifest["hf"]["files"].items() for key in file["tensors"]
    }
    assert file_of_key == index["weight_map"]
    assert manifest["hf"]["tied"] == {"tied": "embed"}
    assert manifest["hf"]["subdir"] == "hf"
    assert {"hf/config.json", "hf/nested/tokenizer.json"} <= manifest["files"].keys()
    assert read_manifest(root / "dcp-only")["hf"] is None


def test_both_ranks_wrote_pieces(manifest: dict[str, Any]) -> None:
    writers = {
        key: {piece[0] for piece in tensor[3]}
        for file in manifest["hf"]["files"].values()
        for key, tensor in file["tensors"].items()
    }
    assert writers["embed"] == writers["q"] == {0, 1}
    assert len(writers["norm"]) == 1
    assert writers["none"] == set()


def test_timings_name_the_phases_of_the_coordinator_and_of_each_rank(
    manifest: dict[str, Any],
) -> None:
    coordinator, ranks = (manifest["timings"][who] for who in ("coordinator", "ranks"))
    assert {"stage", "plan", "prepare", "write dcp", "write hf", "finish", "total"} <= set(
        coordinator
    )
    assert [timing["rank"] for timing in ranks] == [0, 1]
    assert all({"host", "stage", "write dcp", "write hf", "sync"} <= set(one) for one in ranks)
    assert all(seconds >= 0 for seconds in coordinator.values())


class Unwilling:
    def save_pretrained(self, directory: str) -> None:
        msg = "no space for a vocabulary"
        raise OSError(msg, directory)


def test_manifest_tells_why_there_is_no_export(tmp_path: Path) -> None:
    target = tmp_path / "step-7"
    writer = HFDualWriter(target, export=HFExport(assets=[Unwilling()]))
    with pytest.raises(ExportError, match="no space for a vocabulary"):
        dcp.async_save(state_of(7), storage_writer=writer, no_dist=True).result()
    assert faults(target) == []
    manifest = read_manifest(target)
    assert manifest["hf"] is None
    assert "no space for a vocabulary" in manifest["export_error"]
    assert not (target / "hf").exists()


def test_manifest_of_a_thousand_ranks_is_below_one_megabyte() -> None:
    """The bar of the design; the files are those of DeepSeek-V3 in parts of 5 GB."""
    seconds = dict.fromkeys(
        ("stage", "plan", "slot wait", "write dcp", "write hf", "sync"), 12.34567
    )
    reports = []
    for rank in range(1024):
        file = DCPFile(f"__{rank}_0.distcp", 40 << 30, (), "f" * 16)
        listed = DigestsFile(digests_file_name(rank), 99_999, "f" * 16, (0, 299), 1 << 30)
        report = RankReport(rank, f"node-{rank // 8:05d}", dcp_files=[file], digests=listed)
        report.seconds = seconds
        reports.append(report)
    files = tuple(
        PlannedFile(f"model-{number:05d}-of-00300.safetensors", b"h" * 20_000, 5 << 30, ())
        for number in range(300)
    )
    data = encode_manifest(
        save_id="20260101T000000-00000000-1-000000000000",
        target="/runs/deepseek/step-100",
        owner={"host": "node-00000", "pid": 1},
        step=100,
        subdir="hf",
        layout=Layout(files, {}, None, {}),
        reports=reports,
        whole_files=[],
        seconds=seconds,
        export_error=None,
    )
    assert len(data) < 1_000_000
    assert len(parse_manifest(data, path="x").digests) == len(reports)
