"""Both halves share disk blocks where the file system can: same bytes, one time the space."""

from __future__ import annotations

import errno
import fcntl
import filecmp
import io
import json
import logging
import os
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, materialize, verify
from dcp_hf_writer.storage.block_clones import CloneProbe
from support.faults import Strike
from support.mounts import CLONING, join_mounts, make_image, mount_image, why_not_image
from support.processes import FreshProcess, in_fresh_process
from support.ranks import run_ranks
from support.refusing_clones import RefusingClones
from support.stock_readers import load_dcp, load_hf

MIB = 1 << 20
EXPORT = HFExport(max_shard_size="7MB", assets={"config.json": b'{"model_type": "none"}'})


def skip_without(fs_type: str) -> None:
    reason = why_not_image(fs_type)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=sorted(CLONING))
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    skip_without(request.param)
    (tmp_path / "root").mkdir()
    return make_image(tmp_path / f"{request.param}.img", request.param)


def whole_state(seed: int = 0) -> dict[str, Any]:
    # Odd sizes: each tensor starts and ends at another place within a disk block.
    make = torch.Generator().manual_seed(seed)

    def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=make).to(dtype)

    model = {f"layers.{i}.w": values(1200 + i, 601) for i in range(4)}
    model |= {f"layers.{i}.norm": values(601) for i in range(4)}
    model["embed"] = values(2101, 1203, dtype=torch.bfloat16)
    model["columns"] = values(64, 2048)
    model["replica"] = values(700, 801)
    return {"model": model, "optim": {"exp_avg": values(500, 1203)}, "step": seed}


_PLACEMENTS: dict[str, Any] = {"columns": Shard(1), "replica": Replicate()}


def sharded_state(seed: int = 0) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = whole_state(seed)
    for entry in ("model", "optim"):
        for name, tensor in whole[entry].items():
            placement = _PLACEMENTS.get(name, Shard(0))
            whole[entry][name] = distribute_tensor(tensor, mesh, [placement])
    return whole


def shared_nbytes(step: Path) -> int:
    return int(json.loads((step / "dcp-hf.json").read_text())["nbytes"]["shared"])


def used_bytes(root: Path) -> int:
    os.sync()
    stats = os.statvfs(root)
    return (stats.f_blocks - stats.f_bfree) * stats.f_frsize


def enter_image(rank: int, image: Path, root: Path) -> None:
    """Mount the image in rank 0; the other ranks join its mounts."""
    if rank == 0:
        mount_image(image, root)
    pid = [os.getpid()]
    dist.broadcast_object_list(pid, src=0)
    if rank != 0:
        join_mounts(pid[0])
    dist.barrier()


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for entry in ("model", "optim"):
        assert found[entry].keys() == expected[entry].keys()
        for name, tensor in expected[entry].items():
            assert torch.equal(found[entry][name], tensor), name


