"""Measure staging and saves on one GPU beside a bare copy and torch's own ways, all in one run.

    python benchmarks/gpu.py --out gpu-results
    python benchmarks/gpu.py --markdown gpu-results/gpu.json

Four ranks that share the GPU by gloo save a state dict; then one process stages a 1B state dict
with Adam's moments, and another one an 8B one without. Each section has processes of its own and
prints when it ends, so that a run that is cut off still shows what was measured. The exit status is
1 if a part of ours failed; that one of torch's ways fails is a result. Figures gate nothing.
`--markdown` only prints the tables of docs/performance-gpu.md from the file of an earlier run.
`--tiny --device cpu` runs all sections without a GPU, for a rehearsal.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gpu_device import SHARED_MEMORY
from gpu_markdown import as_markdown
from gpu_report import Section, render
from gpu_saves import SaveSetting, measure_saves
from gpu_staging import Setting, measure_staging
from llama import LLAMA_1B, LLAMA_8B, LLAMA_TINY
from machine import describe_machine
from ranks import run_ranks
from states import GIB, Workload

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = 4
_GRACE_S = 20.0
"""How long a section may outlast its share of the time before it is ended."""
_SPACE = 6
"""Space for the saves in weights: one checkpoint of both formats, and torch's shared copies."""

_ROOMY_NBYTES = 12 * GIB
"""Free space that saves of the default size take, with some to spare."""


@dataclass(frozen=True, slots=True)
class _Task:
    title: str
    share: float
    """Part of the whole time by which the section should be over."""
    body: Callable[..., None]
    setting: Callable[[float], Any]
    """Makes the setting from the deadline."""
    ranks: int


def main() -> int:
    """Run the sections; 1 if a part of one failed, 2 if there is no such device."""
    options = _parse_options()
    if options.markdown is not None:
        with open(options.markdown, encoding="utf-8") as file:
            print(as_markdown(json.load(file)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; rehearse with --tiny --device cpu")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    directory = tempfile.mkdtemp(prefix="dcp-hf-gpu-", dir=options.dir)
    try:
        return _run(options, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run(options: argparse.Namespace, directory: str) -> int:
    began = time.monotonic()
    machine = describe_machine(directory)
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    if options.device == "cpu":
        print("NO GPU IS MEASURED: this is a rehearsal, its figures mean nothing")
    sections: list[Section] = []
    for task in _tasks(options, directory):
        if not any(name in task.title for name in options.only.split(",")):
            continue
        sections.append(_run_section(task, began, options.seconds, directory))
        print(f"\n{render(sections[-1])}", flush=True)
        _write(options, machine, sections)
    failed = sum(len(section.errors) for section in sections)
    print(f"{time.monotonic() - began:.0f} s in all, {failed} parts failed")
    return 1 if failed or not sections else 0


def _run_section(task: _Task, began: float, seconds: float, directory: str) -> Section:
    start = time.monotonic()
    section = Section(task.title)
    deadline = began + task.share * seconds
    if deadline - start < 10:
        section.skipped["the section"] = "no time was left"
        return section
    try:
        run_ranks(
            task.body,
            task.setting(deadline),
            world_size=task.ranks,
            timeout_s=deadline - start + _GRACE_S,
            on_event=section.take,
            log=os.path.join(directory, f"{task.title.partition(' ')[0]}.log"),
        )
    except Exception:  # noqa: BLE001 - the next section does not depend on this one
        section.errors["the section"] = traceback.format_exc()
    section.seconds = time.monotonic() - start
    return section


def _tasks(options: argparse.Namespace, directory: str) -> list[_Task]:
    small, large = (LLAMA_TINY, LLAMA_TINY) if options.tiny else (LLAMA_1B, LLAMA_8B)
    device, rounds = options.device, options.rounds

    def saves(deadline: float) -> SaveSetting:
        workload = Workload(_fitting(options.save_gib, directory), "bfloat16", "fsdp", optim=False)
        return SaveSetting(workload, device, directory, rounds, deadline)

    return [
        _Task(f"saves ({RANKS} ranks sharing one device, gloo)", 0.32, measure_saves, saves, RANKS),
        _Task(
            f"staging-1B ({small.title} bf16 with Adam's fp32 moments, one process)",
            0.66,
            measure_staging,
            lambda deadline: Setting(small, True, device, rounds, deadline),  # noqa: FBT003
            1,
        ),
        _Task(
            f"staging-8B ({large.title} bf16, one process)",
            1.0,
            measure_staging,
            lambda deadline: Setting(large, False, device, rounds, deadline),  # noqa: FBT003
            1,
        ),
    ]


def _fitting(gib: float, directory: str) -> float:
    """Return the size of the saves, less where the file system has not the space for it."""
    free = shutil.disk_usage(directory).free
    if free >= _SPACE * gib * GIB:
        return gib
    less = free / _SPACE / GIB
    print(f"{directory} has {free / GIB:.1f} GiB free: saves of {less:.2f} GiB, not {gib} GiB")
    return less


def _write(options: argparse.Namespace, machine: str, sections: list[Section]) -> None:
    if options.out is None:
        return
    os.makedirs(options.out, exist_ok=True)
    facts = {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "command": _command(),
        "machine": machine,
        "torch": torch.__version__,
        "device": options.device,
        "is_tiny": options.tiny,
        "sections": [section.as_json() for section in sections],
    }
    with open(os.path.join(options.out, "gpu.json"), "w", encoding="utf-8") as file:
        json.dump(facts, file, indent=1)
        file.write("\n")


def _command() -> str:
    """Return the command as one types it in the root of the repository."""
    return shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])


def _roomy_directory() -> str:
    """Return shared memory, or the directory for temporary files where that is too small."""
    directory = SHARED_MEMORY
    if os.path.isdir(directory) and shutil.disk_usage(directory).free >= _ROOMY_NBYTES:
        return directory
    return tempfile.gettempdir()


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal [cuda]")
    add("--tiny", action="store_true", help="a few MiB instead of 1B and 8B")
    add("--out", metavar="DIR", help="write all samples to DIR/gpu.json, after each section")
    add("--dir", default=_roomy_directory(), help="for the checkpoints [%(default)s]")
    add("--seconds", type=float, default=228.0, help="time for all sections [%(default)s]")
    add("--rounds", type=int, default=5, help="most rounds of each kind [%(default)s]")
    add("--save-gib", type=float, help="weights of the saves, all ranks [2, with --tiny 0.02]")
    add("--only", default="saves,staging-1B,staging-8B", help="sections [%(default)s]")
    add("--markdown", metavar="FILE", help="only print the tables of an earlier gpu.json")
    options = parser.parse_args()
    if options.save_gib is None:
        options.save_gib = 0.02 if options.tiny else 2.0
    if options.seconds <= 0 or options.rounds < 1 or options.save_gib <= 0:
        parser.error("--seconds, --rounds and --save-gib must be positive")
    return options


if __name__ == "__main__":
    sys.exit(main())
