"""The harness itself: a comparison that cannot fail, or a hang that passes, would prove nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from support.compare import INDEX_NAME, export_difference, tensor_difference
from support.rank_process import RankFailedError, RankTracebackError
from support.ranks import RankHangError, run_ranks, spawn_ranks
from support.stock_readers import load_dcp, load_hf, stock_only

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int64)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Make two equal exports."""
    directories = tmp_path / "produced", tmp_path / "reference"
    for directory in directories:
        directory.mkdir()
        save_file(TENSORS, directory / "model.safetensors", metadata={"format": "pt"})
    return directories


def test_equal_exports_do_not_differ(pair: tuple[Path, Path]) -> None:
    assert export_difference(*pair) is None


def test_difference_names_tensor_and_byte_when_one_bit_is_flipped(pair: tuple[Path, Path]) -> None:
    path = pair[0] / "model.safetensors"
    content = bytearray(path.read_bytes())
    # The last byte but one belongs to "a": the larger dtype comes first in a file.
    content[-2] ^= 1
    path.write_bytes(content)
    text = export_difference(*pair) or ""
    assert "model.safetensors" in text
    assert "tensor 'a' (F32 [2, 3]), byte 22 of its 24" in text
    assert f"first difference at byte {len(content) - 2}" in text


def test_difference_names_header_entry_when_a_shape_differs(pair: tuple[Path, Path]) -> None:
    tensors = TENSORS | {"a": TENSORS["a"].reshape(3, 2)}
    save_file(tensors, pair[0] / "model.safetensors", metadata={"format": "pt"})
    text = export_difference(*pair) or ""
    assert "header entry 2: expected ('a'" in text


def test_difference_is_seen_when_only_the_padding_of_the_header_differs(
    pair: tuple[Path, Path],
) -> None:
    path = pair[0] / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    path.write_bytes((length + 8).to_bytes(8, "little") + header + b" " * 8 + data)
    assert "header text" in (export_difference(*pair) or "")


@pytest.mark.parametrize("extra", [INDEX_NAME, "model-00001-of-00002.safetensors"])
def test_difference_names_file_when_there_is_one_too_many(
    pair: tuple[Path, Path], extra: str
) -> None:
    (pair[0] / extra).write_bytes(b"")
    assert f"unexpected ['{extra}']" in (export_difference(*pair) or "")
    assert f"missing ['{extra}']" in (export_difference(*reversed(pair)) or "")


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, -0.0])},
        {"a": torch.tensor([1.0, 0.0], dtype=torch.float64)},
        {"a": torch.tensor([[1.0, 0.0]])},
        {"b": torch.tensor([1.0, 0.0])},
        {},
    ],
    ids=["sign of zero", "dtype", "shape", "name", "none"],
)
def test_tensors_differ_when_anything_does(other: dict[str, torch.Tensor]) -> None:
    first = {"a": torch.tensor([1.0, 0.0])}
    assert tensor_difference(first, first) is None
    assert tensor_difference(first, other) is not None


def test_nan_equals_itself_when_its_bits_do() -> None:
    nan = {"a": torch.tensor([float("nan")])}
    assert tensor_difference(nan, {"a": nan["a"].clone()}) is None


def test_stock_load_shows_values_that_were_not_loaded(tmp_path: Path) -> None:
    state = {"w": torch.zeros(3), "flag": torch.tensor(data=False)}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    assert tensor_difference(load_dcp(tmp_path, state), state) is None
    with pytest.raises(BaseException, match="Missing key"):
        load_dcp(tmp_path, {**state, "absent": torch.zeros(1)})


def test_hf_load_refuses_a_key_in_two_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(AssertionError, match="repeats"):
        load_hf(tmp_path)


def test_stock_only_fails_where_the_package_is_imported() -> None:
    with pytest.raises(AssertionError, match="proves nothing"):
        run_ranks(import_package, 1)


def import_package(rank: int, world_size: int) -> None:
    import dcp_hf_writer.errors  # noqa: F401

    stock_only()


