"""The same training loop with torch's saves and with ours, as a picture of what happened when.

    python benchmarks/timeline.py --rounds 3 --plot docs/timeline.png

Two ranks train a Llama by FSDP2 and AdamW, and save every few steps while they train. Each way to
save runs the same loop in processes of its own, `--rounds` times in turn. The picture shows the
fastest round of each way. Nothing is drawn that was not measured in that round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from dcp_hf_writer import HFDualWriter, HFExport
from machine import describe_machine
from plot_timeline import Drawn, Timeline, draw, merged
from ranks import Rank, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

WAYS = {
    "none": "no saves",
    "torch": "torch async_save\nwrites DCP",
    "torch_hf": "torch async_save, then\nHuggingFaceStorageWriter\nwrites DCP + HuggingFace",
    "ours": "HFDualWriter\nwrites DCP + HuggingFace",
}
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Setting:
    """What each loop trains and when it saves."""

    root: str
    layers: int
    steps: int
    every: int
    batch: int


class Loop:
    """One rank's training loop with one way to save."""

    def __init__(self, way: str, setting: Setting, directory: str) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=setting.layers,
            num_attention_heads=16,
            num_key_value_heads=8,
            vocab_size=8000,
        )
        self.model = LlamaForCausalLM(config)
        for layer in self.model.model.layers:
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.export = HFExport.from_transformers(self.model) if way == "ours" else None
        # Training uses gloo too, so the saves need a group of their own, whoever takes them.
        self.group = dist.new_group(backend="gloo")
        self.way, self.setting, self.directory = way, setting, directory
        self.times = Timeline()
        self.pending: list[tuple[Callable[[], Future[Any]], float]] = []
        self.running: tuple[Future[Any], float] | None = None
        self.ends: list[float] = []

    def run(self) -> Timeline:
        """Train one step and save once to warm up, then run the measured loop."""
        self.train()
        self.save("warm-up")
        self.drain()
        dist.barrier()
        self.times = Timeline(nbytes=self.state_nbytes())
        self.start = time.perf_counter()
        for step in range(1, self.setting.steps + 1):
            began = self.now()
            self.train()
            self.times.steps.append((began, self.now()))
            self.go_on()
            if self.way != "none" and step % self.setting.every == 0:
                self.save(f"step-{step}")
        self.times.loop_s = self.now()
        self.drain()
        return self.times

    def now(self) -> float:
        """Seconds since the loop began."""
        return time.perf_counter() - getattr(self, "start", 0.0)

    def train(self) -> None:
        """One step of training."""
        tokens = torch.randint(0, 8000, (self.setting.batch, 32))
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, name: str) -> None:
        """Begin a save; note how long training waits for it."""
        if self.way == "none":
            return
        self.drain(is_stall=True)
        began = self.now()
        weights, moments = get_state_dict(self.model, self.optimizer)
        state = {"model": weights, "optim": moments}
        path = os.path.join(self.directory, name)
        self.running = (self.begin(state, path), began)
        self.times.stalls.append((began, self.now()))
        if self.way == "torch_hf":
            self.pending = [(lambda: self.begin_hf(weights, path), began)]

    def begin(self, state: dict[str, Any], path: str) -> Future[Any]:
        """Call `async_save` the way that is measured."""
        writer = (
            HFDualWriter(path, export=self.export, process_group=self.group)
            if self.way == "ours"
            else dcp.FileSystemWriter(path)
        )
        return self.noted(dcp.async_save(state, storage_writer=writer, process_group=self.group))

    def begin_hf(self, weights: dict[str, Any], path: str) -> Future[Any]:
        """Save the weights once more as torch's own writer of HuggingFace files does it."""
        names = dict.fromkeys(weights, 1)
        writer = HuggingFaceStorageWriter(
            os.path.join(path, "hf"),
            fqn_to_index_mapping=names,
            save_distributed=True,
            enable_consolidation=True,
        )
        return self.noted(dcp.async_save(weights, storage_writer=writer, process_group=self.group))

    def noted(self, future: Any) -> Future[Any]:
        """Note when the result of a save comes; it comes in the thread of the save."""
        future.add_done_callback(lambda _: self.ends.append(self.now()))
        return future

    def go_on(self) -> None:
        """Begin the second half of a save in two halves, once every rank has the first one."""
        if not self.pending or self.running is None:
            return
        is_done = torch.tensor(int(self.running[0].done()))
        dist.all_reduce(is_done, op=dist.ReduceOp.MIN)
        if is_done:
            self.begin_pending()

    def begin_pending(self) -> None:
        """Begin the second half; training waits while its tensors are copied."""
        (begin, since) = self.pending.pop()
        began = self.now()
        self.running = (begin(), since)
        self.times.stalls.append((began, self.now()))

    def drain(self, *, is_stall: bool = False) -> None:
        """Wait for the save in flight, both halves of it."""
        if self.running is None:
            return
        began = self.now()
        self.running[0].result()
        if self.pending:
            self.begin_pending()
            self.running[0].result()
        if is_stall and self.now() - began > 1e-3:
            self.times.stalls.append((began, self.now()))
        self.times.saves.append((self.running[1], self.ends[-1]))
        self.running = None

    def state_nbytes(self) -> int:
        """Bytes of weights and moments that this rank holds."""
        weights = sum(p.to_local().nbytes for p in self.model.parameters())  # type: ignore[attr-defined]
        return 3 * weights


