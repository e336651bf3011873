"""Train a small model on two ranks, save while it trains, prove what was saved.

    python benchmarks/demo.py [--keep DIR]

Everything is real: a model that people use, text, AdamW, FSDP2, and saves that run beside training.
The exit status is 0 only if every proof passed.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proofs import Proof
    from training import Job

RANKS = 2
PROOF_RANKS = (1, 3)
STEPS, SAVE_EVERY = 22, 2
_DEADLINE_S = 600.0
_PLAIN_LINE_EVERY_S = 5.0
_NAMES = {"ours": "HFDualWriter", "torch": "torch async_save"}
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> int:
    """Run the demo; 0 if every proof passed, 1 if one failed, 2 if it could not run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", metavar="DIR", help="write into DIR and leave it there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.update(_QUIET)
    console = Console(highlight=False)
    if options.keep:
        os.makedirs(options.keep, exist_ok=True)
        if os.listdir(options.keep):
            parser.error(f"--keep: {options.keep} is not empty")
        return _run(console, os.path.abspath(options.keep), kept=True)
    with tempfile.TemporaryDirectory(prefix="dcp-hf-demo-", ignore_cleanup_errors=True) as root:
        return _run(console, root, kept=False)


def _run(console: Console, root: str, *, kept: bool) -> int:
    _announce(console)
    # Loading torch takes seconds, so the header comes first.
    from ranks import RanksFailedError  # noqa: PLC0415
    from training import Job, MissingInputError, find_base_model, sentence_pairs  # noqa: PLC0415

    start = time.monotonic()
    try:
        base = find_base_model()
        job = Job(base, root, sentence_pairs(240), STEPS, SAVE_EVERY)
        with _Line(console) as line:
            saves = _train(job, line)
            last = next(s for s in reversed(saves[0]) if s["writer"] == "ours")["path"]
            proofs = _prove(last, root, line)
    except MissingInputError as error:
        console.print(f"[red]✗[/] {error}")
        return 2
    except RanksFailedError as error:
        console.print(f"[red]✗[/] {error}", markup=False)
        return 2
    console.print(_table(saves))
    for proof in proofs:
        mark = "[bold green]✓[/]" if proof.passed else "[bold red]✗[/]"
        console.print(f" {mark} {proof.subject}: {proof.finding}", soft_wrap=True)
    console.print()
    console.print(_tree(last, root))
    passed = all(proof.passed for proof in proofs)
    verdict = "[bold green]All proofs passed[/]" if passed else "[bold red]A proof failed[/]"
    where = f"kept in {root}" if kept else "nothing is left behind; add -- --keep DIR to keep it"
    took = f"the whole demo took {time.monotonic() - start:.0f} s"
    console.print(f"\n{verdict}; {took}; {where}.")
    return 0 if passed else 1


def _announce(console: Console) -> None:
    console.print(
        "[bold]One save, two formats, while training goes on[/]\n"
        f"all-MiniLM-L6-v2 trains with FSDP2 and AdamW on {RANKS} ranks. Every {SAVE_EVERY} steps "
        "it is saved in the background: by HFDualWriter (DCP + HuggingFace) and by torch (DCP "
        "only) in turns. Fresh processes then prove what is on disk. It takes two minutes.\n"
    )


def _train(job: Job, line: _Line) -> list[list[dict[str, Any]]]:
    from ranks import run_ranks  # noqa: PLC0415
    from training import train  # noqa: PLC0415

    line.show("starting the ranks")

    def on_event(_: int, facts: dict[str, Any]) -> None:
        saving = f"; {_NAMES[facts['saving']]} saving" if facts["saving"] else ""
        line.advance(f"step {facts['step']}/{job.steps}, loss {facts['loss']:.3f}{saving}")

    return run_ranks(
        train,
        job,
        world_size=RANKS,
        timeout_s=_DEADLINE_S,
        on_event=on_event,
        log=os.path.join(job.directory, "log.txt"),
    )


