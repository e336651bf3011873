"""How much slower training steps get while a checkpoint is being written all the time.

    python benchmarks/overhead.py --plot docs/overhead.png

Two gloo ranks with one thread each train a transformer by data parallelism, so training alone keeps
two cores busy. They save weights that lie beside it. The same processes run the same steps with
each way to save in turns: with no saves, and with a save in flight all the time. The order rotates
from round to round, and the first round does not count. Each way is compared with the loop without
saves of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, WriteSlots
from machine import describe_machine
from plot_timeline import Drawn, Timeline, draw, merged
from ranks import Rank, run_ranks
from states import Workload, build_state_dict, nbytes_by_key, split_into_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

WAYS = {
    "none": "no saves",
    "torch": "torch async_save with FileSystemWriter\nwrites DCP",
    "torch_id": "torch async_save by path alone\nwrites DCP",
    "ours": "HFDualWriter\nwrites DCP + HuggingFace",
    "nice": "HFDualWriter, slots=WriteSlots(nice=10)\nwrites DCP + HuggingFace",
    "all": 'HFDualWriter, page_cache="all"\nwrites DCP + HuggingFace',
    "overlap": 'HFDualWriter, staging="overlap"\nwrites DCP + HuggingFace',
}
TIMEOUT_S = 600
LAYERS, WIDTH, TOKENS = 4, 256, 64
FILES = 4
"""Number of weight files in each export."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What each loop trains and saves."""

    root: str
    steps: int
    batch: int
    gib: float
    """Size of the weights that are saved, over both ranks."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One loop with one way to save."""

    drawn: Drawn
    """When each step, stall and save began and ended."""
    nbytes: int
    """Bytes of one checkpoint of this way, both formats together; 0 without saves."""

    @property
    def step_s(self) -> float:
        """Seconds of the median step."""
        return statistics.median(end - begin for begin, end in self.drawn.steps)

    @property
    def saves(self) -> float:
        """Saves that the loop has seen; one that it saw half counts as a half."""
        return sum(seen(span, self.drawn.loop_s) for span in self.drawn.saves)

    @property
    def save_s(self) -> float:
        """Seconds of the median save; NaN without saves."""
        spans = self.drawn.saves
        return statistics.median(end - begin for begin, end in spans) if spans else float("nan")

    @property
    def longest_stall_s(self) -> float:
        """Seconds of the longest wait for a call of `async_save`."""
        return max((end - begin for begin, end in self.drawn.stalls), default=0.0)


def seen(span: tuple[float, float], until: float) -> float:
    """Return the part of a span that lies before a moment, 0 to 1."""
    begin, end = span
    return 1.0 if end <= until else max(0.0, until - begin) / (end - begin)