def add_ranks(rank: int, world_size: int, factor: float) -> torch.Tensor:
    total = torch.tensor(rank + 1.0)
    dist.all_reduce(total)
    return total * factor


@pytest.mark.parametrize("store", ["parent", "rank0"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_return_their_results_in_order(world_size: int, store: str) -> None:
    found = run_ranks(add_ranks, world_size, 2.0, store=store)
    assert found == [world_size * (world_size + 1.0)] * world_size


class UnpicklableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.second = second


def raise_on_one(rank: int, world_size: int, error: BaseException) -> None:
    if rank == 1:
        raise error
    dist.barrier()


def raise_unpicklable(rank: int, world_size: int) -> NoReturn:
    raise UnpicklableError("this one", "and that")


class ReadableInARankError(Exception):
    """Unpickles where `RANK` is set, which is in the ranks only."""

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild_in_a_rank, self.args


def rebuild_in_a_rank(text: str) -> ReadableInARankError:
    if "RANK" not in os.environ:
        msg = "no rank here"
        raise TypeError(msg)
    return ReadableInARankError(text)


def raise_readable_in_a_rank(rank: int, world_size: int) -> NoReturn:
    raise ReadableInARankError("the true cause")


def raise_of_the_device(rank: int, world_size: int) -> NoReturn:
    raise torch.AcceleratorError("CUDA error: invalid device ordinal", 101)


def test_error_of_a_rank_is_raised_with_rank_and_traceback() -> None:
    with pytest.raises(KeyError, match="boo") as caught:
        run_ranks(raise_on_one, 2, KeyError("boo"))
    cause = caught.value.__cause__
    assert isinstance(cause, RankTracebackError)
    assert "on rank 1" in str(cause)
    assert "in raise_on_one" in str(cause)


def test_error_is_told_as_text_when_it_does_not_pickle() -> None:
    with pytest.raises(RankFailedError, match="UnpicklableError: this one"):
        run_ranks(raise_unpicklable, 1)


def test_error_is_told_as_text_when_it_does_not_unpickle_outside_of_the_rank() -> None:
    with pytest.raises(RankFailedError, match="no rank here") as caught:
        run_ranks(raise_readable_in_a_rank, 1)
    assert "ReadableInARankError: the true cause" in str(caught.value)
    assert "in raise_readable_in_a_rank" in str(caught.value)


def test_error_of_a_device_is_told_whether_or_not_it_pickles() -> None:
    with pytest.raises((torch.AcceleratorError, RankFailedError), match="invalid device ordinal"):
        run_ranks(raise_of_the_device, 1)


def hang_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def leave_a_thread(rank: int, world_size: int) -> None:
    threading.Thread(target=threading.Event().wait).start()


def test_hang_fails_with_the_stacks_of_all_ranks() -> None:
    with pytest.raises(RankHangError) as caught:
        run_ranks(hang_on_one, 2, timeout_s=5)
    assert "in barrier" in str(caught.value)
    assert "in hang_on_one" in str(caught.value)


def test_rank_that_cannot_leave_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.ranks.EXIT_GRACE_S", 2)
    with pytest.raises(RankHangError, match="did not leave"):
        run_ranks(leave_a_thread, 1)


def wait_for_release(rank: int, world_size: int, release: Path) -> int:
    while not release.exists():
        time.sleep(0.01)
    return rank


def test_killed_rank_is_told_apart_and_the_others_go_on(tmp_path: Path) -> None:
    with spawn_ranks(wait_for_release, 3, tmp_path / "release") as handle:
        handle.kill(1)
        (tmp_path / "release").touch()
        first, second, third = handle.outcomes(30)
    assert (first.value, first.error, first.exitcode) == (0, None, 0)
    assert (third.value, third.error, third.exitcode) == (2, None, 0)
    assert isinstance(second.error, RankFailedError)
    assert second.exitcode == -signal.SIGKILL


def test_no_process_is_left_when_a_handle_is_closed_early(tmp_path: Path) -> None:
    with spawn_ranks(wait_for_release, 2, tmp_path / "never") as handle:
        pids = handle.pids
        handle.kill(0, signal.SIGSTOP)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
