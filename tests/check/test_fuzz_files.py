"""Spoiled files of any kind: no crash, no hang, nothing outside read, no memory for claims.

A few hundred examples here, 10,000 among the slow tests.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, verify
from dcp_hf_writer.errors import CheckpointError, CorruptCheckpointError
from dcp_hf_writer.formats.parse_dcp_metadata import parse_metadata
from support import once_forms
from support.audit import MANIFEST_NAME
from support.checkpoints import encoded, sign
from support.compare import INDEX_NAME, tensor_difference
from support.mutations import pickle_streams, spoiled_bytes, spoiled_json, spoiled_metadata
from support.small_states import MODEL, model_of, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEP = 3
TARGETS = ("manifest", "header", "index", "metadata", "data")
# Of a checkpoint whose weights are stored once, in the forms that its metadata has had.
ONCE = tuple(once_forms.FORMS)

# One example takes about 20 ms; a busy machine may take long.
DEADLINE = timedelta(seconds=20)
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

# What an example may take beyond what the process has: threads with their stacks, buffers.
MEMORY_NBYTES = 1 << 30


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz") / f"step-{STEP}"
    export = HFExport(max_shard_size=150, assets={"config.json": b"{}"})
    writer = HFDualWriter(directory, export=export)
    dcp.async_save(state_of(STEP), storage_writer=writer, no_dist=True).result()
    return directory


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a checkpoint whose weights are stored once, in each form."""
    root = tmp_path_factory.mktemp("fuzz once")
    export = HFExport(max_shard_size=150, assets={"config.json": b"{}"})
    writer = HFDualWriter(root / "saved", export=export, weights="once")
    dcp.async_save(state_of(STEP), storage_writer=writer, no_dist=True).result()
    metadata = parse_metadata((root / "saved" / ".metadata").read_bytes(), path=".metadata")
    for form in ONCE:
        shutil.copytree(root / "saved", root / form)
        data = once_forms.dumps(once_forms.in_form(form, metadata))
        (root / form / ".metadata").write_bytes(data)
        sign(root / form, ".metadata")
        assert verify(root / form).ok
        assert load(root / form, "dcp", is_verified=True) is None
    return {form: root / form for form in ONCE}


# -- what is spoiled -------------------------------------------------------------------------------


def spoil_manifest(draw: st.DrawFn, directory: Path) -> str:
    path = directory / MANIFEST_NAME
    if draw(st.booleans()):
        fields = draw(spoiled_json(json.loads(path.read_bytes())))
        content = encoded(fields) if isinstance(fields, dict) else json.dumps(fields).encode()
    else:
        content = draw(spoiled_bytes(path.read_bytes()))
    path.write_bytes(content)
    return MANIFEST_NAME


def spoil_header(draw: st.DrawFn, directory: Path) -> str:
    path = min(directory.glob("hf/*.safetensors"))
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    if draw(st.booleans()):
        header = json.dumps(draw(spoiled_json(json.loads(content[8:stop])))).encode()
        length = len(header) + draw(st.sampled_from([0, 0, 0, 1, -1]))
        header = max(length, 0).to_bytes(8, "little") + header
    else:
        header = draw(spoiled_bytes(content[:stop]))
    path.write_bytes(header + content[stop:])
    return f"hf/{path.name}"


def spoil_index(draw: st.DrawFn, directory: Path) -> str:
    path = directory / "hf" / INDEX_NAME
    content = path.read_bytes()
    if draw(st.booleans()):
        path.write_text(json.dumps(draw(spoiled_json(json.loads(content)))))
    else:
        path.write_bytes(draw(spoiled_bytes(content)))
    return f"hf/{INDEX_NAME}"


def spoil_metadata(draw: st.DrawFn, directory: Path) -> str:
    path = directory / ".metadata"
    content = path.read_bytes()
    kind = draw(st.sampled_from([spoiled_bytes, spoiled_metadata]))
    path.write_bytes(draw(kind(content)))
    return ".metadata"


def spoil_data(draw: st.DrawFn, directory: Path) -> str:
    names = sorted(directory.glob("hf/*.safetensors")) + sorted(directory.glob("*.distcp"))
    path = draw(st.sampled_from(names))
    path.write_bytes(draw(spoiled_bytes(path.read_bytes())))
    return str(path.relative_to(directory))


SPOILERS: dict[str, Callable[[st.DrawFn, Path], str]] = {
    "manifest": spoil_manifest,
    "header": spoil_header,
    "index": spoil_index,
    "metadata": spoil_metadata,
    "data": spoil_data,
}


# -- what must hold --------------------------------------------------------------------------------


