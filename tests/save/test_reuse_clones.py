"""`reuse=` on file systems that can clone: a block that is equal shares the earlier disk blocks."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import verify
from support.faults import Strike
from support.mounts import CLONING, join_mounts, make_image, mount_image, why_not_image
from support.processes import FreshProcess, in_fresh_process
from support.ranks import run_ranks
from support.refusing_clones import RefusingClones
from support.reused_steps import (
    WEIGHT_NBYTES,
    check_as_written,
    is_linked,
    reused_nbytes,
    save_step,
)

if TYPE_CHECKING:
    from pathlib import Path

BLOCK_NBYTES = 4096


def image_of(tmp_path: Path, fs_type: str) -> Path:
    reason = why_not_image(fs_type)
    if reason is not None:
        pytest.skip(reason)
    (tmp_path / "root").mkdir()
    return make_image(tmp_path / f"{fs_type}.img", fs_type)


@pytest.fixture(params=sorted(CLONING))
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return image_of(tmp_path, request.param)


@pytest.fixture
def xfs(tmp_path: Path) -> Path:
    return image_of(tmp_path, "xfs")


def used_bytes(root: Path) -> int:
    os.sync()
    stats = os.statvfs(root)
    return (stats.f_blocks - stats.f_bfree) * stats.f_frsize


def saved_on(root: Path, step: int, **options: Any) -> int:
    """Save a step that reuses the step before; returns the bytes that it takes of the disk."""
    before = used_bytes(root)
    earlier = root / f"step-{step - 1}"
    save_step(root / f"step-{step}", step, reuse=earlier if step > 1 else None, **options)
    return used_bytes(root) - before


def save_alone(image: Path, root: Path) -> None:
    mount_image(image, root)
    saved_on(root, 1)
    taken = saved_on(root, 2)
    step = root / "step-2"
    assert is_linked(step, root / "step-1") == [True, True, False]
    reused = reused_nbytes(step)
    # Four weights are linked and one is cloned, and so is what the optimizer does not train, at
    # least without its edges. The DCP half shares the weights with the new export.
    assert reused is not None
    assert 0 <= 6 * (WEIGHT_NBYTES + 601 * 4) - reused < 2 * 601 * 4 * 6 + 2 * BLOCK_NBYTES
    # What is left: the trained weight, the trained moments, edges, and what is small.
    assert taken < 2.5 * WEIGHT_NBYTES + (1 << 20)
    check_as_written(step, 2)
    shutil.rmtree(root / "plain")
    # Without shared halves, and without an export, the DCP half is compared with the earlier one.
    for name, options in (("off", {"share": "off"}), ("none", {"export": None})):
        save_step(root / f"{name}-1", 1, **options)
        save_step(root / f"{name}-2", 2, reuse=root / f"{name}-1", **options)
        found = reused_nbytes(root / f"{name}-2")
        assert found is not None
        assert found > (11 if name == "off" else 6) * (WEIGHT_NBYTES - 2 * BLOCK_NBYTES)
        check_as_written(root / f"{name}-2", 2, **options)
    shutil.rmtree(root / "step-1")
    assert verify(step).ok


# XFS gives speculative space back late on a busy machine, so the space taken is measured apart.
@pytest.mark.slow
def test_equal_blocks_of_both_halves_are_cloned(image: Path, tmp_path: Path) -> None:
    in_fresh_process(save_alone, image, tmp_path / "root", timeout_s=100)


def save_sharded(rank: int, world_size: int, image: Path, root: Path) -> None:
    if rank == 0:
        mount_image(image, root)
    pid = [os.getpid()]
    dist.broadcast_object_list(pid, src=0)
    if rank != 0:
        join_mounts(pid[0])
    dist.barrier()
    for step in (1, 2, 3):
        save_step(root / f"step-{step}", step, reuse=root / f"step-{step - 1}")
    save_step(root / "plain", 3)
    if rank == 0:
        for path in sorted((root / "plain").rglob("*.*")):
            found = root / "step-3" / path.relative_to(root / "plain")
            is_record = path.name == ".metadata" or path.name.startswith(("dcp-hf", "digests"))
            assert is_record or path.read_bytes() == found.read_bytes(), path
        assert is_linked(root / "step-3", root / "step-1") == [True, True, False]
        shutil.rmtree(root / "step-2")
        assert verify(root / "step-1").ok
        assert verify(root / "step-3").ok
    dist.barrier()


def test_ranks_reuse_a_step_that_reused_one(xfs: Path, tmp_path: Path) -> None:
    run_ranks(save_sharded, 2, xfs, tmp_path / "root", timeout_s=100)


def save_with_refusals(image: Path, root: Path) -> None:
    mount_image(image, root)
    save_step(root / "step-1", 1, share="off")
    handler = logging.StreamHandler(said := io.StringIO())
    handler.setLevel(logging.WARNING)
    logging.getLogger("dcp_hf_writer").addHandler(handler)
    ioctl = fcntl.ioctl
    for number in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSPC, errno.EDQUOT):
        step = root / errno.errorcode[number]
        fcntl.ioctl = clones = RefusingClones(number, after=1)  # type: ignore[assignment]
        try:
            save_step(step, 2, share="off", reuse=root / "step-1")
        finally:
            fcntl.ioctl = ioctl
        # One clone that worked, one that did not; after that none is tried.
        assert clones.calls == 2
        line = said.getvalue().splitlines()[-1]
        assert "not reused any further" in line
        assert os.strerror(number) in line
        assert verify(step).ok
    assert len(said.getvalue().splitlines()) == 5
    check_as_written(step, 2, share="off")
    fcntl.ioctl = RefusingClones(errno.EIO, after=1)  # type: ignore[assignment]
    with pytest.raises(dcp.api.CheckpointException, match="EIO"):
        save_step(root / "step-2", 2, share="off", reuse=root / "step-1")
    assert not (root / "step-2").exists()
    assert verify(root / "step-1").ok


def test_bytes_are_written_where_a_clone_is_refused(xfs: Path, tmp_path: Path) -> None:
    in_fresh_process(save_with_refusals, xfs, tmp_path / "root", timeout_s=100)


def save_after_damage(image: Path, root: Path) -> None:
    mount_image(image, root)
    save_step(root / "step-1", 1, share="off")
    for name in ("hf/model-00003-of-00003.safetensors", "__0_0.distcp"):
        file = root / "step-1" / name
        data = bytearray(file.read_bytes())
        # Within the frozen weight of the file that is not linked, and within each weight of the
        # DCP half.
        for at in range(WEIGHT_NBYTES // 2, len(data), WEIGHT_NBYTES // 2):
            data[at] ^= 1
        file.write_bytes(data)
    save_step(root / "step-2", 2, share="off", reuse=root / "step-1")
    assert reused_nbytes(root / "step-2") == 4 * WEIGHT_NBYTES
    check_as_written(root / "step-2", 2, share="off")


def test_damaged_blocks_are_not_cloned(xfs: Path, tmp_path: Path) -> None:
    in_fresh_process(save_after_damage, xfs, tmp_path / "root", timeout_s=100)


def die_at(root: Path, image: Path, point: str, n: int) -> str:
    mount_image(image, root)
    # What the dead process before this one left on the disk.
    for step in root.glob("step-*"):
        assert verify(step).ok
    if n:
        check_as_written(root / "step-1", 1, share="off")
    else:
        save_step(root / "step-1", 1, share="off")
    Strike(rank=0, point=point, action="kill", hit=n + 1).install(root)
    save_step(root / "step-2", 2, share="off", reuse=root / "step-1")
    return "survived"


@pytest.mark.slow
@pytest.mark.parametrize(("point", "least"), [("before link", 2), ("before reuse", 6)])
def test_a_kill_at_each_link_and_clone_leaves_the_earlier_checkpoint_whole(
    xfs: Path, tmp_path: Path, point: str, least: int
) -> None:
    root = tmp_path / "root"
    for n in range(100):
        with FreshProcess(die_at, root, xfs, point, n, timeout_s=60) as process:
            if process.exitcode() != -signal.SIGKILL:
                assert process.result() == "survived"
                break
    # The run before the last died at the last one.
    assert n >= least
