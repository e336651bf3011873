"""How long a conversion of a stored checkpoint takes, and how much memory, beside today's ways.

    python benchmarks/convert.py --gib 1 --rounds 3 --markdown

Stock torch saves a DCP checkpoint of Llama's shapes in bf16. Then the contenders take turns, each
in a process of its own: first the exports to a HuggingFace directory, then the imports of one. All
exports must write the same tensors. Times end when all bytes are durable: the benchmark fsyncs
what a peer wrote.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import LlamaConfig, LlamaForCausalLM

from dcp_hf_writer import HFExport
from dcp_hf_writer.convert.export_checkpoint import export_checkpoint
from dcp_hf_writer.convert.import_directory import import_directory
from llama import LLAMA_1B, Llama, build_on, shapes_of
from machine import describe_machine, held, peak_rss_nbytes, reset_peak

if TYPE_CHECKING:
    from collections.abc import Callable

GIB, MIB = 1 << 30, 1 << 20
FILES = 4
"""Files of an export, so that two workers have work."""


@dataclass(frozen=True)
class Work:
    """What is converted."""

    model: Llama
    has_moments: bool
    stock: Path
    hf: Path

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(2 * torch.Size(shape).numel() for shape in shapes_of(self.model).values())

    @property
    def file_nbytes(self) -> int:
        """Largest size of a file of an export."""
        return self.nbytes // FILES + MIB

    @property
    def config(self) -> LlamaConfig:
        """The config of the model."""
        model = self.model
        return LlamaConfig(
            vocab_size=model.vocabulary,
            hidden_size=model.hidden,
            intermediate_size=model.inner,
            num_hidden_layers=model.layers,
            num_attention_heads=model.hidden // 64,
            num_key_value_heads=model.kv // 64,
            dtype="bfloat16",
        )


def export_ours(work: Work, target: Path, *, workers: int) -> None:
    """Export as `dcp-hf export --workers N` does."""
    options = HFExport(max_shard_size=work.file_nbytes, assets=(work.config,))
    export_checkpoint(str(work.stock), str(target), options, workers=workers)


def export_by_torch_save(work: Work, target: Path) -> None:
    """Convert to one pickled file, load it, and call `save_pretrained`."""
    whole = target.with_suffix(".pt")
    dcp_to_torch_save(work.stock, whole)
    state = torch.load(whole, weights_only=False)["model"]
    with torch.device("meta"):
        model = LlamaForCausalLM(work.config)
    model.load_state_dict(state, assign=True)
    model.save_pretrained(target, max_shard_size=work.file_nbytes)
    whole.unlink()
    sync(target)


def export_by_load(work: Work, target: Path) -> None:
    """Load the weights with `dcp.load`, and write them with `save_file`, one file at a time."""
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16)
        for name, shape in shapes_of(work.model).items()
    }
    dcp.load({"model": weights}, checkpoint_id=work.stock, no_dist=True)
    target.mkdir()
    for number, names in enumerate(parts(weights, work.file_nbytes), 1):
        some = {name: weights[name] for name in names}
        save_file(some, target / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    work.config.save_pretrained(target)
    sync(target)


def import_ours(work: Work, target: Path) -> None:
    """Import as `dcp-hf import` does."""
    import_directory(str(work.hf), str(target), {})


def import_by_load(work: Work, target: Path) -> None:
    """Load all files with safetensors, and save them with `dcp.save`, which fsyncs."""
    weights = {}
    for path in sorted(work.hf.glob("*.safetensors")):
        weights |= load_file(path)
    dcp.save({"model": weights}, checkpoint_id=target, no_dist=True)


def import_by_model(work: Work, target: Path) -> None:
    """Load the model with transformers, and save its state dict with `dcp.save`."""
    model = LlamaForCausalLM.from_pretrained(work.hf)
    dcp.save({"model": model.state_dict()}, checkpoint_id=target, no_dist=True)


EXPORTS: dict[str, Callable[[Work, Path], None]] = {
    "dcp-hf export, 1 worker": lambda work, target: export_ours(work, target, workers=1),
    "dcp-hf export, 2 workers": lambda work, target: export_ours(work, target, workers=2),
    "dcp.load, then save_file": export_by_load,
    "dcp_to_torch_save, torch.load, save_pretrained": export_by_torch_save,
}
IMPORTS: dict[str, Callable[[Work, Path], None]] = {
    "dcp-hf import": import_ours,
    "load_file, then dcp.save": import_by_load,
    "from_pretrained, then dcp.save": import_by_model,
}


def parts(weights: dict[str, torch.Tensor], most: int) -> list[list[str]]:
    """Return the names of the tensors of each file."""
    found: list[list[str]] = [[]]
    nbytes = 0
    for name, tensor in weights.items():
        if nbytes and nbytes + tensor.nbytes > most:
            found.append([])
            nbytes = 0
        found[-1].append(name)
        nbytes += tensor.nbytes
    return found


def sync(directory: Path) -> None:
    """Make all files of a directory durable."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measured(run: Callable[[Work, Path], None], work: Work, target: Path) -> tuple[float, int]:
    """Convert in a process of its own; return the seconds, and the peak of its own memory."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(run, work, target, sender))
    process.start()
    sender.close()
    found: tuple[float, int] = receiver.recv()
    process.join()
    return found


def _measure(run: Callable[[Work, Path], None], work: Work, target: Path, sender: Any) -> None:
    before = held().rss_nbytes
    if not reset_peak():
        msg = "this system does not measure the peak of memory"
        raise RuntimeError(msg)
    began = time.monotonic()
    run(work, target)
    seconds = time.monotonic() - began
    sender.send((seconds, peak_rss_nbytes() - before))


def save_stock(work: Work, _: Path) -> None:
    """Save the checkpoint that the exports read, with Adam's moments if the work has them."""
    torch.set_num_threads(1)
    state = build_on("cpu", work.model, adam=work.has_moments)
    writer = dcp.FileSystemWriter(work.stock, thread_count=2)
    dcp.save(state, storage_writer=writer, no_dist=True)


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a HuggingFace directory, mapped from its files."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return found