class Watch:
    """Notes what this process opens outside of a directory, and what it runs."""

    def __init__(self) -> None:
        self.inside: str | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "exec"}:
            self.seen.append(f"{event} {arguments}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.fsdecode(arguments[0])
            # Python formats a traceback: it reads sources, and parses lines of a file without name.
            is_traceback = ".py" in path or path == "<unknown>"
            is_system = is_traceback or path.startswith(("/proc/", "/sys/", "/dev/"))
            if not is_system and not os.path.realpath(path).startswith(self.inside):
                self.seen.append("".join([path, "\n", *traceback.format_stack(limit=12)]))


WATCH = Watch()


@pytest.fixture(scope="module", autouse=True)
def _watched(saved: Path) -> None:
    # What the first use imports and opens is no example's doing.
    verify(saved)
    load(saved, "dcp", is_verified=True)
    load(saved, "hf", is_verified=True)
    # A hook stays for the life of the process; it does nothing outside of `contained`.
    sys.addaudithook(WATCH)


@contextmanager
def contained(directory: Path) -> Iterator[None]:
    """Fail if the body opens anything outside of a directory, runs anything, or takes memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_NBYTES
    WATCH.seen.clear()
    WATCH.inside = os.path.join(os.path.realpath(directory), "")
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    # torch logs every load that fails, and pytest keeps it all.
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        WATCH.inside = None
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert WATCH.seen == []


def load(directory: Path, source: Any, *, is_verified: bool) -> str | None:
    """Load; returns how what was loaded differs from what was saved, if it was loaded."""
    state: dict[str, Any] = {
        "model": {name: torch.full(shape, -1.0) for name, (shape, _) in MODEL.items()}
    }
    if source == "dcp":
        state["step"] = 0
    reader = HFDualReader(directory, source=source, verify=is_verified)
    try:
        dcp.load(state, storage_reader=reader, no_dist=True)
    except CheckpointError:
        return None
    except CheckpointException as error:
        for found, _ in error.failures.values():
            if not isinstance(found, CheckpointError):
                raise found from error
        return None
    return tensor_difference(state["model"], model_of(STEP))


def check_example(data: st.DataObject, saved: Path, work: Path, target: str) -> None:
    directory = work / "copy"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(saved, directory)
    name = SPOILERS[target](data.draw, directory)
    is_spoiled = (directory / name).read_bytes() != (saved / name).read_bytes()
    is_signed = name != MANIFEST_NAME and data.draw(st.booleans())
    if is_signed and not name.endswith((".safetensors", ".distcp")):
        sign(directory, name)
    elif data.draw(st.booleans()) and target != "manifest":
        (directory / MANIFEST_NAME).unlink()
    with contained(directory):
        report = verify(directory, threads=1)
        differences = {
            (source, is_verified): load(directory, source, is_verified=is_verified)
            for source in ("dcp", "hf")
            for is_verified in (True, False)
        }
    assert len(str(report)) < 100_000
    if report.checked == "digests" and is_spoiled and not is_signed and target != "manifest":
        assert not report.ok
    if not is_signed and target != "manifest":
        assert differences["dcp", True] is None
        assert differences["hf", True] is None


@pytest.mark.parametrize("target", TARGETS)
def test_spoiled_file_is_refused_or_read(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, target: str
) -> None:
    work = tmp_path_factory.mktemp("work")

    @settings(max_examples=60, deadline=DEADLINE, suppress_health_check=CHECKS)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check_example(data, saved, work, target)

    run()


@pytest.mark.parametrize("form", ONCE)
def test_spoiled_metadata_of_weights_stored_once_is_refused_or_read(
    saved_once: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, form: str
) -> None:
    work = tmp_path_factory.mktemp("work")

    @settings(max_examples=100, deadline=DEADLINE, suppress_health_check=CHECKS)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check_example(data, saved_once[form], work, "metadata")

    run()


# -- what fuzzing has found ------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["offsets", "sizes"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_chunk_of_other_dimensions_than_its_tensor_is_refused(
    saved: Path, field: str, shape: tuple[int, ...]
) -> None:
    metadata = dcp.FileSystemReader(saved).read_metadata()
    tensor = metadata.state_dict_metadata["model.embed"]
    assert isinstance(tensor, TensorStorageMetadata)
    setattr(tensor.chunks[0], field, torch.Size(shape))
    with pytest.raises(CorruptCheckpointError, match="a chunk at"):
        parse_metadata(pickle.dumps(metadata), path=".metadata")


# -- streams of opcodes, and longer runs -----------------------------------------------------------


@settings(max_examples=300, deadline=DEADLINE, suppress_health_check=CHECKS)
@given(pickle_streams())
def test_stream_of_opcodes_is_refused(data: bytes) -> None:
    check_stream(data)


def check_stream(data: bytes) -> None:
    with contained(Path("/nowhere")), pytest.raises(CorruptCheckpointError) as caught:
        parse_metadata(data, path=".metadata")
    assert len(str(caught.value)) < 2000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_spoiled_files_are_refused_or_read(
    saved: Path, saved_once: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    work = tmp_path_factory.mktemp("work")

    @settings(max_examples=10_000, deadline=DEADLINE, suppress_health_check=CHECKS, database=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        target = data.draw(st.sampled_from(TARGETS + ONCE))
        if target in ONCE:
            check_example(data, saved_once[target], work, "metadata")
        else:
            check_example(data, saved, work, target)

    run()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=DEADLINE, suppress_health_check=CHECKS, database=None)
@given(pickle_streams())
def test_ten_thousand_streams_of_opcodes_are_refused(data: bytes) -> None:
    check_stream(data)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parser", ["manifest", "header", "index", "metadata"])
def test_parser_survives_fuzzing_that_is_guided_by_coverage(
    saved: Path, tmp_path: Path, parser: str
) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed; it has no wheel everywhere")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed_of(saved, parser))
    command = [
        sys.executable,
        Path(__file__).parents[1] / "support" / "fuzz_entry.py",
        parser,
        corpus,
    ]
    options = ["-max_total_time=60", "-rss_limit_mb=2048", "-timeout=10", "-max_len=20000"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None, done.stderr[-5000:]
    assert int(runs[1]) > 1000


def seed_of(saved: Path, parser: str) -> bytes:
    if parser == "manifest":
        return (saved / MANIFEST_NAME).read_bytes().rpartition(b'"digest_above"')[0]
    if parser == "header":
        return min(saved.glob("hf/*.safetensors")).read_bytes()
    return (saved / {"index": f"hf/{INDEX_NAME}", "metadata": ".metadata"}[parser]).read_bytes()
