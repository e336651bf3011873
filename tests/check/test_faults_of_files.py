"""Faults D1 to D7: damaged, hostile and foreign files are refused, and nothing wrong is loaded."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, LoadSpec, verify
from dcp_hf_writer.errors import CheckpointError, CorruptCheckpointError, ExportError, ReadError
from support.audit import MANIFEST_NAME
from support.checkpoints import copied, flip, manifest_of, put_manifest, sign
from support.compare import INDEX_NAME, tensor_difference
from support.ranks import run_ranks
from support.small_states import MODEL, model_of, state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcp_hf_writer import VerifyReport

STEP = 100
Source = Literal["dcp", "hf"]
SOURCES: tuple[Source, ...] = ("dcp", "hf")


def save(rank: int, world_size: int, directory: Path) -> None:
    """Save a checkpoint of several output files and two DCP files."""
    state = state_of(STEP, init_device_mesh("cpu", (world_size,)))
    export = HFExport(max_shard_size=150, assets={"config.json": b"{}"})
    dcp.async_save(state, storage_writer=HFDualWriter(directory, export=export)).result()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults") / f"step-{STEP}"
    run_ranks(save, 2, directory)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return copied(saved, tmp_path / "copy")


def load(directory: Path, source: Source, *, is_verified: bool = True) -> CheckpointError | None:
    """Load; the result is what was saved, or an error: of a digest before anything is loaded."""
    model = {name: torch.full(shape, -1.0) for name, (shape, _) in MODEL.items()}
    state: dict[str, Any] = {"model": dict(model)}
    if source == "dcp":
        state["optim"] = state_of(0)["optim"]
    reader = HFDualReader(directory, source=source, verify=is_verified)
    try:
        dcp.load(state, storage_reader=reader, no_dist=True)
    except (CheckpointError, CheckpointException) as error:
        found = error
    else:
        assert tensor_difference(state["model"], model_of(STEP)) is None
        return None
    if isinstance(found, CheckpointException):
        ((found, _),) = found.failures.values()
        assert isinstance(found, CheckpointError), found
    if "nothing was loaded" in str(found):
        assert all(bool((one == -1).all()) for one in model.values()), "something was loaded"
    return found


def refusals(directory: Path, source: Source) -> list[CheckpointError | None]:
    """Load with and without the digests."""
    return [load(directory, source, is_verified=verified) for verified in (True, False)]


def whats(report: VerifyReport, file: str) -> str:
    """Return all that a report says of a file, in one text."""
    assert not report.ok
    return "\n".join(str(problem) for problem in report.problems if problem.file == file)


def weights_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("hf/*.safetensors"))


def test_fixture_is_fit_and_loads_from_either_half(saved: Path) -> None:
    assert verify(saved).ok
    assert len(weights_of(saved)) > 2
    assert (saved / "hf" / INDEX_NAME).exists()
    for source in SOURCES:
        assert refusals(saved, source) == [None, None]


# -- D1: bit flip, truncation, zeroed range --------------------------------------------------------


def d1_files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def is_read(name: str, source: Source) -> bool:
    """Whether a load from a source takes anything of a file."""
    if name == MANIFEST_NAME or name.startswith("dcp-hf/"):
        return True
    return name.startswith("hf/") == (source == "hf")


def test_d1_no_flipped_bit_is_loaded_and_each_is_found(copy: Path) -> None:
    rng = random.Random(1)
    refused: dict[Source, int] = dict.fromkeys(SOURCES, 0)
    for name in d1_files(copy):
        size = (copy / name).stat().st_size
        for position in sorted({0, size - 1, *rng.sample(range(size), min(size, 6))}):
            flip(copy / name, position, position % 8)
            report = verify(copy, threads=1)
            assert name in {problem.file for problem in report.problems}
            for source in SOURCES:
                error = load(copy, source)
                assert error is None or is_read(name, source), (name, position)
                refused[source] += error is not None
            flip(copy / name, position, position % 8)
    assert all(count > 10 for count in refused.values())
    assert verify(copy).ok


def test_d1_flip_in_the_data_is_refused_with_file_key_and_bytes(copy: Path) -> None:
    fields = manifest_of(copy)
    for name, file in fields["hf"]["files"].items():
        for key, (start, *_) in file["tensors"].items():
            flip(copy / "hf" / name, start)
            error = load(copy, "hf")
            assert isinstance(error, CorruptCheckpointError)
            assert error.key == key
            assert "nothing was loaded" in str(error)
            for text in (f"hf/{name}", f"'{key}'", f"bytes {start} to "):
                assert text in str(error)
            flip(copy / "hf" / name, start)
    for name, dcp_file in fields["dcp"].items():
        for start, nbytes, _ in dcp_file["ranges"]:
            flip(copy / name, start)
            error = load(copy, "dcp")
            assert isinstance(error, CorruptCheckpointError)
            assert f"{name}" in str(error)
            assert "nothing was loaded" in str(error)
            assert f"bytes {start} to {start + nbytes}" in str(error)
            flip(copy / name, start)


@pytest.mark.parametrize("kind", ["truncated", "zeroed", "empty", "missing"])
def test_d1_damaged_file_is_found_and_not_loaded(copy: Path, kind: str) -> None:
    damage: dict[str, Callable[[Path, bytes], object]] = {
        "truncated": lambda path, content: path.write_bytes(content[: len(content) * 2 // 3]),
        "zeroed": lambda path, content: path.write_bytes(
            content[: len(content) // 3] + bytes(len(content) - len(content) // 3)
        ),
        "empty": lambda path, _: path.write_bytes(b""),
        "missing": lambda path, _: path.unlink(),
    }
    for name in d1_files(copy):
        content = (copy / name).read_bytes()
        damage[kind](copy / name, content)
        report = verify(copy)
        assert not report.ok or name == MANIFEST_NAME
        if name != MANIFEST_NAME or kind != "missing":
            assert name in {problem.file for problem in report.problems}
        for source in SOURCES:
            error = load(copy, source)
            is_spare = kind == "missing" and name in {"hf/config.json", f"hf/{INDEX_NAME}"}
            is_needed = is_read(name, source) and not is_spare
            assert isinstance(error, (CorruptCheckpointError, ReadError)) == is_needed, name
        (copy / name).write_bytes(content)
    assert verify(copy).ok


def test_d1_dcp_half_of_a_given_writer_is_verified_as_well(tmp_path: Path) -> None:
    directory = tmp_path / f"step-{STEP}"
    writer = HFDualWriter(directory, dcp_writer=dcp.FileSystemWriter(tmp_path / "unused"))
    dcp.async_save(state_of(STEP), storage_writer=writer, no_dist=True).result()
    assert verify(directory).ok
    assert refusals(directory, "dcp") == [None, None]
    (path,) = directory.glob("*.distcp")
    flip(path, path.stat().st_size // 2)
    assert "the digest of the file differs" in whats(verify(directory), path.name)
    assert isinstance(load(directory, "dcp"), CorruptCheckpointError)


# -- D2: hostile headers ---------------------------------------------------------------------------


def edited(content: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    body = json.dumps(header).encode()
    return len(body).to_bytes(8, "little") + body + content[8 + length :]


def first_of(header: dict[str, Any]) -> Any:
    return header[min(header.keys() - {"__metadata__"})]


def doubled(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    header = json.loads(text)
    key = min(header.keys() - {"__metadata__"})
    body = text[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}".encode()
    return len(body).to_bytes(8, "little") + body + content[8 + length :]


D2: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "length 2^63": (
        lambda c: (1 << 63).to_bytes(8, "little") + c[8:],
        "larger than readers accept",
    ),
    "length of 99 MB": (
        lambda c: (99_000_000).to_bytes(8, "little") + c[8:],
        "beyond the end of its file",
    ),
    "hole": (lambda c: edited(c, lambda h: h.pop(min(h))) + b"\0", "hole|does not end with"),
    "overlap": (
        lambda c: edited(c, lambda h: h.update(copy_of_first=first_of(h))),
        "tensors overlap",
    ),
    "overflow": (
        lambda c: edited(c, lambda h: first_of(h).update(shape=[1 << 62, 1 << 62])),
        "too many elements",
    ),
    "negative dim": (
        lambda c: edited(c, lambda h: first_of(h).update(shape=[-1, -1])),
        "not a list of sizes",
    ),
    "offset beyond the end": (
        lambda c: edited(c, lambda h: first_of(h).update(data_offsets=[0, 1 << 40])),
        "do not match its shape and dtype",
    ),
    "duplicate key": (doubled, "twice in one object"),
    "no JSON": (lambda c: c[:8] + b"[" + c[9:], "not a JSON object"),
}


@pytest.mark.parametrize("name", D2)
def test_d2_hostile_header_is_refused_without_memory_for_what_it_claims(
    copy: Path, name: str
) -> None:
    change, message = D2[name]
    path = weights_of(copy)[0]
    path.write_bytes(change(path.read_bytes()))
    tracemalloc.start()
    try:
        report = verify(copy, threads=1)
        errors = refusals(copy, "hf")
        (copy / MANIFEST_NAME).unlink()
        report_of_structure = verify(copy)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    for one in (report, report_of_structure):
        assert re.search(message, whats(one, f"hf/{path.name}"))
    for error in errors:
        assert isinstance(error, CorruptCheckpointError)
    assert re.search(message, str(errors[1]))
    assert path.name in str(errors[1])
    assert peak < 20_000_000


# -- D3: names -------------------------------------------------------------------------------------


def save_names(directory: Path, *names: str, **options: Any) -> None:
    state = {"model": {name: torch.ones(2) for name in names}}
    writer = HFDualWriter(directory, export=HFExport(**options))
    dcp.async_save(state, storage_writer=writer, no_dist=True).result()


@pytest.mark.parametrize("key", ["__metadata__", "", "\ud800"])
def test_d3_key_that_cannot_be_stored_costs_the_export(tmp_path: Path, key: str) -> None:
    spec = LoadSpec("layer.weight", key, (2,))
    with pytest.raises(ExportError) as caught:
        save_names(tmp_path / "step-1", "layer.weight", specs=[spec])
    assert caught.value.key == key
    assert not (tmp_path / "step-1" / "hf").exists()
    assert verify(tmp_path / "step-1").ok


def test_d3_two_tensors_under_one_key_are_named_and_cost_the_export(tmp_path: Path) -> None:
    specs = [LoadSpec("a", "same", (2,)), LoadSpec("b", "same", (2,))]
    with pytest.raises(ExportError, match=r"'model\.a' and 'model\.b'") as caught:
        save_names(tmp_path / "step-1", "a", "b", specs=specs)
    assert caught.value.key == "same"
    assert not (tmp_path / "step-1" / "hf").exists()
    assert verify(tmp_path / "step-1").ok


def test_d3_odd_keys_are_only_keys(tmp_path: Path) -> None:
    names = ["../x", "/etc/passwd", "a\nb", "a\x1b[2J", "\u202e", "a b", "\\", '"']
    save_names(tmp_path / "step-1", *names)
    report = verify(tmp_path / "step-1")
    assert report.ok, str(report)
    state = {"model": {name: torch.zeros(2) for name in names}}
    for source in SOURCES:
        reader = HFDualReader(tmp_path / "step-1", source=source, verify=True)
        dcp.load(state, storage_reader=reader, no_dist=True)
        assert all(bool((one == 1).all()) for one in state["model"].values())
        for one in state["model"].values():
            one.zero_()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


# -- D4: a million tensors -------------------------------------------------------------------------


def test_d4_header_that_readers_would_refuse_is_not_read(copy: Path) -> None:
    # Its size alone decides, so a file of that size without a byte in it serves.
    path = weights_of(copy)[0]
    nbytes = 135 * 1_000_000
    path.write_bytes(nbytes.to_bytes(8, "little"))
    os.truncate(path, nbytes + 100)
    (copy / MANIFEST_NAME).unlink()
    tracemalloc.start()
    try:
        report = verify(copy)
        error = load(copy, "hf", is_verified=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "larger than readers accept" in whats(report, f"hf/{path.name}")
    assert "larger than readers accept" in str(error)
    assert peak < 20_000_000


# -- D5: code, and paths that lead elsewhere -------------------------------------------------------


class Opened:
    """Notes what this process opens, below what, and whether code of a pickle runs."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.is_on = False


