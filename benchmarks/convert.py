"""How long a conversion of a stored checkpoint takes, and how much memory, beside today's ways.

    python benchmarks/convert.py --gib 1 --rounds 3 --markdown

Stock torch saves a DCP checkpoint in bf16, in the layout of transformers' Llama, of torchtitan's
llama3 or of a transformers model with experts (`--layout`). Then the contenders take turns, each in
a process of its own: first the exports to a HuggingFace directory, then, for Llama, the imports of
one. All exports must write the same tensors. Times end when all bytes are durable: the benchmark
fsyncs what a peer wrote.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import LlamaForCausalLM

from convert_layouts import Layout, layout_of_size
from dcp_hf_writer.convert.export_checkpoint import export_checkpoint
from dcp_hf_writer.convert.import_directory import import_directory
from machine import describe_machine, held, peak_rss_nbytes, reset_peak

if TYPE_CHECKING:
    from collections.abc import Callable

GIB, MIB = 1 << 30, 1 << 20
LAYOUTS = ("llama", "titan", "moe")


@dataclass(frozen=True)
class Work:
    """What is converted."""

    layout: Layout
    has_moments: bool
    stock: Path
    hf: Path


@dataclass(frozen=True)
class Sample:
    """What one conversion took."""

    seconds: float
    """Until all bytes were durable."""
    peak_nbytes: int
    """Peak of the resident memory above what the process held before."""
    resident_nbytes: int
    """Peak of the resident memory, with Python, torch and transformers."""


def export_ours(work: Work, target: Path, *, workers: int) -> None:
    """Export as `dcp-hf export --workers N` does."""
    export_checkpoint(str(work.stock), str(target), work.layout.export(), workers=workers)


def export_by_save_pretrained(work: Work, target: Path) -> None:
    """Convert to one pickled file, load it, and call `save_pretrained`."""
    state = _by_torch_save(work, target)
    with torch.device("meta"):
        model = LlamaForCausalLM(work.layout.config)
    model.load_state_dict(work.layout.weights_in(state), assign=True)
    model.save_pretrained(target, max_shard_size=work.layout.file_nbytes)
    sync(target)


def export_by_save_file(work: Work, target: Path) -> None:
    """Convert to one pickled file, load it, rearrange, and write with `save_file`."""
    write_files(work, work.layout.weights_in(_by_torch_save(work, target)), target)


def _by_torch_save(work: Work, target: Path) -> dict[str, Any]:
    whole = target.with_suffix(".pt")
    dcp_to_torch_save(work.stock, whole)
    state: dict[str, Any] = torch.load(whole, weights_only=False)
    whole.unlink()
    return state


def export_by_load(work: Work, target: Path) -> None:
    """Load the weights with `dcp.load`, rearrange, and write with `save_file`."""
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in work.layout.shapes.items()
    }
    state = weights if work.layout.is_at_top else {"model": weights}
    dcp.load(state, checkpoint_id=work.stock, no_dist=True)
    write_files(work, weights, target)


def write_files(work: Work, weights: dict[str, torch.Tensor], target: Path) -> None:
    """Write the files of a HuggingFace directory one by one, without an index."""
    tensors = work.layout.to_hf(weights)
    target.mkdir()
    for number, names in enumerate(parts(tensors, work.layout.file_nbytes), 1):
        some = {name: tensors[name].contiguous() for name in names}
        save_file(some, target / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    work.layout.config.save_pretrained(target)
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
    "dcp_to_torch_save, torch.load, save_file": export_by_save_file,
}
# Only where the state dict of the trainer is that of the model.
OF_MODEL = {"dcp_to_torch_save, torch.load, save_pretrained": export_by_save_pretrained}
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


def measured(run: Callable[[Work, Path], None], work: Work, target: Path) -> Sample:
    """Convert in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(run, work, target, sender))
    process.start()
    sender.close()
    found: Sample = receiver.recv()
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
    peak = peak_rss_nbytes()
    sender.send(Sample(seconds, peak - before, peak))


def save_stock(work: Work, _: Path) -> None:
    """Save the checkpoint that the exports read, with Adam's moments if the work has them."""
    torch.set_num_threads(1)
    state = work.layout.state(adam=work.has_moments)
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
) -> dict[str, list[Sample]]:
    """Run each contender once a round, in rotating order; the first round does not count."""
    found: dict[str, list[Sample]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            target = root / "target"
            one = measured(contenders[name], work, target)
            peak = one.resident_nbytes / MIB
            print(f"round {turn}: {name}: {one.seconds:.2f} s, {peak:,.0f} MiB", file=sys.stderr)
            if turn:
                found[name].append(one)
            elif contenders is not IMPORTS:
                measured(check_equal, work, target)
            shutil.rmtree(target)
            os.sync()
    return found


def row(name: str, found: list[Sample], nbytes: int, *, is_markdown: bool) -> str:
    """Return the line of a contender."""
    times = [one.seconds for one in found]
    seconds = statistics.median(times)
    cells = [
        name,
        f"{seconds:.2f}",
        f"{min(times):.2f} to {max(times):.2f}",
        f"{nbytes / seconds / 1e9:.2f}",
        f"{statistics.median(one.peak_nbytes for one in found) / MIB:,.0f}",
        f"{statistics.median(one.resident_nbytes for one in found) / MIB:,.0f}",
    ]
    if is_markdown:
        return f"| {' | '.join(cells)} |"
    return _LINE.format(*cells)


_LINE = "{:48} {:>8} {:>16} {:>8} {:>10} {:>9}"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=LAYOUTS, default="llama")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the weights")
    parser.add_argument("--optim", action="store_true", help="store Adam's moments too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", default=None, help="directory on the file system to measure")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.root) as directory:
        root = Path(directory)
        layout = layout_of_size(options.layout, options.gib)
        work = Work(layout, options.optim, root / "stock", root / "hf")
        measured(save_stock, work, root)
        measured(EXPORTS["dcp-hf export, 1 worker"], work, work.hf)
        stored = sum(path.stat().st_size for path in work.stock.iterdir())
        print(describe_machine(directory))
        load = os.getloadavg()[0]
        print(
            f"layout {options.layout}, {len(layout.shapes)} tensors; load of the machine {load:.1f}"
        )
        print(f"weights: {layout.nbytes / GIB:.2f} GiB; stock checkpoint: {stored / GIB:.2f} GiB")
        heads = ("contender", "seconds", "min to max", "GB/s", "peak MiB", "RSS MiB")
        is_llama = options.layout == "llama"
        for contenders in (EXPORTS | OF_MODEL, IMPORTS) if is_llama else (EXPORTS,):
            found = take_turns(contenders, work, root, options.rounds)
            if options.markdown:
                print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
            else:
                print("\n" + _LINE.format(*heads))
            for name, samples in found.items():
                print(row(name, samples, layout.nbytes, is_markdown=options.markdown))


if __name__ == "__main__":
    main()
