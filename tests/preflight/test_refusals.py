"""What cannot be saved as asked is refused on every rank, by name, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec, verify
from dcp_hf_writer.errors import (
    CheckpointError,
    ConfigError,
    CoverageError,
    ExportError,
    NodeLocalPathError,
    StagingError,
    TargetExistsError,
    WriteError,
)
from support.faults import Outcome, check_outcomes, check_storage, save
from support.mounts import mount_tmpfs, needs_mounts, remount
from support.named_bytes import EXPORT
from support.rank_process import Raised
from support.ranks import run_ranks
from support.taken_targets import tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.distributed.checkpoint.planner import SavePlan

WORLD_SIZE = 2
_NOBODY = 65534


def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(24.0).reshape(8, 3), "v": torch.arange(4.0)}


class FlawedPlanner(DefaultSavePlanner):
    """Spoils the plan that torch has found valid, as a planner of one's own might."""

    def __init__(self, *, rows: int, count: int = 1) -> None:
        """Cut the chunks of `w` to `rows` rows and write each `count` times."""
        super().__init__()
        self.rows, self.count = rows, count

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Any]:
        plans, metadata = super().create_global_plan(all_plans)
        return [replace(plan, items=self._spoil(plan.items)) for plan in plans], metadata

    def _spoil(self, items: list[Any]) -> list[Any]:
        spoilt = []
        for item in items:
            if item.index.fqn != "model.w":
                spoilt.append(item)
                continue
            chunk = item.tensor_data.chunk
            sizes = torch.Size((min(self.rows, chunk.sizes[0]), *chunk.sizes[1:]))
            cut = ChunkStorageMetadata(chunk.offsets, sizes)
            data = replace(item.tensor_data, chunk=cut)
            spoilt += [replace(item, tensor_data=data)] * self.count
        return spoilt


class BrokenTokenizer:
    """An asset whose library fails."""

    def save_pretrained(self, directory: str) -> None:
        msg = f"vocabulary not found for {directory}"
        raise RuntimeError(msg)


@dataclass(frozen=True)
class Refusal:
    """A save that must be refused; each value is made anew for each rank and save."""

    kind: type[CheckpointError]
    words: tuple[str, ...]
    state: Callable[[], dict[str, Any]] = lambda: {"model": weights()}
    export: Callable[[], HFExport | None] = lambda: EXPORT
    options: Mapping[str, Any] = field(default_factory=dict)
    planner: Callable[[], DefaultSavePlanner] = DefaultSavePlanner
    use_collectives: bool = True

    @property
    def costs_only_the_export(self) -> bool:
        """Whether the DCP half is published all the same."""
        return self.kind is ExportError


def renamed(*keys: str, name: str = "w", shape: tuple[int, ...] = (8, 3)) -> HFExport:
    return HFExport(specs=[LoadSpec(name=name, hf_keys=list(keys), global_shape=shape)])


