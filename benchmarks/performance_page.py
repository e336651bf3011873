"""Measure what `docs/performance.md` shows, and write its tables and pictures.

    python benchmarks/performance_page.py --work results

Each part is one benchmark in processes of its own. Its output is kept in the directory of `--work`,
so a second call measures only what is missing there; remove a file to measure it again. The tables
go between the marks of the page, `figures: NAME`, with the command that printed each. The whole run
takes about ten minutes on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import overhead
import scaling
from plot_phases import PHASES, Bar, draw_phases

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
TIMEOUT_S = 400
NOT_MEASURED = (
    "`python benchmarks/performance_page.py --work results` measures this table"
    " and writes it here.\n"
)
RANKS = (1, 2, 4)
CONTENDERS = "ours,torch,torch_id,torch_cached,floor"
_XFS_GIB = 8
"""Size of the sparse file that holds the XFS file system."""


@dataclass(frozen=True, slots=True)
class Part:
    """One run of a benchmark."""

    name: str
    """Name of its output in the directory of `--work`."""
    script: str
    options: tuple[str, ...]
    place: str = "tmpfs"
    """File system to save to: `tmpfs`, `xfs` for a file mounted by loop, or `disk`."""
    is_drawn: bool = False
    """Whether the script draws a picture."""

    def command(self) -> str:
        """Return the command as the page shows it."""
        root = {"tmpfs": "--root /dev/shm", "xfs": "--root MOUNT", "disk": ""}[self.place]
        words = f"python benchmarks/{self.script} {shlex.join(self.options)} {root}"
        return " ".join(words.split())


def save_part(place: str, ranks: int, gib: float, rounds: int) -> Part:
    """Return the run of `save.py` on one file system with some ranks."""
    options = f"--gib {gib} --ranks {ranks} --rounds {rounds} --soak 0 --only {CONTENDERS}"
    return Part(f"save-{place}-{ranks}", "save.py", tuple(options.split()), place)


def parts(*, is_small: bool) -> list[Part]:
    """Return all runs; the small ones only show that everything works."""
    gib, rounds = (0.05, 1) if is_small else (0.5, 3)
    busy = "--rounds 1 --steps 4 --gib 0.05" if is_small else "--rounds 3"
    on_disk = busy if is_small else "--rounds 2"
    growth = "--rounds 1 --only ranks" if is_small else "--rounds 2"
    saves = [
        save_part(place, ranks, gib, rounds)
        for place in ("tmpfs", "disk", "xfs")
        for ranks in RANKS
    ]
    return [
        *saves,
        Part("overhead-tmpfs", "overhead.py", tuple(busy.split()), "tmpfs", is_drawn=True),
        Part("overhead-disk", "overhead.py", tuple(on_disk.split()), "disk"),
        Part("scaling", "scaling.py", tuple(growth.split()), "tmpfs", is_drawn=True),
    ]


def measure(part: Part, work: Path) -> None:
    """Run a part, unless its output is there; keep what it prints beside the output.

    The output gets its name when it is complete, so that a run that was cut off is measured again.
    """
    done = work / f"{part.name}.json"
    if done.exists():
        print(f"{part.name}: is there", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory(prefix="page-") as directory, root_of(part.place) as root:
        if root is None:
            return
        output, picture = Path(directory) / "output.json", Path(directory) / "picture.png"
        words = [sys.executable, str(HERE / part.script), *part.options, "--json", str(output)]
        words += ["--plot", str(picture)] if part.is_drawn else []
        print(f"{part.name}: {part.command()}", file=sys.stderr)
        with (work / f"{part.name}.txt").open("w") as printed:
            subprocess.run(
                root.command([*words, "--root", root.path]),
                check=True,
                timeout=TIMEOUT_S,
                stdout=printed,
            )
        if part.is_drawn:
            shutil.move(picture, work / f"{part.name}.png")
        shutil.move(output, done)


@dataclass(frozen=True, slots=True)
class Root:
    """A directory to save to, and what a command needs to see it."""

    path: str
    image: str | None = None
    """File with the file system; mounted for the command alone."""

    def command(self, words: list[str]) -> list[str]:
        """Return the command with what mounts the directory before it."""
        if self.image is None:
            return words
        mount = shlex.join(["mount", "-o", "loop", self.image, self.path])
        return ["unshare", "-m", "sh", "-c", f"{mount} && exec {shlex.join(words)}"]


@contextlib.contextmanager
def root_of(place: str) -> Iterator[Root | None]:
    """Make a place to save to; `None`, and a line that says why, if that is not possible here."""
    if place == "tmpfs":
        yield Root("/dev/shm")  # noqa: S108 - a directory with a random name is made in it
        return
    with tempfile.TemporaryDirectory(prefix="page-root-") as directory:
        if place == "disk":
            yield Root(directory)
            return
        image, mount = os.path.join(directory, "image"), os.path.join(directory, "mount")
        os.mkdir(mount)
        problem = make_xfs(image)
        if problem is not None:
            print(f"no XFS: {problem}", file=sys.stderr)
        yield Root(mount, image) if problem is None else None


def make_xfs(image: str) -> str | None:
    """Make a sparse file with an XFS file system; return why that cannot be mounted here."""
    mkfs = shutil.which("mkfs.xfs")
    if mkfs is None:
        return "mkfs.xfs is not installed"
    with open(image, "wb") as file:
        file.truncate(_XFS_GIB << 30)
    made = subprocess.run(
        [mkfs, "-q", "-m", "reflink=1", image], check=False, capture_output=True, text=True
    )
    if made.returncode:
        return made.stderr.strip()
    tried = subprocess.run(
        Root(os.path.join(os.path.dirname(image), "mount"), image).command(["true"]),
        check=False,
        capture_output=True,
        text=True,
    )
    return tried.stderr.strip() if tried.returncode else None


def load_results(work: Path, all_parts: list[Part]) -> dict[str, Any]:
    """Return the outputs that are there, by the name of their part."""
    return {
        part.name: json.loads((work / f"{part.name}.json").read_text())
        for part in all_parts
        if (work / f"{part.name}.json").exists()
    }


def said(facts: dict[str, Any], command: str) -> str:
    """Return the line that says where and how figures were measured."""
    return f"`{command}` on {facts['machine']}, load average {facts['load']:.1f}.\n"


def saves_block(results: dict[str, Any], all_parts: list[Part]) -> str:
    """Return the tables of stall, total and phases, for each file system and number of ranks."""
    ran = [part for part in all_parts if part.script == "save.py" and part.name in results]
    totals = [["file system", "ranks", "HFDualWriter, stall s", "HFDualWriter, total s"]]
    totals[0] += ["torch FileSystemWriter", "torch by path", "torch, staging kept", "floor"]
    phases = [["file system", "ranks", *PHASES.values(), "rest", "total"]]
    for part in ran:
        facts = results[part.name]
        contenders = facts["contenders"]
        where = [facts["file_system"], str(facts["ranks"])]
        ours = contenders["ours"]
        row = [*where, seconds(ours["stall_s_median"]), seconds(ours["total_s_median"])]
        row += [seconds(contenders[n]["total_s_median"]) for n in CONTENDERS.split(",")[1:]]
        totals.append(row)
        bar = bar_of(facts)
        shown = [seconds(bar.seconds[name]) for name in PHASES]
        phases.append([*where, *shown, seconds(bar.rest_s), seconds(bar.total_s)])
    if not ran:
        return NOT_MEASURED
    facts = results[ran[0].name]
    same = [re.sub(r"--ranks \d+", "--ranks N", part.command()) for part in ran]
    commands = "\n".join(f"    {command}" for command in dict.fromkeys(same))
    load = max(results[part.name]["load"] for part in ran)
    machine = without_place(facts["machine"])
    notes = f"{machine}, load average at most {load:.1f}. The commands:\n\n{commands}\n"
    return (
        f"{table(totals)}\n{table(phases)}\n![where the time of a save goes](phases.png)\n\n{notes}"
    )


def without_place(machine: str) -> str:
    """Return what `describe_machine` says, without the file system."""
    return "; ".join(part for part in machine.split("; ") if not part.endswith(" free)"))


def bar_of(facts: dict[str, Any]) -> Bar:
    """Return the medians of the phases of `HFDualWriter` in one run."""
    ours = facts["contenders"]["ours"]
    found = {name: statistics.median(p.get(name, 0.0) for p in ours["phases"]) for name in PHASES}
    label = f"{facts['file_system']}, {facts['ranks']} ranks"
    return Bar(label.replace("1 ranks", "1 rank"), found, ours["total_s_median"])


def overhead_block(results: dict[str, Any], all_parts: list[Part]) -> str:
    """Return the tables of steps beside saves."""
    shown = []
    for part in all_parts:
        if part.script == "overhead.py" and part.name in results:
            facts = results[part.name]
            found = overhead.from_json(facts)
            shown.append(f"{said(facts, part.command())}\n{table(overhead.rows(found))}")
    picture = "![training steps beside saves](overhead.png)\n"
    return "\n".join([*shown, picture]) if shown else NOT_MEASURED


def scaling_block(results: dict[str, Any], all_parts: list[Part]) -> str:
    """Return the table of curves."""
    if "scaling" not in results:
        return NOT_MEASURED
    (part,) = (part for part in all_parts if part.name == "scaling")
    facts = results["scaling"]
    curves, found = scaling.from_json(facts)
    picture = "![how a save grows](scaling.png)\n"
    return f"{said(facts, part.command())}\n{table(scaling.rows(curves, found))}\n{picture}"


def seconds(value: float) -> str:
    """Return seconds for a table."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def table(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table; the first one is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def write_block(page: str, name: str, block: str) -> str:
    """Return the page with a new block between its marks.

    Raises:
        ValueError: If the page lacks the marks.
    """
    begin, end = f"<!-- figures: {name} -->", "<!-- figures: end -->"
    pattern = re.compile(re.escape(begin) + r"\n.*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(page)) != 1:
        msg = f"{PAGE.name} needs the lines {begin} and {end}, once"
        raise ValueError(msg)
    return pattern.sub(lambda _: f"{begin}\n\n{block}\n{end}", page)


def write_page(work: Path, all_parts: list[Part]) -> None:
    """Write the tables into the page, and copy the pictures beside it."""
    results = load_results(work, all_parts)
    page = PAGE.read_text()
    page = write_block(page, "saves", saves_block(results, all_parts))
    page = write_block(page, "overhead", overhead_block(results, all_parts))
    page = write_block(page, "scaling", scaling_block(results, all_parts))
    PAGE.write_text(page)
    bars = [bar_of(facts) for name, facts in results.items() if name.startswith("save-")]
    if bars:
        machine = next(f["machine"] for n, f in results.items() if n.startswith("save-"))
        draw_phases(bars, without_place(machine), str(PAGE.parent / "phases.png"))
    for name, picture in (("overhead-tmpfs", "overhead.png"), ("scaling", "scaling.png")):
        if (work / f"{name}.png").exists():
            shutil.copyfile(work / f"{name}.png", PAGE.parent / picture)


def main() -> int:
    """Measure what is missing, then write the page; the exit status says if something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="directory that keeps the output of each part")
    add("--small", action="store_true", help="tiny runs, to see that everything works")
    add("--only", default="", help="measure only parts whose name begins so")
    add("--no-page", action="store_true", help="measure, but leave the page as it is")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    all_parts = parts(is_small=args.small)
    failed = []
    for part in all_parts:
        if not part.name.startswith(args.only):
            continue
        try:
            measure(part, args.work)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            # The other parts go on: what they measure is kept.
            print(f"{part.name}: {error}", file=sys.stderr)
            failed.append(part.name)
    if not args.no_page:
        write_page(args.work, all_parts)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
