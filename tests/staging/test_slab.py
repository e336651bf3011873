"""The slab: one memory file a process, whatever is put into it."""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING

import pytest
import torch

from dcp_hf_writer.errors import StagingBusyError, StagingError
from dcp_hf_writer.staging import slab as slab_module
from dcp_hf_writer.staging.slab import ALIGN_NBYTES, SLABS, Handover, Slab, SlabPool, StagedInfo
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dcp_hf_writer.staging.slab import Lease


def memory_files() -> list[str]:
    """Return what this process has open of slabs."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor that listed the directory
            continue
        if "memfd:dcp-hf" in target:
            found.append(target)
    return found


def acquire(pool: SlabPool, nbytes: int, *, within_s: float = 5) -> Lease:
    deadline = time.monotonic() + within_s
    return pool.acquire(nbytes, what="step", deadline=deadline, before_growth=lambda: None)[0]


@pytest.fixture
def pool() -> Iterator[SlabPool]:
    before = memory_files()
    pool = SlabPool()
    yield pool
    # pytest keeps the pool itself.
    pool._slab = pool._lease = None
    gc.collect()
    assert memory_files() == before


# Tensors


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16, torch.complex64])
def test_storage_of_a_tensor_is_exactly_its_own(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    slab = Slab(1 << 16)
    first = slab.tensor(ALIGN_NBYTES, dtype, shape)
    assert (first.dtype, tuple(first.shape), first.is_contiguous()) == (dtype, shape, True)
    assert first.untyped_storage().nbytes() == first.nbytes
    assert first.storage_offset() == 0
    assert first.data_ptr() % ALIGN_NBYTES == 0


def test_tensors_share_the_memory_of_the_slab() -> None:
    slab = Slab(1 << 16)
    slab.tensor(64, torch.int64, (2,)).copy_(torch.tensor([5, 7]))
    assert slab.tensor(72, torch.int64, ()).item() == 7


@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_tensor_without_elements_needs_no_memory(shape: tuple[int, ...]) -> None:
    assert tuple(Slab(4096).tensor(4096, torch.float32, shape).shape) == shape


def test_pages_are_there_before_the_first_copy() -> None:
    nbytes = 64 << 20
    before = resident()
    slab = Slab(nbytes)
    assert resident() - before > nbytes * 0.9
    del slab
    gc.collect()
    assert resident() - before < nbytes * 0.1


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_memory_that_cannot_be_had_is_an_error_of_staging() -> None:
    before = memory_files()
    with pytest.raises(StagingError, match=f"expected {1 << 62} bytes free"):
        Slab(1 << 62)
    gc.collect()
    assert memory_files() == before


# Leases


def test_slab_is_reused_when_it_is_large_enough(pool: SlabPool) -> None:
    ids = []
    for nbytes in (10_000, 10_000, 5000, 1, 0, 10_100):
        lease = acquire(pool, nbytes)
        ids.append(lease.slab.slab_id)
        lease.release()
    assert len(set(ids)) == 1
    assert len({name for name in memory_files() if ids[0][:8] in name}) == 1


def test_slab_grows_with_some_headroom_when_it_is_too_small(pool: SlabPool) -> None:
    grown = []
    for nbytes in (64 << 10, 1 << 20, (1 << 20) + (1 << 14), 2 << 20):
        called: list[None] = []
        lease, _ = pool.acquire(
            nbytes,
            what="step",
            deadline=time.monotonic() + 5,
            before_growth=lambda called=called: called.append(None),  # type: ignore[misc]
        )
        grown.append((len(called), lease.slab.nbytes))
        lease.release()
    assert [count for count, _ in grown] == [1, 1, 0, 1]
    assert grown[1][1] == grown[2][1] == (1 << 20) + (1 << 14)


def test_old_memory_is_gone_before_the_new_one_is_taken(
    pool: SlabPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = acquire(pool, 1 << 20)
    lease.release()
    del lease
    open_then: list[int] = []
    real = slab_module.Slab

    def counted(nbytes: int) -> Slab:
        gc.collect()
        open_then.append(len(memory_files()))
        return real(nbytes)

    before = len(memory_files())
    monkeypatch.setattr(slab_module, "Slab", counted)
    acquire(pool, 2 << 20).release()
    assert open_then[0] < before


def test_save_waits_for_the_one_that_holds_the_slab(pool: SlabPool) -> None:
    first = acquire(pool, 100)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(
            pool.acquire,
            100,
            what="next",
            deadline=time.monotonic() + 60,
            before_growth=lambda: None,
        )
        with pytest.raises(FutureTimeoutError):
            waiting.result(0.2)
        first.release()
        second, waited_s = waiting.result(60)
    assert waited_s > 0
    assert second.slab is first.slab
    second.release()


def test_save_that_waits_too_long_is_told_for_whom(pool: SlabPool) -> None:
    first = acquire(pool, 100)
    with pytest.raises(StagingBusyError, match="in use by the save of step"):
        acquire(pool, 100, within_s=0.05)
    first.release()
    acquire(pool, 100).release()


def test_lease_ends_with_the_thread_that_runs_the_save(pool: SlabPool) -> None:
    lease, taken, done = acquire(pool, 100), threading.Event(), threading.Event()

    def save() -> None:
        lease.take_up()
        taken.set()
        done.wait()

    thread = threading.Thread(target=save)
    thread.start()
    assert taken.wait(5)
    assert lease.is_active
    done.set()
    thread.join()
    assert not lease.is_active
    acquire(pool, 100).release()


class Dropped:
    """Stands for a staged state dict."""


def test_lease_ends_when_what_was_staged_is_dropped_before_a_thread_took_it(
    pool: SlabPool,
) -> None:
    lease, staged = acquire(pool, 100), Dropped()
    lease.tie_to(staged)
    assert lease.is_active
    del staged
    gc.collect()
    assert not lease.is_active


def test_lease_outlives_what_was_staged_while_a_thread_works(pool: SlabPool) -> None:
    lease, staged = acquire(pool, 100), Dropped()
    lease.tie_to(staged)
    lease.take_up()
    del staged
    gc.collect()
    assert lease.is_active
    lease.release()


def test_lease_that_was_given_back_or_taken_up_is_refused_to_another_save(pool: SlabPool) -> None:
    lease = acquire(pool, 100)
    assert lease.is_pending
    lease.take_up()
    assert not lease.is_pending
    with pytest.raises(StagingError, match="released or already saved"):
        lease.take_up()
    lease.release()
    again = acquire(pool, 100)
    again.release()
    with pytest.raises(StagingError, match="released or already saved"):
        again.take_up()


def test_memory_in_the_slab_belongs_to_the_latest_lease(pool: SlabPool) -> None:
    lease, foreign = acquire(pool, 100), torch.zeros(3).data_ptr()
    inside = lease.slab.tensor(64, torch.uint8, (1,)).data_ptr()
    with pytest.raises(StagingError, match="released or already saved"):
        pool.handover_over([foreign, inside])
    lease.handover = Handover(7.0, StagedInfo(0, 0.0, 0.0), 0.0)
    assert pool.handover_over([foreign, inside]) == (lease.handover, lease)
    assert pool.handover_over([foreign]) == (None, None)
    assert pool.handover_over([]) == (None, None)
    lease.release()


def test_caller_that_waits_behind_another_keeps_its_own_deadline(pool: SlabPool) -> None:
    first = acquire(pool, 100)
    second: list[Lease] = []
    waiting = threading.Thread(target=lambda: second.append(acquire(pool, 100, within_s=30)))
    waiting.start()
    wait_until(lambda: len(pool._waiting) == 1)
    began = time.monotonic()
    with pytest.raises(StagingBusyError):
        acquire(pool, 100, within_s=0.05)
    assert time.monotonic() - began < 10
    first.release()
    waiting.join(30)
    assert second[0].is_active
    second[0].release()


def test_callers_get_their_turns_in_the_order_of_their_calls(pool: SlabPool) -> None:
    first = acquire(pool, 100)
    order: list[int] = []

    def take(number: int) -> None:
        lease = acquire(pool, 100, within_s=30)
        order.append(number)
        lease.release()

    threads = []
    for number in range(4):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        wait_until(lambda: len(pool._waiting) == len(threads))
    first.release()
    for thread in threads:
        thread.join(30)
    assert order == [0, 1, 2, 3]


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_release_may_come_twice(pool: SlabPool) -> None:
    lease = acquire(pool, 100)
    lease.release()
    lease.release()
    assert not lease.is_active


# Other processes


def write_in_a_child(rank: int, world_size: int) -> tuple[int, int, bool]:
    """Fork while a save holds the slab, and stage in the child; return what the slab holds."""
    pool = SlabPool()
    lease = acquire(pool, 4096)
    kept = lease.slab.tensor(0, torch.int64, (1,))
    kept.fill_(7)
    child = os.fork()
    if not child:
        failed = 1
        try:
            own = acquire(pool, 4096, within_s=1)
            own.slab.tensor(0, torch.int64, (1,)).fill_(8)
            failed = int(own.slab.slab_id == lease.slab.slab_id)
        finally:
            os._exit(failed)
    _, status = os.waitpid(child, 0)
    is_held = lease.is_active
    lease.release()
    return int(kept.item()), status, is_held and acquire(pool, 4096).slab is lease.slab


def test_forked_child_neither_waits_for_its_parent_nor_writes_into_its_slab() -> None:
    assert run_ranks(write_in_a_child, 1) == [(7, 0, True)]


def test_slab_is_attached_once_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # What an earlier test has attached would be dropped between the two counts.
    monkeypatch.setattr(SLABS, "_attached", None)
    gc.collect()
    slab = Slab(4096)
    slab.tensor(0, torch.int64, (1,)).fill_(7)
    before = len(memory_files())
    # Unpickled here, where it is mapped a second time, as a checkpointer process would.
    arrived = [pickle.loads(_dumps(slab)) for _ in range(3)]
    assert arrived[0] is arrived[1] is arrived[2] is not slab
    assert arrived[0].tensor(0, torch.int64, (1,)).item() == 7
    # A descriptor of its own, and the one that Python keeps with a map.
    assert len(memory_files()) == before + 2
    other = Slab(8192)
    assert pickle.loads(_dumps(other)).nbytes == 8192
    kept = SLABS._attached
    assert kept is not None
    assert kept.slab_id == other.slab_id


def _dumps(slab: Slab) -> bytes:
    from multiprocessing.reduction import ForkingPickler

    return bytes(ForkingPickler.dumps(slab))