# By what is wrong. The message must name the thing, so that the user finds it.
REFUSALS: dict[str, Refusal] = {
    "unknown dtype": Refusal(
        ExportError,
        ("model.c", "complex128"),
        state=lambda: {"model": {**weights(), "c": torch.ones(2, dtype=torch.complex128)}},
    ),
    "sparse tensor": Refusal(
        StagingError,
        ("model.s", "sparse"),
        state=lambda: {"model": {**weights(), "s": torch.eye(3).to_sparse()}},
    ),
    "tensor without data": Refusal(
        StagingError,
        ("model.m", "meta"),
        state=lambda: {"model": {**weights(), "m": torch.ones(2, device="meta")}},
    ),
    "reserved key": Refusal(
        ExportError,
        ("'__metadata__'",),
        state=lambda: {"model": {**weights(), "__metadata__": torch.ones(2)}},
    ),
    "empty key": Refusal(
        ExportError, ("''",), state=lambda: {"model": {**weights(), "": torch.ones(2)}}
    ),
    "two tensors for one key": Refusal(
        ExportError, ("'v'", "model.w", "model.v"), export=lambda: renamed("v")
    ),
    "two entries that may be the model": Refusal(
        ExportError,
        ("'actor'", "'critic'", "key="),
        state=lambda: {"actor": weights(), "critic": weights()},
    ),
    "unknown key": Refusal(
        ExportError, ("'policy'", "'model'"), export=lambda: HFExport(key="policy")
    ),
    "expected key that is not there": Refusal(
        ExportError, ("'u'",), export=lambda: HFExport(expect_keys=["u", "v", "w"])
    ),
    "key that is not expected": Refusal(
        ExportError, ("'v'",), export=lambda: HFExport(expect_keys=["w"])
    ),
    "spec without tensor": Refusal(ExportError, ("'u'",), export=lambda: renamed("u", name="u")),
    "spec of another shape": Refusal(
        ExportError, ("model.w", "[8, 3]", "[3, 8]"), export=lambda: renamed("w", shape=(3, 8))
    ),
    "gap": Refusal(CoverageError, ("model.w", "[8, 3]"), planner=lambda: FlawedPlanner(rows=2)),
    "overlap": Refusal(
        CoverageError, ("model.w", "[8, 3]"), planner=lambda: FlawedPlanner(rows=8, count=2)
    ),
    "save without collectives": Refusal(ConfigError, ("use_collectives",), use_collectives=False),
    "asset named like a weight file": Refusal(
        ExportError,
        ("model.safetensors",),
        export=lambda: HFExport(assets={"model.safetensors": b"x"}),
    ),
    "asset outside of the directory": Refusal(
        ConfigError, ("'..'",), export=lambda: HFExport(assets={"../config.json": b"{}"})
    ),
    "asset of no known kind": Refusal(ConfigError, ("int",), export=lambda: HFExport(assets=[3])),
    "like without directory": Refusal(
        ConfigError, ("/nowhere/base",), export=lambda: HFExport(like="/nowhere/base")
    ),
    "tied to nothing": Refusal(
        ExportError, ("'v'", "absent"), export=lambda: HFExport(tied={"v": "absent"})
    ),
    "tied to itself": Refusal(ExportError, ("'v'",), export=lambda: HFExport(tied={"v": "v"})),
    "tied in a circle": Refusal(
        ExportError, ("'v'",), export=lambda: HFExport(tied={"v": "w", "w": "v"})
    ),
    "tied tensors of different shapes": Refusal(
        ExportError, ("'v'", "[8, 3]", "[4]"), export=lambda: HFExport(tied={"v": "w"})
    ),
}


def raised_by(refusal: Refusal, path: Path, *, no_dist: bool) -> BaseException | None:
    """Try a save; return what it raised."""
    try:
        dcp.async_save(
            refusal.state(),
            storage_writer=HFDualWriter(path, export=refusal.export(), **refusal.options),
            planner=refusal.planner(),
            no_dist=no_dist,
            use_collectives=refusal.use_collectives,
        ).result(60)
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        return error
    return None


def check_refused(refusal: Refusal, raised: BaseException | None) -> None:
    assert raised is not None, "nothing was raised"
    if not isinstance(raised, refusal.kind):
        raise raised
    missing = [word for word in refusal.words if word not in str(raised)]
    assert not missing, f"{missing} not in: {raised}"


def check_dcp_half_alone(refusal: Refusal, path: Path) -> None:
    """Check that stock torch loads all that was saved, and that there is no export."""
    saved = refusal.state()
    loaded = {
        entry: {name: torch.zeros_like(value) for name, value in tensors.items()}
        for entry, tensors in saved.items()
    }
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    for entry, tensors in saved.items():
        assert all(torch.equal(loaded[entry][name], value) for name, value in tensors.items())
    assert [one.name for one in path.iterdir() if one.is_dir()] == ["dcp-hf"]
    assert verify(path).ok


