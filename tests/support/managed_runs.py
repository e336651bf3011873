"""Short runs under a `CheckpointManager`, one function per rank, and what they saw."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcp_hf_writer import CheckpointManager, WriteSlots
from support.faults import TIMEOUT_S
from support.named_bytes import EXPORT, sharded_state
from support.rank_process import Raised

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from support.faults import Fault


@dataclass
class Seen:
    """What one rank saw of a run."""

    saved: list[int] = field(default_factory=list)
    """Steps that its `on_saved` was told of."""
    exported: list[int] = field(default_factory=list)
    """Steps that its `on_exported` was told of."""
    raised: dict[int, Raised] = field(default_factory=dict)
    """Errors that `step` raised, by the step that was reported; -1 for `close`."""
    attempts: dict[int, int] = field(default_factory=dict)
    """Number of tries of each committed step."""
    steps: list[int] = field(default_factory=list)
    """`steps()` at the end."""
    latest: int | None = None
    """`latest()` at the end."""
    values: dict[str, Any] = field(default_factory=dict)
    """What a test adds."""

    def errors(self) -> dict[int, type[BaseException]]:
        """Return the kinds of the errors."""
        return {step: type(one.error) for step, one in self.raised.items()}


@contextmanager
def managed(root: Path, seen: Seen, **options: Any) -> Iterator[CheckpointManager]:
    """Make a manager whose callbacks fill `seen`; it is closed at the end, errors go to `seen`."""

    def on_saved(step: int, path: str, report: Any) -> None:
        assert Path(path).is_dir()
        seen.saved.append(step)
        seen.attempts[step] = report.attempts

    def on_exported(step: int, path: str, report: Any) -> None:
        assert any(Path(path).glob("*.safetensors"))
        seen.exported.append(step)

    given = {
        "export": EXPORT,
        "timeout_s": TIMEOUT_S,
        "slots": WriteSlots(2, directory=f"{root}.slots"),
        "on_saved": on_saved,
        "on_exported": on_exported,
    }
    manager = CheckpointManager(root, **{**given, **options})
    yield manager
    try:
        manager.wait()
        seen.steps, seen.latest = manager.steps(), manager.latest()
        manager.close()
    except Exception as error:  # noqa: BLE001 - the test looks at it
        seen.raised[-1] = Raised.of(error)
        seen.steps, seen.latest = manager.steps(), manager.latest()


def state_at(step: int) -> dict[str, Any]:
    """Return the state dict of a step; its tensors can name no more than six saves."""
    return sharded_state((step - 1) % 6 + 1)


def report_steps(manager: CheckpointManager, seen: Seen, steps: Sequence[int]) -> None:
    """Report steps whose state dicts name them; each waits for its save, and keeps its error."""
    for step in steps:
        try:
            manager.step(step, lambda: state_at(step), metrics={"loss": 1 / step})  # noqa: B023
            manager.wait()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            seen.raised[step] = Raised.of(error)


def run_with_faults(  # noqa: PLR0917 - the arguments of a rank have no names
    rank: int,
    world_size: int,
    root: Path,
    steps: Sequence[int],
    faults: Mapping[int, Fault],
    options: Mapping[str, Any],
) -> Seen:
    """Run steps on a rank; the faults strike during the save of their step."""
    del world_size
    os.chdir("/")
    seen = Seen()
    with managed(root, seen, **options) as manager:
        for step in steps:
            with ExitStack() as stack:
                if step in faults:
                    stack.enter_context(faults[step].installed(rank, root))
                report_steps(manager, seen, [step])
    return seen