class BusyLoop:
    """A training loop that begins a save whenever none is in flight.

    It trains a small transformer by data parallelism, and saves weights that lie beside it: to
    train as many on these cores would take longer than to save them.
    """

    def __init__(self, setting: Setting, directory: str) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.tokens = torch.randn(setting.batch, TOKENS, WIDTH)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        workload = Workload(setting.gib, "bfloat16", "fsdp", optim=False)
        self.state = build_state_dict(workload, mesh)
        # Training uses gloo too, so the saves need a group of their own, whoever takes them.
        self.group = dist.new_group(backend="gloo")
        self.setting, self.directory = setting, directory
        self.writers = self.writers_of_ways(workload)
        self.running: Future[Any] | None = None

    def writers_of_ways(self, workload: Workload) -> dict[str, HFDualWriter]:
        """Return the writer of each way of this package; a writer saves every step."""
        size, _ = split_into_files(nbytes_by_key(workload), FILES)
        export = HFExport(max_shard_size=size, assets={"config.json": b"{}"})
        options: dict[str, Any] = {"export": export, "process_group": self.group}
        overlapping = HFDualWriter(self.directory, staging="overlap", **options)
        overlapping.guard(self.optimizer)
        return {
            "ours": HFDualWriter(self.directory, **options),
            "nice": HFDualWriter(self.directory, slots=WriteSlots(nice=10), **options),
            "all": HFDualWriter(self.directory, page_cache="all", **options),
            "overlap": overlapping,
        }

    def run_way(self, way: str, name: str) -> Timeline:
        """Run the loop with one way to save; all ranks call it together."""
        self.times, self.ends = Timeline(), list[float]()
        dist.barrier()
        self.start = time.perf_counter()
        for step in range(self.setting.steps):
            if way != "none" and self.is_idle():
                self.save(way, os.path.join(self.directory, f"{name}-{step}"))
            began = self.now()
            self.train()
            self.times.steps.append((began, self.now()))
        self.times.loop_s = self.now()
        if self.running is not None:
            self.running.result()
            while len(self.ends) < len(self.times.stalls):
                time.sleep(0.001)  # the save's thread notes the end after the result is there
        self.running = None
        begins = [begin for begin, _ in self.times.stalls]
        self.times.saves = list(zip(begins, self.ends, strict=True))
        return self.times

    def now(self) -> float:
        """Seconds since the loop began."""
        return time.perf_counter() - self.start

    def train(self) -> None:
        """One step: forward, backward, sum of the gradients over the ranks, optimizer."""
        self.model(self.tokens).square().mean().backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        summed = torch.cat([gradient.view(-1) for gradient in gradients])
        dist.all_reduce(summed)
        for gradient, part in zip(
            gradients, summed.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def is_idle(self) -> bool:
        """Whether no rank has a save in flight; they must agree, as a save needs all of them."""
        idle = torch.tensor(int(self.running is None or self.running.done()))
        dist.all_reduce(idle, op=dist.ReduceOp.MIN)
        return bool(idle)

    def save(self, way: str, path: str) -> None:
        """Begin a save; note how long training waits for the call, and when the save ends."""
        if self.running is not None:
            self.running.result()
        began = self.now()
        writer = dcp.FileSystemWriter(path) if way == "torch" else self.writers.get(way)
        saving: Any = dcp.async_save(
            self.state, checkpoint_id=path, storage_writer=writer, process_group=self.group
        )
        self.running = getattr(saving, "upload_completion", saving)
        self.times.stalls.append((began, self.now()))
        self.running.add_done_callback(lambda _: self.ends.append(self.now()))


def run_rounds(
    rank: Rank,
    ways: Sequence[str],
    setting: Setting,
    rounds: int,
    directory: str,
) -> None:
    """Body of a rank: each way in turn; emits what each loop did."""
    loop = BusyLoop(setting, directory)
    for number in range(rounds + 1):
        turn = number % len(ways)
        for way in [*ways[turn:], *ways[:turn]]:
            times = loop.run_way(way, f"{way}-{number}")
            of_ranks: list[Any] = [None] * rank.world_size
            dist.all_gather_object(of_ranks, times)
            if rank.rank == 0:
                written = sorted(os.listdir(directory))
                nbytes = tree_nbytes(os.path.join(directory, written[0])) if written else 0
                rank.emit(round=number, way=way, measured=Measured(merged(of_ranks), nbytes))
                for checkpoint in written:
                    shutil.rmtree(os.path.join(directory, checkpoint))
                os.sync()
            dist.barrier()


def tree_nbytes(path: str) -> int:
    """Return the bytes of all files below a directory."""
    return sum(
        os.path.getsize(os.path.join(root, name))
        for root, _, names in os.walk(path)
        for name in names
    )


def measure(ways: Sequence[str], setting: Setting, rounds: int) -> dict[str, list[Measured]]:
    """Run all ways in turns; return what was measured in each round that counts."""
    found: dict[str, list[Measured]] = {way: [] for way in ways}

    def take(_: int, facts: dict[str, Any]) -> None:
        one: Measured = facts["measured"]
        said = f"{one.drawn.loop_s:.1f} s, {len(one.drawn.saves)} saves"
        print(f"round {facts['round']}, {facts['way']}: {said}", file=sys.stderr)
        if facts["round"]:
            found[facts["way"]].append(one)

    with tempfile.TemporaryDirectory(prefix="overhead-", dir=setting.root) as directory:
        run_ranks(
            run_rounds,
            ways,
            setting,
            rounds,
            directory,
            world_size=2,
            timeout_s=TIMEOUT_S,
            on_event=take,
        )
    return found


def lost_per_save_s(one: Measured, plain: Measured) -> float:
    """Return the seconds of training that one save cost, waiting included; NaN without saves."""
    lost = one.drawn.loop_s - plain.drawn.loop_s
    return lost / one.saves if one.saves else float("nan")


def rows(found: dict[str, list[Measured]]) -> list[list[str]]:
    """Return the table: medians over the rounds, each round compared with its own plain loop."""
    head = ["", "step, s", "steps slower", "loop longer", "longest stall, s", "a save, s"]
    table = [[*head, "GB a save", "saves a loop", "training lost for one save, s"]]
    plain = found["none"]
    for way, rounds in found.items():
        pairs = list(zip(rounds, plain, strict=True))
        slower = [one.step_s / base.step_s - 1 for one, base in pairs]
        longer = [one.drawn.loop_s / base.drawn.loop_s - 1 for one, base in pairs]
        cells = [f"{middle(one.step_s for one in rounds):.3f}"]
        if way == "none":
            table.append([title(way), *cells, *[""] * 7])
            continue
        cells += [spread(slower), spread(longer)]
        cells += [f"{middle(one.longest_stall_s for one in rounds):.3f}"]
        cells += [f"{middle(one.save_s for one in rounds):.2f}"]
        cells += [f"{middle(one.nbytes for one in rounds) / 1e9:.2f}"]
        cells += [f"{middle(one.saves for one in rounds):.1f}"]
        cells += [f"{middle(lost_per_save_s(one, base) for one, base in pairs):.2f}"]
        table.append([title(way), *cells])
    return table


def middle(values: Any) -> float:
    """Return the median."""
    return float(statistics.median(values))


def spread(shares: list[float]) -> str:
    """Return the median of some shares and their range, in percent."""
    low, high = min(shares), max(shares)
    return f"{100 * middle(shares):+.0f} % ({100 * low:+.0f} to {100 * high:+.0f})"


def title(way: str) -> str:
    """Return the name of a way in one line."""
    return WAYS[way].replace("\n", ", ")


def typical(rounds: list[Measured]) -> Measured:
    """Return the round whose loop had the median length, the shorter one of two."""
    return sorted(rounds, key=lambda one: one.drawn.loop_s)[(len(rounds) - 1) // 2]


def from_json(facts: dict[str, Any]) -> dict[str, list[Measured]]:
    """Return what `--json` wrote."""
    return {
        way: [Measured(Drawn(**one["drawn"]), one["nbytes"]) for one in rounds]
        for way, rounds in facts["ways"].items()
    }


def main() -> None:
    """Measure, print and draw."""
    args = _parse_options()
    setting = Setting(args.root, args.steps, args.batch, args.gib)
    machine = describe_machine(args.root)
    found = measure(args.only, setting, args.rounds)
    load = os.getloadavg()[1]
    print(f"{machine}; {args.rounds} rounds of {args.steps} steps, load average {load:.1f}\n")
    for number, cells in enumerate(rows(found)):
        print("| " + " | ".join(cells) + " |")
        if number == 0:
            print("|---" * len(cells) + "|")
    if args.json:
        facts = {
            way: [{"drawn": one.drawn.facts(), "nbytes": one.nbytes} for one in rounds]
            for way, rounds in found.items()
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "load": load, "ways": facts}, file, indent=1)
    if args.plot:
        drawn = {WAYS[way]: typical(rounds).drawn for way, rounds in found.items()}
        headline = "The same training steps, with a save in flight all the time"
        said = f"the median of {args.rounds} rounds, load average {load:.0f}"
        draw(drawn, headline, machine, said, args.plot)


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="rounds that count [%(default)s]")
    add("--steps", type=int, default=40, help="steps of each loop [%(default)s]")
    add("--batch", type=int, default=4, help="sequences of a step, on each rank [%(default)s]")
    add("--gib", type=float, default=0.5, help="size of the weights that are saved [%(default)s]")
    add("--root", default=tempfile.gettempdir(), help="where to save")
    add("--only", default=",".join(WAYS), help="ways to save, of [%(default)s]")
    add("--plot", metavar="FILE", help="draw a picture")
    add("--json", metavar="FILE", help="write the figures of all rounds")
    args = parser.parse_args()
    args.only = args.only.split(",")
    unknown = [way for way in args.only if way not in WAYS]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(WAYS)}")
    if "none" not in args.only:
        args.only.insert(0, "none")
    return args


if __name__ == "__main__":
    main()