@pytest.mark.parametrize("problem", REFUSALS)
def test_save_is_refused_and_at_most_a_whole_dcp_half_is_left_when_it_has(
    problem: str, tmp_path: Path
) -> None:
    refusal = REFUSALS[problem]
    check_refused(refusal, raised_by(refusal, tmp_path / "step-1", no_dist=True))
    if refusal.costs_only_the_export:
        check_dcp_half_alone(refusal, tmp_path / "step-1")
        shutil.rmtree(tmp_path / "step-1")
    assert list(tmp_path.iterdir()) == []
    # The control: the same save without the flaw goes through, also after the refusal.
    assert raised_by(Refusal(ConfigError, ()), tmp_path / "step-1", no_dist=True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def refuse_all(rank: int, world_size: int, root: Path) -> dict[str, Raised | None]:
    found: dict[str, Raised | None] = {}
    for problem, refusal in REFUSALS.items():
        error = raised_by(refusal, root / problem, no_dist=False)
        found[problem] = None if error is None else Raised.of(error)
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Raised]]]:
    root = tmp_path_factory.mktemp("refused")
    return root, run_ranks(refuse_all, WORLD_SIZE, root)


@pytest.mark.parametrize("problem", REFUSALS)
def test_every_rank_sees_the_same_refusal_when_the_save_has(
    problem: str, refused: tuple[Path, list[dict[str, Raised]]]
) -> None:
    raised = [rank[problem] for rank in refused[1]]
    for one in raised:
        check_refused(REFUSALS[problem], one and one.error)
    if not issubclass(REFUSALS[problem].kind, StagingError):
        assert len({str(one.error) for one in raised}) == 1


def test_refusals_on_two_ranks_leave_whole_dcp_halves(
    refused: tuple[Path, list[dict[str, Raised]]],
) -> None:
    published = {name for name, one in REFUSALS.items() if one.costs_only_the_export}
    assert {path.name for path in refused[0].iterdir()} == published
    for name in published:
        check_dcp_half_alone(REFUSALS[name], refused[0] / name)


@pytest.mark.parametrize("problem", ["unknown dtype", "two entries that may be the model"])
def test_unplanned_export_is_a_warning_when_the_writer_shall_warn(
    problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = replace(REFUSALS[problem], options={"on_export_error": "warn"})
    assert raised_by(refusal, tmp_path / "step-1", no_dist=True) is None
    check_dcp_half_alone(refusal, tmp_path / "step-1")
    said = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert len(said) == 1
    assert all(word in said[0] for word in (*refusal.words, "has no export"))


def test_save_has_an_export_again_when_the_next_state_dict_can_be_exported(tmp_path: Path) -> None:
    refusal = REFUSALS["unknown dtype"]
    planner = DefaultSavePlanner(enable_plan_caching=True)
    refusal = replace(refusal, planner=lambda: planner)
    for step in (1, 2):
        check_refused(refusal, raised_by(refusal, tmp_path / f"step-{step}", no_dist=True))
        check_dcp_half_alone(refusal, tmp_path / f"step-{step}")
    sound = Refusal(ConfigError, (), planner=lambda: planner)
    assert raised_by(sound, tmp_path / "step-3", no_dist=True) is None
    assert (tmp_path / "step-3" / "hf" / "model.safetensors").exists()


def test_weights_stored_once_are_in_the_dcp_half_when_the_export_cannot_be_planned(
    tmp_path: Path,
) -> None:
    refusal = replace(REFUSALS["unknown dtype"], options={"weights": "once"})
    check_refused(refusal, raised_by(refusal, tmp_path / "step-1", no_dist=True))
    check_dcp_half_alone(refusal, tmp_path / "step-1")


# Options


@pytest.mark.parametrize("size", ["5 apples", "", "0GB", "-5GB", "5GiB", 0, -1, True, 1.5, None])
def test_max_shard_size_is_refused_when_it_is_no_size(size: Any) -> None:
    with pytest.raises(ConfigError, match="max_shard_size") as raised:
        HFExport(max_shard_size=size)
    assert repr(size) in str(raised.value)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"weights": "twice"}, "twice"),
        ({"staging": "later"}, "later"),
        ({"on_export_error": "ignore"}, "ignore"),
        ({"strategy": "gather"}, "gather"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": True}, "timeout_s"),
        ({"host_budget_bytes": 1}, "host_budget_bytes"),
        ({"storage_options": {"anon": True}}, "anon"),
        ({"export": "hf"}, "export"),
    ],
)
def test_writer_is_refused_when_an_option_is_not_known(
    options: dict[str, Any], word: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=word):
        HFDualWriter(tmp_path / "step-1", **options)


