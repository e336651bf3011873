"""The example `fsdp2.py`: killed at random moments, it resumes to the same losses."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest

from dcp_hf_writer import verify
from dcp_hf_writer.manager.quick_check import QuickCheck, StoredFacts
from support.examples import EXAMPLES
from support.ranks import run_ranks, spawn_ranks

PAGE = Path(__file__).parents[2] / "docs" / "manager.md"
LINE = re.compile(r"rank (\d+) step (\d+) loss (\S+)")
MAX_LINES = 60


def example() -> str:
    return (EXAMPLES / "fsdp2.py").read_text()


def run_example(rank: int, world_size: int, directory: Path) -> None:
    """Run the example in a rank that has joined its group already."""
    os.chdir(directory)
    # The rank's log, which outlives a kill.
    code = example().replace("dist.init_process_group(", "str(")
    code = code.replace("dist.destroy_process_group()", "")
    with open(f"losses-{rank}.txt", "a", buffering=1) as losses:

        def write(*words: object, **_: object) -> None:
            losses.write(" ".join(map(str, words)) + "\n")

        exec(compile(code, "train.py", "exec"), {"print": write})  # noqa: S102 - the point


def losses_of(directory: Path) -> dict[tuple[int, int], set[str]]:
    """Return all losses that were ever printed for a rank and a step."""
    found: dict[tuple[int, int], set[str]] = {}
    for path in directory.glob("losses-*.txt"):
        for rank, step, loss in LINE.findall(path.read_text()):
            found.setdefault((int(rank), int(step)), set()).add(loss)
    return found


def kill_at_random(directory: Path, chance: random.Random) -> None:
    """Start the run, and kill one rank or both after a random time."""
    with spawn_ranks(run_example, 2, directory, timeout_s=100) as handle:
        time.sleep(chance.uniform(0.2, 6.0))
        victims = chance.choice(([0], [1], [0, 1]))
        for rank in victims:
            handle.kill(rank)
        # A rank whose peer is gone fails in the next collective of the training.
        if len(victims) == 1:
            time.sleep(chance.uniform(0.0, 1.0))


def check_run(root: Path) -> None:
    """Check that whatever looks committed is whole, and that the newest one verifies."""
    if not root.exists():
        return
    whole = []
    for path in sorted(root.iterdir()):
        if re.fullmatch(r"(step|snapshot)-\d+", path.name):
            facts = QuickCheck().run(str(path))
            assert isinstance(facts, StoredFacts), f"{path}: {facts}"
            whole.append((int(path.name.partition("-")[2]), path))
    if whole:
        report = verify(max(whole)[1])
        assert [p for p in report.problems if not p.file.startswith("hf/")] == []


def run_and_kill(tmp_path: Path, *, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    print(f"seed {seed}, {kills} kills")  # noqa: T201 - replays the run
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    plain.mkdir()
    killed.mkdir()
    run_ranks(run_example, 2, plain, timeout_s=100)
    for _ in range(kills):
        kill_at_random(killed, chance)
        check_run(killed / "runs" / "a")
    run_ranks(run_example, 2, killed, timeout_s=100)
    wanted = losses_of(plain)
    assert {step for _, step in wanted} == set(range(1, 31))
    assert losses_of(killed) == wanted
    names = sorted(p.name for p in (killed / "runs" / "a").iterdir())
    assert "step-30" in names
    assert not [name for name in names if name.startswith((".incomplete", ".deleted"))]


def test_example_is_short_and_stands_on_the_page_of_the_manager() -> None:
    lines = example().splitlines()
    assert len(lines) < MAX_LINES
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    # The first line names the script.
    assert found[1].splitlines()[1:] == lines[1:]


@pytest.mark.timeout(400)
def test_run_that_is_killed_resumes_to_the_same_losses(tmp_path: Path) -> None:
    run_and_kill(tmp_path, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [2, 3])
def test_run_that_is_killed_often_resumes_to_the_same_losses(tmp_path: Path, seed: int) -> None:
    run_and_kill(tmp_path, kills=20, seed=seed)