def check_archives(step: Path, scratch: Path) -> int:
    """Read every archive of the DCP files by itself, mapped; returns how many tensors there are."""
    metadata = dcp.FileSystemReader(step).read_metadata()
    count = 0
    for info in metadata.storage_data.values():
        with (step / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            archive = file.read(info.length)
        scratch.write_bytes(archive)
        if zipfile.is_zipfile(scratch):
            mapped = torch.load(scratch, mmap=True, weights_only=True)
            count += isinstance(mapped, torch.Tensor)
    return count


def save_both_ways(rank: int, world_size: int, image: Path, root: Path) -> list[int]:
    enter_image(rank, image, root)
    used = [used_bytes(root)]
    for share in ("off", "auto"):
        writer = HFDualWriter(root / share, share=share, export=EXPORT)  # type: ignore[arg-type]
        dcp.async_save(sharded_state(), storage_writer=writer).result()
        dist.barrier()
        used.append(used_bytes(root))
        dist.barrier()
    if rank == 0:
        check_both_ways(root)
    dist.barrier()
    return used


def check_both_ways(root: Path) -> None:
    off, auto = root / "off", root / "auto"
    names = sorted(os.listdir(off / "hf"))
    assert sorted(os.listdir(auto / "hf")) == names
    assert filecmp.cmpfiles(off / "hf", auto / "hf", names, shallow=False)[0] == names
    expected = whole_state()
    for step in (off, auto):
        check_equal(load_dcp(step, expected), expected)
        assert verify(step).ok
        assert check_archives(step, root.parent / "scratch") > len(expected["model"])
    assert shared_nbytes(off) == 0
    materialize(auto, root / "materialized")
    check_equal(load_dcp(root / "materialized", expected), expected)
    # Each half stays whole when the other one goes, and so does a newer step.
    shutil.copytree(auto, root / "copy")
    shutil.rmtree(auto / "hf")
    check_equal(load_dcp(auto, expected), expected)
    for file in off.glob("*.distcp"):
        file.unlink()
    assert load_hf(off / "hf").keys() == expected["model"].keys()


def test_both_halves_hold_the_bytes_of_a_save_that_shares_nothing(
    image: Path, tmp_path: Path
) -> None:
    used = run_ranks(save_both_ways, 2, image, tmp_path / "root", timeout_s=100)[0]
    state = whole_state()
    model = sum(tensor.nbytes for tensor in state["model"].values())
    twice, once = used[1] - used[0], used[2] - used[1]
    # Column shards, the edges and what is small are still written twice. btrfs also gives new space
    # to writes into a reserved extent of which another rank has already cloned a part.
    part = {"xfs": 0.9, "btrfs": 0.4}[image.stem]
    assert twice - once > part * (model - state["model"]["columns"].nbytes)


def save_alone(
    path: Path, seed: int = 0, *, export: HFExport | None = EXPORT, **options: Any
) -> None:
    writer = HFDualWriter(path, export=export, **options)
    dcp.save(whole_state(seed), storage_writer=writer, no_dist=True)


def save_with_casts(image: Path, root: Path) -> None:
    mount_image(image, root)
    bf16 = HFExport(dtype=torch.bfloat16, max_shard_size="7MB", assets=EXPORT.assets)
    save_alone(root / "cast", export=bf16)
    # The embedding is bfloat16 already; all other weights have other bytes in the export.
    embed = whole_state()["model"]["embed"].nbytes
    assert embed - 3 * 4096 < shared_nbytes(root / "cast") <= embed
    save_alone(root / "once", weights="once")
    assert shared_nbytes(root / "once") == 0
    save_alone(root / "none", export=None)
    assert shared_nbytes(root / "none") == 0
    for name in ("cast", "none"):
        check_equal(load_dcp(root / name, whole_state()), whole_state())
    for name in ("cast", "once", "none"):
        assert verify(root / name).ok
    found = whole_state(1)
    dcp.load(found, storage_reader=HFDualReader(root / "once"), no_dist=True)
    check_equal(found, whole_state())


def test_only_bytes_that_both_halves_store_are_shared(image: Path, tmp_path: Path) -> None:
    in_fresh_process(save_with_casts, image, tmp_path / "root", timeout_s=100)


def save_with_refusals(image: Path, root: Path, number: int) -> None:
    mount_image(image, root)
    save_alone(root / "whole")
    clones = RefusingClones(number, after=2)
    handler = logging.StreamHandler(said := io.StringIO())
    handler.setLevel(logging.WARNING)
    logging.getLogger("dcp_hf_writer").addHandler(handler)
    fcntl.ioctl = clones  # type: ignore[assignment]
    if number == errno.EIO:
        with pytest.raises(dcp.api.CheckpointException, match="EIO"):
            save_alone(root / "step")
        assert sorted(os.listdir(root)) == ["whole"]
        return
    save_alone(root / "step")
    # Two clones that worked, one that did not; after that none is tried.
    assert clones.calls == 3
    assert 0 < shared_nbytes(root / "step") < shared_nbytes(root / "whole")
    (line,) = said.getvalue().splitlines()
    assert "does not share disk blocks" in line
    assert os.strerror(number) in line
    check_equal(load_dcp(root / "step", whole_state()), whole_state())
    assert verify(root / "step").ok


@pytest.mark.parametrize(
    "number",
    [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EIO],
    ids=lambda number: errno.errorcode[number],
)
def test_bytes_are_written_where_a_clone_is_refused(tmp_path: Path, number: int) -> None:
    skip_without("xfs")
    (tmp_path / "root").mkdir()
    image = make_image(tmp_path / "image", "xfs")
    in_fresh_process(save_with_refusals, image, tmp_path / "root", number, timeout_s=100)


def die_at_clone(root: Path, image: Path, n: int) -> str:
    mount_image(image, root)
    # What the dead process before this one left on the disk.
    for step in root.glob("step-*"):
        assert verify(step).ok
    if n:
        check_equal(load_dcp(root / "step-1", whole_state(1)), whole_state(1))
    else:
        save_alone(root / "step-1", 1)
    Strike(rank=0, point="before clone", action="kill", hit=n + 1).install(root)
    save_alone(root / "step-2", 2)
    return "survived"


def test_a_kill_at_each_clone_leaves_the_previous_checkpoint_whole(tmp_path: Path) -> None:
    skip_without("xfs")
    root = tmp_path / "root"
    root.mkdir()
    image = make_image(tmp_path / "image", "xfs")
    for n in range(100):
        with FreshProcess(die_at_clone, root, image, n, timeout_s=60) as process:
            if process.exitcode() != -signal.SIGKILL:
                assert process.result() == "survived"
                break
    # The run before the last died at the last clone.
    assert n > 4


def test_a_file_system_that_cannot_clone_is_asked_once_and_written_as_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "dcp_hf_writer.storage.block_clones")
    shm = Path("/dev/shm")
    probe = CloneProbe()
    assert probe.block_nbytes(str(shm)) is None
    assert probe.block_nbytes(str(shm)) is None
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "cannot share disk blocks" in caplog.text