OPENED = Opened()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not OPENED.is_on:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        # Python 3.13 looks for a file of this name when it parses the lines of a traceback.
        if arguments[0] != "<unknown>":
            OPENED.paths.append(os.fsdecode(arguments[0]))
    elif event in {"os.system", "subprocess.Popen", "exec", "pickle.find_class"}:
        OPENED.paths.append(f"{event}: {arguments}")


@pytest.fixture(scope="module", autouse=True)
def _audited() -> None:
    import sys

    sys.addaudithook(_hook)
    # What a first load imports is imported now.
    assert OPENED.paths == []


@dataclass
class Payload:
    witness: str

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def outside(directory: Path, action: Callable[[], object]) -> list[str]:
    """Return what an action opens outside of a directory, or runs."""
    OPENED.paths.clear()
    OPENED.is_on = True
    try:
        action()
    finally:
        OPENED.is_on = False
    inside = os.path.join(os.path.realpath(directory), "")
    return [
        path
        for path in OPENED.paths
        if not os.path.realpath(path).startswith(inside)
        and not path.startswith(("/proc/", "/sys/", "/dev/"))
        and ".py" not in path
    ]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
def test_d5_pickle_with_code_is_refused_and_not_run(
    copy: Path, tmp_path: Path, protocol: int, *, is_signed: bool
) -> None:
    witness = tmp_path / "witness"
    metadata = dcp.FileSystemReader(copy).read_metadata()
    metadata.planner_data = Payload(str(witness))
    (copy / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    if is_signed:
        sign(copy, ".metadata")
    report = verify(copy)
    assert ".metadata" in {problem.file for problem in report.problems}
    for error in refusals(copy, "dcp"):
        assert isinstance(error, CorruptCheckpointError)
        assert ".metadata" in str(error)
    assert not witness.exists()
    # The control: torch runs it.
    dcp.FileSystemReader(copy).read_metadata()
    assert witness.exists()


@pytest.mark.parametrize("is_absolute", [True, False], ids=["absolute", "above"])
def test_d5_path_in_the_metadata_that_leads_elsewhere_is_refused(
    copy: Path, tmp_path: Path, *, is_absolute: bool
) -> None:
    elsewhere = tmp_path / "elsewhere.distcp"
    shutil.copy(copy / "__0_0.distcp", elsewhere)
    metadata = dcp.FileSystemReader(copy).read_metadata()
    for info in (metadata.storage_data or {}).values():
        if info.relative_path == "__0_0.distcp":
            info.relative_path = str(elsewhere) if is_absolute else f"../{elsewhere.name}"
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(copy, ".metadata")
    for _ in range(2):
        report = verify(copy)
        assert "a file outside the checkpoint" in whats(report, ".metadata")
        assert isinstance(load(copy, "dcp", is_verified=False), CorruptCheckpointError)
        assert outside(copy, lambda: (verify(copy), load(copy, "dcp", is_verified=False))) == []
        (copy / MANIFEST_NAME).unlink(missing_ok=True)
    # The control: torch follows the path.
    state = {"model": {name: torch.zeros(shape) for name, (shape, _) in MODEL.items()}}
    dcp.load(state, checkpoint_id=copy, no_dist=True)


@pytest.mark.parametrize("name", ["/etc/hostname", "../x.safetensors", "a/../../x.safetensors"])
def test_d5_path_in_the_manifest_that_leads_elsewhere_is_refused(copy: Path, name: str) -> None:
    fields = manifest_of(copy)
    changes = {
        "files": lambda f: f["files"].update({name: f["files"].pop(".metadata")}),
        "dcp": lambda f: f["dcp"].update({name: f["dcp"].pop("__0_0.distcp")}),
        "hf": lambda f: f["hf"]["files"].update({name: f["hf"]["files"].popitem()[1]}),
        "subdir": lambda f: f["hf"].update(subdir=name),
    }
    for change in changes.values():
        hostile = json.loads(json.dumps(fields))
        change(hostile)
        put_manifest(copy, hostile)
        assert "the manifest holds an invalid value" in whats(verify(copy), MANIFEST_NAME)
        for source in SOURCES:
            assert isinstance(load(copy, source), CorruptCheckpointError)
        assert outside(copy, lambda: (verify(copy), load(copy, "hf"))) == []


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors"])
def test_d5_path_in_the_index_that_leads_elsewhere_is_refused(
    copy: Path, tmp_path: Path, name: str
) -> None:
    save_file(model_of(STEP), tmp_path / "x.safetensors")
    index = json.loads((copy / "hf" / INDEX_NAME).read_bytes())
    index["weight_map"]["head"] = name.replace("/x", f"{tmp_path}/x") if name[0] == "/" else name
    (copy / "hf" / INDEX_NAME).write_text(json.dumps(index))
    sign(copy, f"hf/{INDEX_NAME}")
    for _ in range(2):
        assert "outside its directory" in whats(verify(copy), f"hf/{INDEX_NAME}")
        assert isinstance(load(copy, "hf", is_verified=False), CorruptCheckpointError)
        assert outside(copy, lambda: (verify(copy), load(copy, "hf", is_verified=False))) == []
        (copy / MANIFEST_NAME).unlink(missing_ok=True)


def test_d5_link_that_leads_elsewhere_is_refused(copy: Path, tmp_path: Path) -> None:
    for name in ("__0_0.distcp", f"hf/{weights_of(copy)[0].name}", ".metadata", MANIFEST_NAME):
        target = tmp_path / "target"
        (copy / name).rename(target)
        (copy / name).symlink_to(target)
        assert "a symbolic link leads out of the checkpoint" in whats(verify(copy), name)
        source: Source = "hf" if name.startswith("hf/") else "dcp"
        assert isinstance(load(copy, source), CorruptCheckpointError)
        assert outside(copy, lambda: (verify(copy), load(copy, source))) == []  # noqa: B023
        (copy / name).unlink()
        target.rename(copy / name)
    (copy / "hf").rename(tmp_path / "target")
    (copy / "hf").symlink_to(tmp_path / "target")
    assert not verify(copy).ok
    assert isinstance(load(copy, "hf"), CheckpointError)


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket"])
def test_d5_what_is_no_file_is_refused_and_not_waited_for(copy: Path, kind: str) -> None:
    import socket

    for name in ("__0_0.distcp", f"hf/{weights_of(copy)[0].name}", ".metadata"):
        path = copy / name
        content = path.read_bytes()
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        else:
            with socket.socket(socket.AF_UNIX) as one:
                here = Path.cwd()
                os.chdir(path.parent)
                one.bind(path.name)
                os.chdir(here)
        assert not verify(copy).ok
        source: Source = "hf" if name.startswith("hf/") else "dcp"
        assert isinstance(load(copy, source), (CorruptCheckpointError, ReadError))
        if kind == "directory":
            path.rmdir()
        else:
            path.unlink()
        path.write_bytes(content)
    assert verify(copy).ok


# -- D6: blocks that do not tile a tensor ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["too little", "too much", "overlapping", "outside"])
def test_d6_blocks_that_do_not_tile_a_tensor_are_found_and_not_loaded(
    copy: Path, kind: str
) -> None:
    for key in ("embed", "layers.0.w", "norm"):
        fields = manifest_of(copy)
        tensor = next(
            file["tensors"][key]
            for file in fields["hf"]["files"].values()
            if key in file["tensors"]
        )
        original = json.loads(json.dumps(tensor[3]))
        changes: dict[str, Callable[[list[Any]], object]] = {
            "too little": lambda blocks: blocks.pop(),
            "too much": lambda blocks: blocks.append(blocks[-1]),
            "overlapping": lambda blocks: blocks.append([0, blocks[0][1], *blocks[0][2:]]),
            "outside": lambda blocks: blocks[-1].__setitem__(1, 1_000_000),
        }  # fmt: skip
        changes[kind](tensor[3])
        put_manifest(copy, fields)
        report = verify(copy)
        text = "\n".join(map(str, report.problems))
        # A block outside its file belongs to no tensor.
        assert ("dcp-hf/digests-0000" if kind == "outside" else f"'{key}'") in text
        assert not report.ok
        error = load(copy, "hf")
        assert isinstance(error, CorruptCheckpointError), (key, kind)
        tensor[3] = original
        put_manifest(copy, fields)
    assert verify(copy).ok


# -- D7: files of an older save --------------------------------------------------------------------


def test_d7_shard_of_an_older_save_is_found(copy: Path) -> None:
    save_file({"embed": torch.zeros(7, 4)}, copy / "hf" / "model-00009-of-00009.safetensors")
    report = verify(copy)
    text = whats(report, "hf/model-00009-of-00009.safetensors")
    assert "does not belong to the checkpoint" in text
    assert "readers may load them instead of or with the others" in text
    (copy / MANIFEST_NAME).unlink()
    text = whats(verify(copy), "hf/model-00009-of-00009.safetensors")
    assert "readers may load them instead of or with the others" in text
    # A load takes what the index names.
    assert load(copy, "hf", is_verified=False) is None


def test_d7_single_file_of_an_older_save_is_found_and_not_loaded(copy: Path) -> None:
    save_file({"embed": torch.zeros(7, 4)}, copy / "hf" / "model.safetensors")
    assert "readers may load them instead of" in whats(verify(copy), "hf/model.safetensors")
    for error in refusals(copy, "hf"):
        assert isinstance(error, CorruptCheckpointError)
        assert "left from another save" in str(error)


def test_d7_dcp_file_of_an_older_save_is_found(copy: Path) -> None:
    shutil.copy(copy / "__0_0.distcp", copy / "__7_0.distcp")
    assert "does not belong to the checkpoint" in whats(verify(copy), "__7_0.distcp")
    assert load(copy, "dcp") is None