def _prove(checkpoint: str, root: str, line: _Line) -> list[Proof]:
    from proofs import resume, serve  # noqa: PLC0415
    from ranks import run_ranks  # noqa: PLC0415

    log, expected = os.path.join(root, "log.txt"), os.path.join(root, "expected")
    found: list[Proof] = []
    for world_size in PROOF_RANKS:
        line.advance(f"proof: resume on {world_size} rank{'s' * (world_size > 1)}")
        found += run_ranks(
            resume, checkpoint, expected, world_size=world_size, timeout_s=_DEADLINE_S, log=log
        )[:1]
    line.advance("proof: load by transformers, compare files")
    found += run_ranks(serve, checkpoint, expected, world_size=1, timeout_s=_DEADLINE_S, log=log)[0]
    line.advance("done")
    return found


def _table(saves: list[list[dict[str, Any]]]) -> Table:
    ours, torch = (_summary(saves, writer) for writer in ("ours", "torch"))
    counted = sum(s["writer"] == "ours" for s in saves[0]) - 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"median of {counted} saves each, after one to warm up")
    for name in _NAMES.values():
        table.add_column(name, justify="right")
    table.add_column("ours / torch", justify="right")

    def row(name: str, unit: str, key: str, scale: float = 1.0, digits: int = 2) -> None:
        mine, other = (f"{s[key] * scale:.{digits}f} {unit}" for s in (ours, torch))
        table.add_row(name, f"[bold]{mine}[/]", other, f"{ours[key] / torch[key]:.2f}x")

    table.add_row("on disk", "DCP + HuggingFace", "DCP only", "")
    row("training blocked", "ms", "stall_s", 1e3, 0)
    row("in the background", "s", "background_s")
    row("written per second", "GB/s", "gb_per_s")
    row("DCP", "MB", "dcp", 1e-6, 1)
    table.add_row("HuggingFace", f"[bold]{ours['hf'] * 1e-6:.1f} MB[/]", "-", "")
    table.add_row("[dim]phases, the slowest rank's[/]", "", "", "")
    for phase, seconds in _phases(saves[0]):
        table.add_row(f"[dim]  {phase}[/]", f"[dim]{seconds * 1e3:.0f} ms[/]", "", "")
    return table


def _summary(saves: list[list[dict[str, Any]]], writer: str) -> dict[str, float]:
    """Medians over saves of the slowest rank's time; the first save of a writer warms up."""
    of_ranks = [[s for s in rank if s["writer"] == writer][1:] for rank in saves]

    def middle(name: str) -> float:
        return statistics.median(max(s[name] for s in same) for same in zip(*of_ranks, strict=True))

    nbytes = of_ranks[0][-1]["nbytes"]
    background = middle("background_s")
    return {
        "stall_s": middle("stall_s"),
        "background_s": background,
        "gb_per_s": sum(nbytes.values()) / background / 1e9,
        **nbytes,
    }


def _phases(of_rank_0: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Median of each phase, without those that took no time."""
    phases = [s["phases"] for s in of_rank_0 if s["phases"]][1:]
    for name in dict.fromkeys(name for of_save in phases for name in of_save):
        seconds = statistics.median(of_save.get(name, 0.0) for of_save in phases)
        if seconds >= 0.0005:
            yield name, seconds


def _tree(checkpoint: str, root: str) -> Tree:
    tree = Tree(f"[bold]{os.path.relpath(checkpoint, root)}[/]", guide_style="dim")
    _grow(tree, checkpoint)
    return tree


def _grow(tree: Tree, directory: str) -> None:
    for name in _sorted(directory):
        path = os.path.join(directory, name)
        if os.path.isdir(path):
            _grow(tree.add(f"[bold]{name}/[/]"), path)
        else:
            tree.add(f"{name} [dim]{decimal(os.stat(path).st_size)}[/]")


def _sorted(directory: str) -> Iterator[str]:
    """Files before directories."""
    names = sorted(os.listdir(directory))
    return iter(sorted(names, key=lambda name: os.path.isdir(os.path.join(directory, name))))


class _Line:
    """The one line that moves: a bar on a terminal, elsewhere a plain line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()
        steps = STEPS + len(PROOF_RANKS) + 2
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps)

    def __enter__(self) -> _Line:  # noqa: PYI034 - typing.Self came with Python 3.11
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal and self._is_due():
            self._console.print(f"  {text}")

    def advance(self, text: str) -> None:
        self._progress.advance(self._task)
        self.show(text)

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last < _PLAIN_LINE_EVERY_S:
            return False
        self._last = now
        return True


if __name__ == "__main__":
    sys.exit(main())
