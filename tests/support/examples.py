"""The scripts of `examples/`, run in ranks that have joined their group already."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Mapping

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_script(  # noqa: PLR0917 - the arguments of a rank have no names
    rank: int,
    world_size: int,
    name: str,
    directory: Path,
    arguments: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    changed: Mapping[str, str] | None = None,
) -> list[str]:
    """Run a script as `torchrun` would, and return what this rank prints.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
        name: Name of the script.
        directory: Working directory of the script.
        arguments: Its arguments.
        environment: Environment variables that it gets.
        changed: Parts of its text, and what stands there instead.
    """
    os.environ.update(environment or {})
    os.chdir(directory)
    sys.argv = [name, *arguments]
    # The group is there; it is left to the code that made it.
    dist.init_process_group = lambda *_, **__: None  # type: ignore[assignment]
    dist.destroy_process_group = lambda *_: None
    printed: list[str] = []
    log = directory / f"{name}-{rank}.txt"
    with open(log, "a", encoding="utf-8", buffering=1) as file:

        def write(*words: object, **_: Any) -> None:
            printed.append(" ".join(map(str, words)))
            file.write(printed[-1] + "\n")  # outlives a kill

        names = {"__name__": "__main__", "print": write}
        code = (EXAMPLES / name).read_text()
        for old, new in (changed or {}).items():
            assert old in code
            code = code.replace(old, new)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, name, "exec"), names)  # noqa: S102 - the point
    return printed
