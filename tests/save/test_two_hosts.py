"""Two hosts with two ranks each, in namespaces joined by a veth pair: S3 and a shared directory."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from dcp_hf_writer import verify
from dcp_hf_writer.save.owner_process import host_id
from support.faults import Strike, hits
from support.hosts import Host, two_hosts, why_no_hosts
from support.log_lines import log_lines
from support.ranks import run_ranks
from support.s3_servers import serving
from support.store_saves import Store, save_step

if TYPE_CHECKING:
    from pathlib import Path

WORLD_SIZE = 4
PORT = 29571


def move(rank: int, world_size: int, hosts: tuple[Host, Host]) -> None:
    """Move this rank to its host, and join the others over the link."""
    dist.destroy_process_group()
    hosts[rank // 2].join()
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{hosts[0].address}:{PORT}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )


def save_on_hosts(
    rank: int, world_size: int, hosts: tuple[Host, Host], store: Store, shared: str
) -> tuple[str, str, list[str | None], str]:
    """Move to a host, join the others over the link, and save to the store and to the directory."""
    move(rank, world_size, hosts)
    lines = log_lines()
    # ext4 is one page cache here. Two clients of a network file system would have two.
    errors = [
        save_step(store, "step-1", 1),
        save_step(Store(shared), "step-1", 1, strategy="exchange"),
    ]
    return socket.gethostname(), host_id(), errors, "\n".join(lines)


def save_here(rank: int, world_size: int, path: str) -> str | None:
    # The digests files say who wrote which bytes: each rank its own, as on a store.
    return save_step(Store(path), "step-1", 1, share="off", strategy="direct")


def files_below(path: Path) -> dict[str, bytes]:
    found = (one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): one.read_bytes() for one in found}


@pytest.mark.timeout(180)
def test_ranks_of_two_hosts_write_the_files_of_one_host(tmp_path: Path) -> None:
    reason = why_no_hosts(tmp_path)
    if reason is not None:
        pytest.skip(reason)
    assert run_ranks(save_here, WORLD_SIZE, str(tmp_path / "here")) == [None] * WORLD_SIZE
    expected = files_below(tmp_path / "here" / "step-1")
    with two_hosts(tmp_path) as hosts, serving("rclone", on=hosts[0]) as server:
        bucket = hosts[0].call(server.new_bucket)
        args = (hosts, Store.of_bucket(bucket), str(tmp_path / "shared"))
        seen = run_ranks(save_on_hosts, WORLD_SIZE, *args, timeout_s=150)
        assert [name for name, *_ in seen] == ["host-a", "host-a", "host-b", "host-b"]
        assert len({boot_id for _, boot_id, *_ in seen}) == 2
        assert [errors for _, _, errors, _ in seen] == [[None, None]] * WORLD_SIZE
        prefix = "run/step-1/"
        on_store = {
            key[len(prefix) :]: hosts[0].call(lambda key=key: bucket.content(key))
            for key in hosts[0].call(bucket.keys)
        }
        assert hosts[0].call(bucket.open_uploads) == []
    assert "all ranks send parts of each file" in seen[0][3]
    assert "strategy exchange" in seen[0][3]
    for found in (on_store, files_below(tmp_path / "shared" / "step-1")):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {".metadata", "dcp-hf.json"}:
            assert found[name] == expected[name], name
    report = verify(tmp_path / "shared" / "step-1")
    assert report.ok, str(report)


def fail_before_the_meeting(
    rank: int, world_size: int, hosts: tuple[Host, Host], root: Path
) -> str | None:
    move(rank, world_size, hosts)
    with Strike(rank=1, point="before rows", action="raise").installed(rank, root):
        return save_step(Store(str(root)), "step-1", 1)


@pytest.mark.timeout(120)
def test_rank_that_fails_before_its_host_meets_is_the_one_that_is_named(tmp_path: Path) -> None:
    """The ranks of the other host do not take part in the meeting: they are not lost."""
    reason = why_no_hosts(tmp_path)
    if reason is not None:
        pytest.skip(reason)
    root = tmp_path / "run"
    root.mkdir()
    with two_hosts(tmp_path) as hosts:
        errors = run_ranks(fail_before_the_meeting, WORLD_SIZE, hosts, root, timeout_s=90)
    assert hits(root) == ["1 raise before rows"]
    for error in errors:
        assert error is not None
        assert "injected at before rows" in error or "rank 1 (host-a" in error
        assert "RankLostError" not in error
        assert "host-b" not in error
    assert not (root / "step-1").exists()
