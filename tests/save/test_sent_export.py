"""A checkpointer process gets the content of an export once, and plans a layout once."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
from multiprocessing import get_context
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import SaveAbortedError
from dcp_hf_writer.save import export_assets, sent_export
from dcp_hf_writer.save.export_assets import assets_of
from support.ranks import run_ranks
from support.small_states import difference, state_of

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

TOKENIZER = bytes(2 << 20)
MOST_SENT_NBYTES = 8 << 10
LIMIT_S = 90.0


def large_export() -> HFExport:
    """Return an export with megabytes of specs and assets."""
    specs = [LoadSpec(f"layers.{n}.w", f"model.layers.{n}.weight", (8, 8)) for n in range(2000)]
    return HFExport(specs=specs, assets={"tokenizer.json": TOKENIZER})


def descriptors() -> int:
    """Number of open memory files of exports; threads of other tests may still close files."""
    gc.collect()
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += "dcp-hf-export" in os.readlink(f"/proc/self/fd/{fd}")
    return found


def test_writer_is_sent_without_its_export_when_it_goes_to_a_process(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "a", export=large_export())
    assert writer.export is not None
    assets_of(writer.export)
    assert len(pickle.dumps(writer)) > len(TOKENIZER)
    sent = ForkingPickler.dumps(writer)
    assert len(sent) < MOST_SENT_NBYTES
    found = pickle.loads(sent)
    assert found.export.fingerprint == writer.export.fingerprint
    known = export_assets.known(found.export)
    assert known is not None
    assert known.files == {"tokenizer.json": TOKENIZER}


def test_export_survives_an_ordinary_pickle(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "a", export=large_export())
    found = pickle.loads(pickle.dumps(writer))
    assert writer.export is not None
    assert found.export.fingerprint == writer.export.fingerprint
    assert found.export.assets == writer.export.assets
    without = pickle.loads(pickle.dumps(HFDualWriter(tmp_path / "a", export=None)))
    assert without.export is None


def test_export_is_sent_anew_when_its_assets_were_read_meanwhile(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "a", export=large_export())
    assert writer.export is not None
    before = pickle.loads(ForkingPickler.dumps(writer)).export
    assert export_assets.known(before) is None
    assets_of(writer.export)
    after = pickle.loads(ForkingPickler.dumps(writer)).export
    assert export_assets.known(after) is not None
    assert after is not before


def test_memory_of_an_export_is_freed_with_it(tmp_path: Path) -> None:
    pickle.loads(ForkingPickler.dumps(HFDualWriter(tmp_path / "a", export=large_export())))
    before = descriptors()
    for number in range(5):
        export = HFExport(max_shard_size=1000 + number)
        for _ in range(3):
            writer = HFDualWriter(tmp_path / "a", export=export)
            pickle.loads(ForkingPickler.dumps(writer))
        assert descriptors() > before
        del writer, export
    assert descriptors() == before


def receive(pipe: Connection) -> None:
    """Unpickle what comes; answer how often the content of an export was read."""
    reads = []
    read = sent_export._read

    def counted(*args: Any) -> Any:
        reads.append(args)
        return read(*args)

    sent_export._read = counted
    while True:
        try:
            writer = pipe.recv()
        except EOFError:
            return
        pipe.send((writer.export.fingerprint, len(reads)))


def test_each_process_reads_the_content_of_an_export_once(tmp_path: Path) -> None:
    context, exports = get_context("spawn"), [large_export(), HFExport(max_shard_size=1000)]
    for _ in range(2):
        here, there = context.Pipe()
        child = context.Process(target=receive, args=(there,))
        child.start()
        there.close()
        with here:
            found = []
            for export in (*exports, *exports):
                here.send(HFDualWriter(tmp_path / "a", export=export))
                found.append(here.recv())
        child.join(LIMIT_S)
        assert child.exitcode == 0
        first, second = (export.fingerprint for export in exports)
        assert found == [(first, 1), (second, 2), (first, 2), (second, 2)]


def test_export_that_was_damaged_on_its_way_is_refused() -> None:
    sent = sent_export.SentExport(HFExport(), None)
    fd, nbytes, digest = sent.in_memory()
    other = digest.translate(str.maketrans("0123456789", "1234567890"))
    with pytest.raises(SaveAbortedError, match=r"the export that was sent .* is damaged"):
        sent_export._received(other, nbytes, DupFd(fd))


class TellingWriter(HFDualWriter):
    """Tells in a file what the checkpointer process planned, and with which export object."""

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        found = super().prepare_global_plan(plans)
        with open(os.path.join(os.path.dirname(self.path), "planned.txt"), "a") as file:
            kinds = sorted({type(plan.storage_data).__name__ for plan in found})
            file.write(f"{kinds} {id(self.export)}\n")
        return found


def save_by_process(rank: int, world_size: int, root: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    export = HFExport()
    for step in (1, 2, 3):
        future = dcp.async_save(
            state_of(step, mesh),
            storage_writer=TellingWriter(root / f"step-{step}", export=export),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        future.result(LIMIT_S)


def test_checkpointer_process_plans_once_when_the_layout_stays(tmp_path: Path) -> None:
    run_ranks(save_by_process, 2, tmp_path)
    told = [line.rsplit(maxsplit=1) for line in (tmp_path / "planned.txt").read_text().splitlines()]
    assert [kinds for kinds, _ in told] == ["['RankPlan']", "['KeptPart']", "['KeptPart']"]
    assert len({export for _, export in told}) == 1
    assert [difference(tmp_path / f"step-{step}", step) for step in (1, 2, 3)] == [None] * 3
