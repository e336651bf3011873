"""Errors: the tree that is drawn, what they print, and that they survive pickling."""

from __future__ import annotations

import errno
import inspect
import multiprocessing
import pickle
import re
from typing import TYPE_CHECKING

import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from dcp_hf_writer import errors
from dcp_hf_writer.errors import CheckpointError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

KINDS = sorted(
    (
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, CheckpointError)
    ),
    key=lambda kind: kind.__name__,
)
FACTS = {
    "rank": 3,
    "phase": "write",
    "path": "/run/step-100",
    "fqn": "model.w",
    "key": "hf.w",
    "expected": "8 bytes",
    "found": "7 bytes",
    "hint": "write one more",
    "errno": errno.ENOSPC,
}
TEXT = (
    "rank 3 write: it broke (/run/step-100, tensor 'model.w', key 'hf.w'); "
    "expected 8 bytes; found 7 bytes; write one more"
)


def made(kind: type[CheckpointError]) -> CheckpointError:
    return kind("it broke", **FACTS)  # type: ignore[arg-type]


def assert_equal(found: BaseException, expected: CheckpointError) -> None:
    assert type(found) is type(expected)
    assert vars(found) == vars(expected)
    assert (str(found), found.args) == (str(expected), expected.args)


def drawn_tree() -> dict[str, tuple[str, str | None]]:
    """Read the tree of the module's docstring: parent and builtin base of each class."""
    tree: dict[str, tuple[str, str | None]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)([A-Z]\w+Error)(?: \((\w+)\))?(?:\s|$)", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        above[depth:] = [found[2]]
        if depth:
            tree[found[2]] = (above[depth - 1], found[3])
        else:
            assert found[2] == "CheckpointError"
    return tree


def test_tree_in_the_docstring_is_that_of_the_classes() -> None:
    real = {}
    for kind in KINDS:
        ours = [base for base in kind.__bases__ if issubclass(base, CheckpointError)]
        others = [base.__name__ for base in kind.__bases__ if base not in ours]
        if kind is not CheckpointError:
            real[kind.__name__] = (ours[0].__name__, *(others or [None]))
    assert drawn_tree() == real
    assert len(real) > 15


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_says_what_it_knows(kind: type[CheckpointError]) -> None:
    error = made(kind)
    assert {name: getattr(error, name) for name in FACTS} == FACTS
    assert str(error) == TEXT


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_without_facts_says_its_problem_alone(kind: type[CheckpointError]) -> None:
    assert str(kind("it broke")) == "it broke"


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"rank": 0}, "rank 0: it broke"),
        ({"phase": "plan"}, "plan: it broke"),
        ({"fqn": ""}, "it broke (tensor '')"),
        ({"key": ""}, "it broke (key '')"),
        ({"expected": 0, "found": 0}, "it broke; expected 0; found 0"),
        ({"hint": "mend it"}, "it broke; mend it"),
    ],
)
def test_error_shows_facts_that_are_zero_or_empty(facts: dict[str, object], text: str) -> None:
    assert str(CheckpointError("it broke", **facts)) == text  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_survives_pickling(kind: type[CheckpointError], protocol: int) -> None:
    assert_equal(pickle.loads(pickle.dumps(made(kind), protocol)), made(kind))


def test_errors_survive_what_torch_sends_to_other_ranks() -> None:
    failures = {}
    for rank, kind in enumerate(KINDS):
        try:
            raise made(kind)
        except CheckpointError as error:
            failures[rank] = _wrap_exception(error)
    arrived = pickle.loads(pickle.dumps(CheckpointException("write", failures)))
    for rank, kind in enumerate(KINDS):
        assert_equal(arrived.failures[rank][0], made(kind))


def send_all(connection: Connection) -> None:
    connection.send([made(kind) for kind in KINDS])


def test_errors_survive_the_way_between_processes() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=send_all, args=(theirs,))
    process.start()
    assert ours.poll(60)
    arrived = ours.recv()
    process.join(60)
    assert process.exitcode == 0
    for found, kind in zip(arrived, KINDS, strict=True):
        assert_equal(found, made(kind))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if issubclass(kind, OSError)], ids=lambda kind: kind.__name__
)
def test_storage_errors_have_the_number_that_an_os_error_has(kind: type[OSError]) -> None:
    error = made(kind)  # type: ignore[arg-type]
    assert isinstance(error, OSError)
    assert OSError.errno.__get__(error) == errno.ENOSPC  # type: ignore[attr-defined]


def test_errors_can_be_caught_by_the_builtins_that_callers_expect() -> None:
    expected = {
        "ConfigError": ValueError,
        "LayoutError": ValueError,
        "TargetExistsError": FileExistsError,
        "WriteError": OSError,
        "SlotTimeoutError": TimeoutError,
        "RankLostError": TimeoutError,
        "ExportError": RuntimeError,
    }
    assert [n for n, base in expected.items() if not issubclass(getattr(errors, n), base)] == []