def run_loop(rank: Rank, way: str, setting: Setting, directory: str) -> Timeline:
    """Run the loop of one rank."""
    del rank
    return Loop(way, setting, directory).run()


def measure(setting: Setting, rounds: int) -> tuple[dict[str, list[Drawn]], int]:
    """Run each way in turn, `rounds` times; return what was measured, and the size of a save."""
    found: dict[str, list[Drawn]] = {way: [] for way in WAYS}
    nbytes = 0
    for number in range(rounds):
        # Each way goes first in some round: what a loop leaves to the disk slows the next one.
        turn = number % len(WAYS)
        ways = [*WAYS]
        for way in ways[turn:] + ways[:turn]:
            with tempfile.TemporaryDirectory(prefix="timeline-", dir=setting.root) as directory:
                times = run_ranks(
                    run_loop, way, setting, directory, world_size=2, timeout_s=TIMEOUT_S
                )
                nbytes = sum(t.nbytes for t in times)
            found[way].append(merged(times))
            print(f"round {number + 1}, {way}: {found[way][-1].loop_s:.1f} s", file=sys.stderr)
            os.sync()
    return found, nbytes


def fastest(rounds: list[Drawn]) -> Drawn:
    """The round whose loop was over first: the one that other programs disturbed least."""
    return min(rounds, key=lambda one: one.loop_s)


def print_table(chosen: dict[str, Drawn]) -> None:
    """Print the figures of the rounds that are drawn, as a table."""
    print("| | loop, s | training waited, s | a save took, s |")
    print("|---|---|---|---|")
    for way, one in chosen.items():
        title = WAYS[way].replace("\n", " ")
        took = statistics.median([b - a for a, b in one.saves]) if one.saves else 0.0
        print(f"| {title} | {one.loop_s:.2f} | {one.waited_s:.2f} | {took:.2f} |")


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--every", type=int, default=3, help="steps between two saves")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--root", default=tempfile.gettempdir(), help="where to save")
    parser.add_argument("--plot", help="draw a picture into this file")
    parser.add_argument("--json", help="write the figures of all rounds into this file")
    args = parser.parse_args()
    setting = Setting(args.root, args.layers, args.steps, args.every, args.batch)
    found, nbytes = measure(setting, args.rounds)
    load = os.getloadavg()[1]
    chosen = {way: fastest(rounds) for way, rounds in found.items()}
    machine = describe_machine(args.root)
    print(f"{machine}; {nbytes / 2**30:.2f} GiB of weights and moments, {args.rounds} rounds")
    print_table(chosen)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            facts = {way: [one.facts() for one in rounds] for way, rounds in found.items()}
            json.dump({"machine": machine, "nbytes": nbytes, "rounds": facts}, file, indent=1)
    if args.plot:
        said = f"the fastest of {args.rounds} rounds, load average {load:.0f}"
        title = (
            "The same training loop; "
            f"a save has {nbytes / 1e9:.2f} GB of weights and Adam's moments"
        )
        draw({WAYS[way]: one for way, one in chosen.items()}, title, machine, said, args.plot)


if __name__ == "__main__":
    main()