def check_equal(work: Work, target: Path) -> None:
    """Fail if an export does not hold the tensors of the first one."""
    one, other = tensors_in(work.hf), tensors_in(target)
    if one.keys() != other.keys() or not all(torch.equal(one[n], other[n]) for n in one):
        msg = f"{target} does not hold the tensors of {work.hf}"
        raise RuntimeError(msg)


def take_turns(
    contenders: dict[str, Callable[[Work, Path], None]], work: Work, root: Path, rounds: int
) -> dict[str, list[tuple[float, int]]]:
    """Run each contender once a round, in rotating order; the first round does not count."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            target = root / "target"
            one = measured(contenders[name], work, target)
            print(f"round {turn}: {name}: {one[0]:.2f} s, {one[1] / MIB:,.0f} MiB", file=sys.stderr)
            if turn:
                found[name].append(one)
            elif contenders is EXPORTS:
                measured(check_equal, work, target)
            shutil.rmtree(target)
            os.sync()
    return found


def row(name: str, found: list[tuple[float, int]], nbytes: int, *, is_markdown: bool) -> str:
    """Return the line of a contender."""
    seconds = statistics.median(one for one, _ in found)
    peak = statistics.median(peak for _, peak in found)
    spread = f"{min(s for s, _ in found):.2f} to {max(s for s, _ in found):.2f}"
    cells = [name, f"{seconds:.2f}", spread, f"{nbytes / seconds / 1e9:.2f}", f"{peak / MIB:,.0f}"]
    if is_markdown:
        return f"| {' | '.join(cells)} |"
    return "{:48} {:>8} {:>16} {:>8} {:>10}".format(*cells)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the weights")
    parser.add_argument("--optim", action="store_true", help="store Adam's moments too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", default=None, help="directory on the file system to measure")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.root) as directory:
        root = Path(directory)
        work = Work(of_size(options.gib), options.optim, root / "stock", root / "hf")
        measured(save_stock, work, root)
        measured(EXPORTS["dcp-hf export, 1 worker"], work, work.hf)
        stored = sum(path.stat().st_size for path in work.stock.iterdir())
        print(describe_machine(directory))
        print(f"weights: {work.nbytes / GIB:.2f} GiB; stock checkpoint: {stored / GIB:.2f} GiB")
        heads = ("contender", "seconds", "min to max", "GB/s", "peak MiB")
        for contenders in (EXPORTS, IMPORTS):
            found = take_turns(contenders, work, root, options.rounds)
            if options.markdown:
                print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
            else:
                print("\n{:48} {:>8} {:>16} {:>8} {:>10}".format(*heads))
            for name, samples in found.items():
                print(row(name, samples, work.nbytes, is_markdown=options.markdown))


def of_size(gib: float) -> Llama:
    """Return Llama's 1B shapes with untied embeddings and as many layers as make the size."""
    one = replace(LLAMA_1B, vocabulary=32_000, is_tied=False, layers=1)
    sizes = [
        sum(torch.Size(s).numel() for s in shapes_of(m).values())
        for m in (one, replace(one, layers=2))
    ]
    layer = sizes[1] - sizes[0]
    wanted = gib * GIB / 2
    return replace(one, layers=max(1, round((wanted - sizes[0] + layer) / layer)))


if __name__ == "__main__":
    main()