@pytest.mark.parametrize("url", ["nowhere://bucket/step-1", "gs://bucket/step-1", ""])
def test_writer_is_refused_when_nothing_can_write_to_the_path(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        HFDualWriter(url)
    assert url in str(raised.value)


# Targets that exist


def checkpoint(path: Path) -> None:
    check_outcomes([save(path.parent, path.name, 1)], None)


def dangling_symlink(path: Path) -> None:
    path.symlink_to(path.parent / "absent")


def symlink_to_checkpoint(path: Path) -> None:
    other = path.parent / "other"
    checkpoint(other)
    path.symlink_to(other)


def file(path: Path) -> None:
    path.write_text("of the user")


TARGETS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "checkpoint": (checkpoint, ("step-1", "a checkpoint", "overwrite=True")),
    "symlink to a checkpoint": (
        symlink_to_checkpoint,
        ("other", "a checkpoint", "overwrite=True"),
    ),
    "file": (file, ("step-1", "a file", "not replaced")),
    "dangling symlink": (dangling_symlink, ("step-1", "a symbolic link", "not replaced")),
}
"""What makes it, and what the message says."""


@pytest.mark.parametrize("kind", TARGETS)
def test_target_is_left_alone_when_it_may_not_be_taken(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    make, words = TARGETS[kind]
    make(root / "step-1")
    before = tree(root)
    check_outcomes([save(root, "step-1", 2)], TargetExistsError, words)
    assert tree(root) == before


@pytest.mark.parametrize("kind", ["file", "dangling symlink"])
def test_target_is_left_alone_when_it_is_no_directory(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    make, words = TARGETS[kind]
    make(root / "step-1")
    before = tree(root)
    check_outcomes([save(root, "step-1", 2, overwrite=True)], TargetExistsError, words)
    assert tree(root) == before


def save_twice(rank: int, world_size: int, root: Path) -> list[Outcome]:
    return [save(root, "step-1", 1), save(root, "step-1", 2)]


def test_every_rank_sees_that_the_target_exists(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    first, second = zip(*run_ranks(save_twice, WORLD_SIZE, root), strict=True)
    check_outcomes(first, None)
    check_outcomes(second, TargetExistsError, (str(root / "step-1"),))
    assert len({str(one.error) for one in second}) == 1
    check_storage(root, {"step-1": 1})


# Assets


def save_with_broken_asset(rank: int, world_size: int, root: Path, reaction: str) -> list[Outcome]:
    export = HFExport(assets=[BrokenTokenizer()])
    struck = save(root, "step-1", 1, export=export, on_export_error=reaction)
    return [struck, save(root, "step-2", 2)]


@pytest.mark.parametrize("reaction", ["raise", "warn"])
def test_dcp_half_is_committed_when_an_asset_cannot_be_saved(reaction: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    found = run_ranks(save_with_broken_asset, WORLD_SIZE, root, reaction)
    struck, after = zip(*found, strict=True)
    words = ("BrokenTokenizer", "vocabulary not found")
    check_outcomes(struck, *((ExportError, words) if reaction == "raise" else (None,)))
    check_outcomes(after, None)
    check_storage(root, {"step-1": 1, "step-2": 2}, without_export=["step-1"])


# Places that cannot be written to

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="`id -u` is not 0: cannot become a user")


def save_node_locally(rank: int, world_size: int, root: Path) -> tuple[list[Outcome], list[str]]:
    mount_tmpfs(root)
    dist.barrier()
    outcomes = [save(root, "step-1", 1)]
    dist.barrier()
    left = sorted(os.listdir(root))
    # The control: where all ranks look at one directory, the same processes save.
    outcomes.append(save(root.parent / "shared", "step-1", 2))
    return outcomes, left


@needs_mounts
def test_save_is_refused_when_the_path_is_local_to_each_node(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (tmp_path / "shared").mkdir()
    found = run_ranks(save_node_locally, WORLD_SIZE, root)
    check_outcomes(
        [outcomes[0] for outcomes, _ in found],
        NodeLocalPathError,
        ("rank 1", str(root / "step-1"), "shared file system"),
    )
    assert [left for _, left in found] == [[], []]
    assert list(root.iterdir()) == []
    check_outcomes([outcomes[1] for outcomes, _ in found], None)
    check_storage(tmp_path / "shared", {"step-1": 2})


def save_read_only(rank: int, world_size: int, root: Path) -> tuple[list[Outcome], list[str]]:
    # On every rank: a rank that sees another file system than the others raises alone.
    mount_tmpfs(root)
    remount(root, "ro")
    dist.barrier()
    outcomes = [save(root, "step-1", 1)]
    dist.barrier()
    left = sorted(os.listdir(root))
    outcomes.append(save(root.parent / "shared", "step-1", 2))
    return outcomes, left


@needs_mounts
def test_save_is_refused_when_the_file_system_is_read_only(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (tmp_path / "shared").mkdir()
    found = run_ranks(save_read_only, WORLD_SIZE, root)
    words = ("EROFS", str(root), "read-only")
    check_outcomes([outcomes[0] for outcomes, _ in found], WriteError, words)
    assert [left for _, left in found] == [[], []]
    check_outcomes([outcomes[1] for outcomes, _ in found], None)


def save_as_nobody(rank: int, world_size: int, root: Path) -> tuple[list[Outcome], list[str]]:
    # Once with all rights: another user may not be able to read the interpreter's own modules.
    save(root / "warm", "step-1", 1)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    outcomes = [save(root / "theirs", "step-1", 1), save(root / "own", "step-1", 1)]
    return outcomes, sorted(os.listdir(root / "theirs"))


@needs_root
def test_save_is_refused_when_the_user_may_not_write_there() -> None:
    # Not below pytest's own directory, which no other user may enter.
    with tempfile.TemporaryDirectory(prefix="dcp-hf-refusals-") as directory:
        root = Path(directory)
        root.chmod(0o755)
        for name, mode in (("theirs", 0o755), ("own", 0o777), ("own.slots", 0o700)):
            (root / name).mkdir()
            (root / name).chmod(mode)
        shutil.chown(root / "own.slots", _NOBODY, _NOBODY)
        (refused, allowed), left = run_ranks(save_as_nobody, 1, root)[0]
        check_outcomes([refused], WriteError, ("EACCES", str(root / "theirs"), "this user"))
        assert left == []
        check_outcomes([allowed], None)
        check_storage(root / "own", {"step-1": 1})
        assert stat.S_IMODE((root / "own" / "step-1" / ".metadata").stat().st_mode) & 0o444


def test_planner_of_these_tests_spoils_only_what_it_says() -> None:
    """The control of the planner: with all rows, once, the plan is a valid one."""
    with tempfile.TemporaryDirectory() as directory:
        sound = Refusal(CoverageError, (), planner=lambda: FlawedPlanner(rows=8))
        assert raised_by(sound, Path(directory) / "step-1", no_dist=True) is None
