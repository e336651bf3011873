"""Which strategy a save takes: by the option, the file system, and the hosts that write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.errors import IncoherentStorageError
from dcp_hf_writer.save import coordinator, owner_process
from dcp_hf_writer.save.write_strategy import WriteStrategy, cell_nbytes_for, choose_strategy
from dcp_hf_writer.storage.posix_outputs import COHERENT
from support.log_lines import log_lines
from support.ranks import run_ranks
from support.small_states import dcp_difference, difference, state_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NOT_COHERENT = ("nfs", "nfs4", "cifs", "smb3", "fuse", "fuse.sshfs", "beegfs", "9p", "")
ONE_WRITER = ("fuse.gcsfuse", "fuse.goofys", "fuse.mountpoint-s3", "fuse.rclone", "fuse.s3fs")
MIB = 1 << 20


def choose(hosts: Sequence[str], fs_type: str, strategy: Any = "auto") -> WriteStrategy:
    return choose_strategy(
        hosts=hosts,
        fs_type=fs_type,
        strategy=strategy,
        path="/run/step-1",
        nbytes=10 * MIB,
        host_budget_bytes=256 * MIB,
    )


@pytest.mark.parametrize("fs_type", NOT_COHERENT)
def test_several_hosts_exchange_where_page_caches_may_clash(fs_type: str) -> None:
    found = choose(["a", "a", "b"], fs_type)
    assert (found.name, found.cell_nbytes) == ("exchange", 2 * MIB)
    shown = fs_type or "an unknown file system"
    assert found.why == f"{shown} is not known to keep the page caches of 2 hosts coherent"


@pytest.mark.parametrize("fs_type", [*NOT_COHERENT, *ONE_WRITER])
def test_several_hosts_write_directly_when_the_user_vouches_for_it(fs_type: str) -> None:
    assert choose(["a", "b"], fs_type, "direct").name == "direct"


@pytest.mark.parametrize("fs_type", [*NOT_COHERENT, *ONE_WRITER, *sorted(COHERENT)])
def test_ranks_of_one_host_write_directly_anywhere(fs_type: str) -> None:
    assert choose(["a"] * 8, fs_type).name == "direct"


@pytest.mark.parametrize("fs_type", sorted(COHERENT))
def test_several_hosts_write_directly_where_page_caches_are_coherent(fs_type: str) -> None:
    found = choose(["a", "b"], fs_type)
    assert found.name == "direct"
    assert found.why == f"{fs_type} keeps the page caches of 2 hosts coherent"


@pytest.mark.parametrize("fs_type", ["ext4", "nfs4", ""])
@pytest.mark.parametrize("hosts", [["a"], ["a", "b"]])
def test_exchange_can_be_asked_for(fs_type: str, hosts: list[str]) -> None:
    assert choose(hosts, fs_type, "exchange").name == "exchange"


@pytest.mark.parametrize("fs_type", ONE_WRITER)
def test_several_hosts_are_refused_where_a_file_has_one_writer(fs_type: str) -> None:
    with pytest.raises(IncoherentStorageError, match=r'strategy="direct"') as caught:
        choose(["a", "b"], fs_type)
    assert caught.value.path == "/run/step-1"
    assert caught.value.found == f"{fs_type}, written from 2 hosts"


@pytest.mark.parametrize(
    ("nbytes", "budget", "cell"),
    [
        (1, 256 * MIB, 2 * MIB),
        (128 << 30, 256 * MIB, 2 * MIB),
        (129 << 30, 256 * MIB, 4 * MIB),
        (1 << 50, 256 * MIB, 64 * MIB),
        (1, 4 * MIB, MIB),
        (1, MIB, 256 << 10),
        (1, 1, 64 << 10),
    ],
)
def test_cells_grow_with_the_export_and_fit_the_budget(nbytes: int, budget: int, cell: int) -> None:
    assert cell_nbytes_for(nbytes, budget) == cell


# Saves from two hosts


def save_from_two_hosts(rank: int, world_size: int, root: Path, fs_type: str) -> list[str]:
    """Save as if each rank were on a host of its own; return what was raised and logged."""
    lines = log_lines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner_process, "host_id", lambda: f"host {rank}")
        patch.setattr(coordinator, "file_system_type", lambda _: fs_type)
        state = state_of(1, init_device_mesh("cpu", (world_size,)))
        for name, options in {
            "auto": {},
            "direct": {"strategy": "direct"},
            "dcp": {"export": None},
        }.items():
            try:
                writer = HFDualWriter(root / f"{name}-1", **options)
                dcp.async_save(state, storage_writer=writer).result()
            except IncoherentStorageError as error:
                lines.append(f"refused: {error}")
    return [line for line in lines if line.startswith(("strategy", "refused"))]


def test_two_hosts_exchange_on_nfs_and_say_why(tmp_path: Path) -> None:
    first, second = run_ranks(save_from_two_hosts, 2, tmp_path, "nfs4")
    why = "nfs4 is not known to keep the page caches of 2 hosts coherent"
    assert first == [
        f"strategy exchange for {tmp_path}/auto-1: {why}",
        f'strategy direct for {tmp_path}/direct-1: strategy="direct" asks for it',
    ]
    assert second == []
    for name in ("auto", "direct"):
        assert difference(tmp_path / f"{name}-1", 1) is None
    assert dcp_difference(tmp_path / "dcp-1", state_of(1)) is None


def test_two_hosts_are_refused_on_every_rank_where_a_file_has_one_writer(tmp_path: Path) -> None:
    for lines in run_ranks(save_from_two_hosts, 2, tmp_path, "fuse.gcsfuse"):
        (refused,) = [line for line in lines if line.startswith("refused")]
        assert "fuse.gcsfuse, written from 2 hosts" in refused
        assert 'strategy="direct"' in refused
    assert {path.name for path in tmp_path.iterdir()} == {"direct-1", "dcp-1"}
