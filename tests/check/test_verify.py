"""verify finds what is wrong, says where, and finds nothing in a checkpoint that is fit."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import threading
import tracemalloc
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from dcp_hf_writer import HFDualWriter, HFExport, VerifyReport, verify
from dcp_hf_writer.check.verify_progress import ProgressLine
from dcp_hf_writer.digests.problems import Problem
from dcp_hf_writer.errors import ConfigError, CorruptCheckpointError
from dcp_hf_writer.formats.encode_safetensors_header import HFTensor, encode_header
from support import audit
from support.audit import MANIFEST_NAME
from support.checkpoints import KINDS, copied, flip, manifest_of, put_manifest, save_kinds, sign
from support.compare import INDEX_NAME
from support.ranks import run_ranks
from support.small_states import state_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SUFFIXES = {"", ".distcp", ".json", ".safetensors"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    run_ranks(save_kinds, 2, root)
    return root


@pytest.fixture
def many(root: Path, tmp_path: Path) -> Path:
    return copied(root / "many" / "step-100", tmp_path / "copy")


def whats(report: VerifyReport) -> list[tuple[str, str]]:
    return [(problem.file, problem.what) for problem in report.problems]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wrong_with_what_was_saved(root: Path, kind: str) -> None:
    directory = root / kind / "step-100"
    assert audit.faults(directory) == []
    report = verify(directory)
    assert str(report).startswith(f"{directory}: ok; ")
    assert (report.ok, report.problems, report.warnings) == (True, (), ())
    assert report.checked == "digests"
    report.raise_if_bad()


@pytest.mark.parametrize("kind", KINDS)
def test_every_digest_of_the_manifest_is_compared_and_every_byte_read(
    root: Path, kind: str
) -> None:
    directory = root / kind / "step-100"
    fields = manifest_of(directory)
    hf = fields["hf"] or {"files": {}}
    tensors = [tensor for file in hf["files"].values() for tensor in file["tensors"].values()]
    count = len(fields["files"]) + sum(len(f["ranges"]) + 1 for f in fields["dcp"].values())
    count += len(hf["files"]) + sum(len(tensor[3]) for tensor in tensors)
    count += len(fields["digests"])
    report = verify(directory)
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    assert report.digest_count == count > 10
    assert report.nbytes == sum(sizes) - (directory / MANIFEST_NAME).stat().st_size
    assert (report.file_count, report.tensor_count) == (len(sizes), len(tensors))


def test_blocks_with_gaps_are_among_those_that_are_compared(root: Path) -> None:
    fields = manifest_of(root / "many" / "step-100")
    blocks = [
        block
        for file in fields["hf"]["files"].values()
        for tensor in file["tensors"].values()
        for block in tensor[3]
    ]
    assert {bool(loops) for _, _, _, loops, _ in blocks} == {True, False}


def positions(path: Path, count: int) -> list[int]:
    size = path.stat().st_size
    return sorted(random.Random(size).sample(range(size), min(count, size)))


@pytest.mark.parametrize("kind", ["many", "once"])
def test_any_changed_byte_is_found_in_its_file(root: Path, kind: str, tmp_path: Path) -> None:
    directory = copied(root / kind / "step-100", tmp_path / "copy")
    paths = [path for path in directory.rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} == SUFFIXES
    for path in paths:
        name = str(path.relative_to(directory))
        for position in positions(path, 12):
            flip(path, position, position % 8)
            report = verify(directory, threads=1)
            assert name in {problem.file for problem in report.problems}, (name, position)
            flip(path, position, position % 8)
    assert verify(directory).ok


def test_changed_weight_is_named_by_key_bytes_and_rank(many: Path) -> None:
    for name, file in manifest_of(many)["hf"]["files"].items():
        for key, (start, _, _, blocks) in file["tensors"].items():
            if not blocks:
                continue
            flip(many / "hf" / name, start)
            (problem,) = verify(many).problems
            assert (problem.file, problem.key) == (f"hf/{name}", key)
            assert problem.start == start
            assert problem.stop is not None
            assert problem.stop <= file["nbytes"]
            assert problem.rank in {0, 1}
            assert problem.what == "the digest of a block differs"
            assert f"key '{key}', bytes {start} to" in str(problem)
            flip(many / "hf" / name, start)


def test_changed_byte_of_the_dcp_half_is_named_by_tensor_and_bytes(many: Path) -> None:
    ranges = [
        (name, start, nbytes)
        for name, file in manifest_of(many)["dcp"].items()
        for start, nbytes, _ in file["ranges"]
    ]
    named = set()
    for name, start, nbytes in ranges:
        flip(many / name, start + nbytes - 1)
        (problem,) = verify(many).problems
        assert (problem.file, problem.start, problem.stop) == (name, start, start + nbytes)
        named.add(problem.fqn)
        flip(many / name, start + nbytes - 1)
    assert {"model.embed", "model.norm", "optim.state.embed.exp_avg"} <= named
    flip(many / "__0_0.distcp", 0)
    assert whats(verify(many)) == [
        ("__0_0.distcp", "the digest of the bytes around the tensors differs")
    ]


def test_zeroed_range_is_found_in_every_tensor_that_it_touches(many: Path) -> None:
    fields = manifest_of(many)["hf"]["files"]
    name, file = max(fields.items(), key=lambda one: len(one[1]["tensors"]))
    path = many / "hf" / name
    content = path.read_bytes()
    path.write_bytes(content[: file["header_nbytes"]] + bytes(len(content) - file["header_nbytes"]))
    found = {problem.key for problem in verify(many).problems}
    assert found == {key for key, tensor in file["tensors"].items() if tensor[3]}


@pytest.mark.parametrize("cut", [1, 60, 10_000_000])
def test_truncated_file_is_named_with_the_tensors_that_it_lacks(many: Path, cut: int) -> None:
    for path in [*many.glob("hf/*.safetensors"), *many.glob("*.distcp")]:
        content = path.read_bytes()
        path.write_bytes(content[: max(0, len(content) - cut)])
        name = str(path.relative_to(many))
        report = verify(many)
        assert (name, "the file has the wrong size") in whats(report)
        assert {problem.file for problem in report.problems} == {name}
        header_nbytes = 8 + int.from_bytes(content[:8], "little")
        if path.suffix == ".safetensors" and path.stat().st_size >= header_nbytes:
            assert any(p.key and "beyond the end" in p.what for p in report.problems)
        path.write_bytes(content)
    assert verify(many).ok


def test_longer_file_is_named(many: Path) -> None:
    for path in [p for p in many.rglob("*") if p.is_file() and p.name != MANIFEST_NAME]:
        content = path.read_bytes()
        path.write_bytes(content + b"\0")
        assert (str(path.relative_to(many)), "the file has the wrong size") in whats(verify(many))
        path.write_bytes(content)


def test_missing_and_additional_files_are_named(many: Path) -> None:
    (many / "hf" / "config.json").unlink()
    (many / "__1_0.distcp").unlink()
    (many / "hf" / "model-00001-of-00009.safetensors").write_bytes(b"")
    (many / "stray").mkdir()
    (many / "stray" / "x").touch()
    (many / "link").symlink_to("nowhere")
    (many / "hf" / "notes.md").touch()
    report = verify(many)
    found = whats(report)
    missing, extra = "the file is missing", "the file does not belong to the checkpoint"
    assert {("hf/config.json", missing), ("__1_0.distcp", missing)} <= set(found)
    assert ("hf/model-00001-of-00009.safetensors", extra) in found
    assert [(one.file, one.what) for one in report.warnings if "belong" in one.what] == [
        ("hf/notes.md", extra),
        ("link", extra),
        ("stray", extra.replace("file", "directory")),
    ]


def test_files_of_others_are_no_problem(many: Path) -> None:
    (many / "trainer_state.json").write_text("{}")
    (many / "step-1").mkdir()
    (many / "step-1" / "__0_0.distcp").write_text("of a checkpoint within")
    report = verify(many)
    assert report.ok
    assert [one.file for one in report.warnings] == ["step-1", "trainer_state.json"]


def test_metadata_that_is_missing_is_named(many: Path) -> None:
    (many / ".metadata").unlink()
    assert whats(verify(many)) == [(".metadata", "the file is missing")]
    fields = manifest_of(many)
    del fields["files"][".metadata"]
    put_manifest(many, fields)
    assert whats(verify(many)) == [(".metadata", "the checkpoint has no DCP metadata")]


def blocks_of(fields: dict[str, Any], key: str) -> list[Any]:
    return next(
        file["tensors"][key][3] for file in fields["hf"]["files"].values() if key in file["tensors"]
    )


def test_block_that_is_missing_or_there_twice_is_found_although_all_digests_agree(
    many: Path,
) -> None:
    original = manifest_of(many)
    for key, count in (("pair", 4), ("q", 2), ("norm", 1)):
        fields = json.loads(json.dumps(original))
        blocks = blocks_of(fields, key)
        assert len(blocks) == count
        removed = blocks.pop()
        put_manifest(many, fields)
        problems = verify(many).problems
        assert {problem.key for problem in problems} == {key}
        assert all("blocks hold" in problem.what for problem in problems)
        blocks += [removed, removed]
        put_manifest(many, fields)
        problems = verify(many).problems
        assert {problem.key for problem in problems} == {key}
        assert all("blocks hold" in problem.what for problem in problems)


def test_export_that_the_manifest_describes_wrongly_is_found(many: Path) -> None:
    def untied(fields: dict[str, Any]) -> None:
        fields["hf"]["tied"]["tied"] = "nothing"

    def tied_and_stored(fields: dict[str, Any]) -> None:
        fields["hf"]["tied"]["norm"] = "scale"

    cases: dict[str, Callable[[dict[str, Any]], None]] = {
        "tied to one that is not in the checkpoint": untied,
        "stored although it is tied": tied_and_stored,
    }
    original = manifest_of(many)
    for message, change in cases.items():
        fields = json.loads(json.dumps(original))
        change(fields)
        put_manifest(many, fields)
        assert any(message in what for _, what in whats(verify(many))), message


def test_damaged_manifest_is_named_and_the_structure_still_checked(many: Path) -> None:
    flip(many / MANIFEST_NAME, 100)
    (many / "hf" / INDEX_NAME).write_bytes(b"{}")
    report = verify(many)
    assert report.checked == "structure"
    assert whats(report) == [
        (MANIFEST_NAME, "the manifest is damaged: its digest differs"),
        (f"hf/{INDEX_NAME}", "an index has no weight_map"),
    ]


def test_reading_continues_past_a_file_that_cannot_be_read(many: Path) -> None:
    target = many.parent / "elsewhere"
    path = many / "__0_0.distcp"
    path.rename(target)
    path.symlink_to(target)
    flip(many / "__1_0.distcp", 0)
    found = {problem.file: problem.what for problem in verify(many).problems}
    assert found["__0_0.distcp"] == "a symbolic link leads out of the checkpoint"
    assert "differs" in found["__1_0.distcp"]


# -- checkpoints without a manifest ----------------------------------------------------------------


@pytest.fixture
def plain_dcp(tmp_path: Path) -> Path:
    directory = tmp_path / "plain"
    dcp.save(state_of(1), checkpoint_id=directory, no_dist=True)
    return directory


def test_checkpoint_of_stock_torch_is_fit(plain_dcp: Path) -> None:
    report = verify(plain_dcp)
    assert (report.ok, report.checked, report.warnings) == (True, "structure", ())


def test_truncated_and_missing_files_of_stock_torch_are_named(plain_dcp: Path) -> None:
    path = plain_dcp / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    (problem,) = verify(plain_dcp).problems
    assert problem.file == "__0_0.distcp"
    assert "beyond the end" in problem.what
    assert problem.fqn is not None
    path.unlink()
    (problem,) = verify(plain_dcp).problems
    assert "the file is missing" in problem.what


def hub_directory(directory: Path) -> Path:
    """Write a HuggingFace directory of two shards, as save_pretrained does."""
    directory.mkdir(parents=True)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, directory / names[0])
    save_file({"c": torch.zeros(5, dtype=torch.bfloat16)}, directory / names[1])
    index = {
        "metadata": {"total_size": 50, "total_parameters": 15},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1]},
    }
    (directory / INDEX_NAME).write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")
    return directory


def test_hub_directory_is_fit(tmp_path: Path) -> None:
    report = verify(hub_directory(tmp_path / "hub"))
    assert (report.ok, report.checked, report.warnings) == (True, "structure", ())
    assert report.tensor_count == 3


def test_snapshot_of_a_hub_cache_is_fit_and_no_other_link_is_followed(tmp_path: Path) -> None:
    hub = hub_directory(tmp_path / "hub")
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "r"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(hub.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert verify(snapshot).ok
    (snapshot / "model.safetensors").symlink_to(tmp_path / "other")
    (tmp_path / "other").write_bytes(b"")
    assert ("model.safetensors", "a symbolic link leads out of the checkpoint") in whats(
        verify(snapshot)
    )


def test_faults_of_a_hub_directory_are_named(tmp_path: Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))

    def edit_index(directory: Path, **changes: str) -> None:
        index = json.loads((directory / INDEX_NAME).read_text())
        index["weight_map"].update(changes)
        (directory / INDEX_NAME).write_text(json.dumps(index))

    def stale_single(directory: Path) -> None:
        save_file({"a": torch.ones(1)}, directory / "model.safetensors")

    def stale_shard(directory: Path) -> None:
        save_file({"z": torch.ones(1)}, directory / "model-00003-of-00003.safetensors")

    cases: dict[str, tuple[Callable[[Path], object], str, str]] = {
        "missing file": (lambda d: (d / second).unlink(), second, "is missing; the index lists 1 "),
        "missing key": (lambda d: edit_index(d, d=first), first, "not in the file that the index"),
        "wrong file": (lambda d: edit_index(d, c=first), first, "not in the file that the index"),
        "outside": (lambda d: edit_index(d, c="../x"), INDEX_NAME, "outside its directory"),
        "below": (lambda d: edit_index(d, c="x/y"), INDEX_NAME, "outside its directory"),
        "absolute": (lambda d: edit_index(d, c="/x"), INDEX_NAME, "outside its directory"),
        "no index": (lambda d: (d / INDEX_NAME).unlink(), INDEX_NAME, "index of these weights is"),
        "no JSON": (lambda d: (d / INDEX_NAME).write_text("{"), INDEX_NAME, "cannot be read"),
        "stale file": (stale_single, "model.safetensors", "may load them instead"),
        "stale shard": (stale_shard, "model-00003-of-00003.safetensors", "may load them instead"),
        "truncated": (lambda d: os.truncate(d / first, 100), first, "beyond the end of its file"),
        "empty": (lambda d: os.truncate(d / first, 0), first, "too short"),
    }
    for number, (name, (change, file, message)) in enumerate(cases.items()):
        directory = hub_directory(tmp_path / str(number))
        change(directory)
        report = verify(directory)
        found = [what for at, what in whats(report) if at == file]
        assert any(message in what for what in found), (name, str(report))


def test_what_readers_pass_over_in_a_hub_directory_is_a_warning(tmp_path: Path) -> None:
    directory = hub_directory(tmp_path / "hub")
    index = json.loads((directory / INDEX_NAME).read_text())
    index["metadata"]["total_size"] = 51
    del index["weight_map"]["b"]
    (directory / INDEX_NAME).write_text(json.dumps(index))
    save_file({"lora": torch.ones(1)}, directory / "adapter_model.safetensors")
    report = verify(directory)
    assert report.ok
    assert [(warning.file, warning.key) for warning in report.warnings] == [
        ("model-00001-of-00002.safetensors", "b"),
        ("adapter_model.safetensors", None),
        (INDEX_NAME, None),
    ]
    assert "warning: " in str(report)


def test_packed_and_scalar_tensors_of_a_hub_directory_are_counted_as_torch_counts(
    tmp_path: Path,
) -> None:
    tensors = [HFTensor("scalar", "F32", ()), HFTensor("packed", "F4", (3, 4))]
    header, _ = encode_header(tensors, metadata={}, align=8)
    (tmp_path / "model.safetensors").write_bytes(header + bytes(16))
    index = {"total_size": 16, "total_parameters": 13}
    weight_map = dict.fromkeys(["scalar", "packed"], "model.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": index, "weight_map": weight_map}))
    report = verify(tmp_path)
    assert (report.problems, report.warnings) == ((), ())


@pytest.mark.parametrize("kind", KINDS)
def test_our_checkpoint_without_its_manifest_is_fit_in_structure(
    root: Path, kind: str, tmp_path: Path
) -> None:
    directory = copied(root / kind / "step-100", tmp_path / "copy")
    (directory / MANIFEST_NAME).unlink()
    report = verify(directory)
    assert (report.ok, report.checked) == (True, "structure"), str(report)


def test_export_alone_is_fit(root: Path) -> None:
    assert verify(root / "many" / "step-100" / "hf").ok


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_where_there_is_no_checkpoint_the_report_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    report = verify(tmp_path / name)
    assert (report.ok, report.checked, len(report.problems)) == (False, "nothing", 1)
    assert str(tmp_path / name) in str(report)


# -- how it is called ------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_result_does_not_depend_on_the_number_of_threads(many: Path, threads: int) -> None:
    for path in [*many.glob("hf/*.safetensors"), *many.glob("*.distcp")]:
        flip(path, path.stat().st_size - 1)
    before = threading.active_count()
    assert verify(many, threads=threads).problems == verify(many, threads=1).problems
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [0, -1, "2", 1.5])
def test_threads_must_be_a_positive_number(many: Path, threads: Any) -> None:
    with pytest.raises(ConfigError, match="threads"):
        verify(many, threads=threads)


def test_url_is_verified_as_a_path_is(many: Path) -> None:
    store = fsspec.filesystem("memory")
    url = "memory://verified/step-100"
    store.put(f"{many}/", "/verified/step-100/", recursive=True)
    assert verify(url).ok
    store.pipe_file("/verified/step-100/__0_0.distcp", b"short")
    assert ("__0_0.distcp", "the file has the wrong size") in whats(verify(url))
    store.rm("/verified", recursive=True)
    assert not verify(url).ok


def test_progress_is_told_in_bytes_up_to_the_end(many: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(many, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (report.nbytes, report.nbytes)
    assert {total for _, total in calls} == {report.nbytes}


def test_exception_of_the_progress_ends_the_check_and_its_threads(many: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        verify(many, progress=stop)
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) == fds


def test_line_is_shown_on_a_terminal_and_nowhere_else(
    many: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(many)
    verify(many, progress=False)
    assert capsys.readouterr().err == ""
    verify(many, progress=True)
    shown = capsys.readouterr().err
    assert shown.endswith("\n")
    assert shown.count("\n") == 1
    assert "100%" in shown
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        verify(many)
    assert b"100%" in os.read(ours, 10_000)
    os.close(ours)


def test_line_grows_with_what_is_done() -> None:
    stream = io.StringIO()
    line = ProgressLine("verify", stream)
    for done in (0, 50, 100, 100):
        line(done, 100)
    shown = stream.getvalue()
    assert [text.count("#") for text in shown.split("\r")[1:]] == [0, 12, 24]
    assert shown.count("\n") == 1


def test_report_lists_twenty_problems_and_counts_the_others() -> None:
    problems = tuple(Problem(file=f"f{i}", what="it is bad") for i in range(25))
    report = VerifyReport(path="run", checked="structure", problems=problems)
    lines = str(report).splitlines()
    assert lines[0].startswith("run: 25 problems; ")
    assert lines[1] == "  f0: it is bad"
    assert lines[21:] == ["  ... and 5 more"]
    with pytest.raises(CorruptCheckpointError, match=r"f0: it is bad \(and 24 more problems\)"):
        report.raise_if_bad()


def test_problem_says_all_that_it_knows_and_nothing_that_breaks_a_terminal() -> None:
    problem = Problem(
        file="hf/x\x1b[2J",
        what="it is bad",
        key="k\n",
        fqn="model.k",
        start=1,
        stop=2,
        rank=3,
        expected="good",
        found="bad",
        hint="mend it",
    )
    assert str(problem) == (
        "hf/x\\x1b[2J, key 'k\\n', tensor 'model.k', bytes 1 to 2, written by rank 3: it is bad; "
        "expected good; found bad; mend it"
    )


def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path: Path) -> None:
    nbytes = 160 << 20
    model = {"big": torch.zeros(nbytes, dtype=torch.uint8)}
    directory = tmp_path / "step-1"
    writer = HFDualWriter(directory, export=HFExport())
    dcp.save({"model": model}, storage_writer=writer, no_dist=True)
    tracemalloc.start()
    try:
        assert verify(directory, threads=2).ok
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 4_200_000 + 1_000_000
    fields = manifest_of(directory)
    (name,) = fields["hf"]["files"]
    (file,) = fields["hf"]["files"].values()
    start = file["tensors"]["big"][0]
    with (directory / "hf" / name).open("r+b") as weights:
        weights.seek(start + nbytes // 2)
        weights.write(b"\1")
    (problem,) = verify(directory).problems
    assert (problem.start, problem.stop) == (start, start + nbytes)


def test_pickle_that_is_signed_is_still_not_run(many: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    (many / ".metadata").write_bytes(f"cos\nsystem\n(S'touch {witness}'\ntR.".encode())
    sign(many, ".metadata")
    (problem,) = verify(many).problems
    assert problem.file == ".metadata"
    assert not witness.exists()
