"""How long a weight sync takes, and how much memory, beside gathering each parameter.

    python benchmarks/stream.py --ranks 2 --gib 0.5 --buckets 16MB,64MB --layout ep

Ranks of this host hold a mixture of experts in bf16 and give it out as HuggingFace tensors: by
`iter_hf_buckets`, and as trainers do it, by `full_tensor()` of each parameter, cut into the
tensors of the experts. Each contender has processes of its own. With `--device cuda` the ranks use
NCCL on a GPU each, or share what there are by gloo.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer import LoadSpec, Piece, iter_hf_buckets
from dcp_hf_writer.stream import fill_buckets
from dcp_hf_writer.tensors.shards import local_shape, shards_of
from machine import describe_machine, held, peak_rss_nbytes, reset_peak
from ranks import Rank, run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh

    from dcp_hf_writer.stream.plan_gathers import Gather

EXPERTS, HIDDEN, INNER = 16, 512, 768
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Setting:
    """What is streamed, and how it is held."""

    gib: float
    layout: str
    device: str
    rounds: int

    @property
    def layers(self) -> int:
        """Layers that make the wanted size."""
        numel = sum(torch.Size(shape).numel() for shape in layer_shapes(0).values())
        return max(1, round(self.gib * GIB / 2 / numel))


@dataclass(frozen=True)
class Result:
    """What one rank measured."""

    seconds: list[float]
    """Of each round, after the first."""
    first_s: float
    """Of the first one, planning included."""
    more_nbytes: int
    """Highest memory above what the rank held before."""
    digest: int
    """Of all tensors that came, in any order; sum of their bits."""
    nbytes: int
    """Bytes that came."""
    received: tuple[int, ...]
    """Bytes received over each mesh dimension of the experts."""


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer, by FQN."""
    at = f"layers.{layer}."
    return {
        f"{at}attn.qkv": (3 * HIDDEN, HIDDEN),
        f"{at}attn.o": (HIDDEN, HIDDEN),
        f"{at}norm": (HIDDEN,),
        f"{at}experts.gate_up": (EXPERTS, 2 * INNER, HIDDEN),
        f"{at}experts.down": (EXPERTS, HIDDEN, INNER),
    }


def specs(layers: int) -> list[LoadSpec]:
    """Say that fused experts are tensors of their own."""
    found = []
    for layer in range(layers):
        for name, parts in {"gate_up": ("gate", "up"), "down": ("down",)}.items():
            fqn = f"layers.{layer}.experts.{name}"
            shape = layer_shapes(layer)[fqn]
            part = (shape[1] // len(parts), shape[2])
            numel = part[0] * part[1]
            pieces = [
                Piece(key, part, ((numel, 1, 1),), 0, number * numel)
                for number, key in enumerate(expert_keys(layer, parts))
            ]
            found.append(LoadSpec(fqn, global_shape=shape, pieces=pieces))
    return found


def expert_keys(layer: int, parts: tuple[str, ...]) -> list[str]:
    """HuggingFace names of what a stack of experts holds, in its order."""
    return [f"layers.{layer}.experts.{e}.{part}" for e in range(EXPERTS) for part in parts]


def state_dict(setting: Setting, world_size: int) -> tuple[dict[str, DTensor], DeviceMesh]:
    """Make this rank's part of the model; also returns the mesh of the experts."""
    device = torch.device(setting.device)
    has_one_each = setting.device == "cuda" and torch.cuda.device_count() >= world_size
    backend = "nccl" if has_one_each else "gloo"
    if setting.device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    flat = init_device_mesh(device.type, (world_size,), backend_override={0: backend})
    outer = 2 if world_size % 2 == 0 and world_size > 2 else 1
    grid = init_device_mesh(
        device.type,
        (outer, world_size // outer),
        mesh_dim_names=("fsdp", "inner"),
        backend_override={"fsdp": backend, "inner": backend},
    )
    found = {}
    for layer in range(setting.layers):
        for fqn, shape in layer_shapes(layer).items():
            is_expert = "experts" in fqn
            mesh = grid if is_expert and setting.layout != "fsdp" else flat
            found[fqn] = made(fqn, shape, mesh, placements(setting.layout, mesh, fqn), device)
    return found, grid


def placements(layout: str, mesh: DeviceMesh, fqn: str) -> tuple[Any, ...]:
    """How a tensor is sharded: by rows, experts over the inner dimension, or their rows."""
    if mesh.ndim == 1:
        return (Shard(0),) if mesh.size() > 1 else (Replicate(),)
    if layout == "ep":
        return (_StridedShard(0, split_factor=mesh.size(1)), Shard(0))
    is_fused = fqn.endswith("gate_up")
    return (Shard(0), _StridedShard(1, split_factor=2) if is_fused else Shard(2))


def made(
    fqn: str,
    shape: tuple[int, ...],
    mesh: DeviceMesh,
    placed: tuple[Any, ...],
    device: torch.device,
) -> DTensor:
    """Make a DTensor of random bits without the whole of it on any rank."""
    shards = shards_of(placed, tuple(mesh.shape), tuple(mesh.get_coordinate() or ()))
    local = torch.empty(local_shape(shape, shards), dtype=torch.bfloat16, device=device)
    local.view(torch.int16).random_(generator=generator_of(fqn, device))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, placed, run_check=False, shape=torch.Size(shape), stride=stride
    )


def generator_of(fqn: str, device: torch.device) -> torch.Generator:
    """Seed by name and rank, so that no two parts are alike."""
    seed = hash((sum(fqn.encode()), dist.get_rank())) & 0xFFFF
    return torch.Generator(device).manual_seed(seed)


def by_buckets(
    state: dict[str, DTensor], setting: Setting, bucket: str, preserve: str | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give out all tensors by `iter_hf_buckets`."""
    declared = specs(setting.layers)
    for some in iter_hf_buckets(state, declared, bucket_bytes=bucket, preserve=preserve):
        yield from some


def by_full_tensors(state: dict[str, DTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Give out all tensors as trainers do: gather a parameter, cut it."""
    for fqn, value in state.items():
        full = value.full_tensor()
        if "experts" not in fqn:
            yield fqn, full
            continue
        layer = int(fqn.split(".")[1])
        parts = ("gate", "up") if fqn.endswith("gate_up") else ("down",)
        chunks = (part for expert in full for part in expert.chunk(len(parts)))
        yield from zip(expert_keys(layer, parts), chunks, strict=True)


def measure(rank: Rank, setting: Setting, contender: str) -> Result:
    """Run one contender in a rank."""
    state, grid = state_dict(setting, rank.world_size)
    kind, _, bucket = contender.partition(" ")
    received = count_received(grid)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        if kind == "full_tensor":
            return by_full_tensors(state)
        return by_buckets(state, setting, bucket, "inner" if kind == "preserve" else None)

    reset(setting.device)
    before = now_held(setting.device)
    first_s = timed(tensors, setting.device)
    received_once = tuple(received)
    seconds = [timed(tensors, setting.device) for _ in range(setting.rounds)]
    more = peak(setting.device) - before
    # Sums of bits go by in another pass: they are no part of a sync.
    digest = nbytes = 0
    for _, tensor in tensors():
        digest += int(tensor.view(torch.int16).sum(dtype=torch.int64))
        nbytes += tensor.nbytes
    return Result(seconds, first_s, more, digest, nbytes, received_once)


def timed(tensors: Any, device: str) -> float:
    """Return the seconds of one sync, from a barrier to the last tensor."""
    dist.barrier()
    began = time.perf_counter()
    for _ in tensors():
        pass
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def count_received(grid: DeviceMesh) -> list[int]:
    """Count what this rank receives over each dimension of a mesh."""
    # By their ranks: meshes may have groups of the same ranks, of which one is used.
    members = dist.get_process_group_ranks
    numbers = {tuple(members(grid.get_group(dim))): dim for dim in range(grid.ndim)}
    received = [0] * grid.ndim
    gather = fill_buckets._gather

    def counting(buffer: torch.Tensor, step: Gather, group: Any) -> None:
        dim = numbers.get(tuple(members(group)))
        if dim is not None:
            own = dist.get_rank(group)
            others = (nbytes for i, (_, nbytes) in enumerate(step.slots) if i != own)
            received[dim] += sum(others)
        gather(buffer, step, group)

    fill_buckets._gather = counting
    return received


def reset(device: str) -> None:
    """Start a new peak of memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()


def now_held(device: str) -> int:
    """Return the bytes that are held now."""
    return torch.cuda.memory_allocated() if device == "cuda" else held().rss_nbytes


def peak(device: str) -> int:
    """Return the most bytes that were held since `reset`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss_nbytes()


def row(name: str, results: list[Result]) -> str:
    """Show one contender; the slowest rank counts."""
    times = [max(some) for some in zip(*(r.seconds for r in results), strict=True)]
    median = statistics.median(times)
    rate = results[0].nbytes / median / GIB
    more = max(r.more_nbytes for r in results) / MIB
    first = max(r.first_s for r in results)
    over = ", ".join(f"{n / MIB:.0f}" for n in results[0].received)
    times_s = f"{first:9.3f}{median:9.3f}{max(times):9.3f}"
    return f"{name:24}{times_s}{rate:10.2f}{more:11.0f}    {over}"


def main() -> None:
    """Print time, rate and memory of each contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="ranks [2]")
    parser.add_argument("--gib", type=float, default=0.5, help="size of the model in bf16 [0.5]")
    parser.add_argument("--buckets", default="16MB,64MB", help="bucket sizes [16MB,64MB]")
    parser.add_argument("--layout", choices=("fsdp", "ep", "tp"), default="ep", help="[ep]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, medians are shown [5]")
    given = parser.parse_args()
    setting = Setting(given.gib, given.layout, given.device, given.rounds)
    contenders = ["full_tensor", *(f"stream {size}" for size in given.buckets.split(","))]
    if given.layout == "ep":
        contenders += [f"preserve {size}" for size in given.buckets.split(",")]
    print(describe_machine("."))
    if given.device == "cuda":
        print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    print(f"{given.ranks} ranks, {setting.layers} layers, {given.layout}, {given.device}\n")
    head = f"{'':24}{'first s':>9}{'median':>9}{'max':>9}{'GiB/s':>10}{'peak +MiB':>11}"
    print(f"{head}    received over fsdp, inner (MiB)")
    digests = {}
    for name in contenders:
        results = run_ranks(
            measure, setting, name, world_size=given.ranks, timeout_s=600, threads=1
        )
        print(row(name, results), flush=True)
        if not name.startswith("preserve"):
            digests[name] = {result.digest for result in results}
    same = len(set().union(*digests.values())) == 1
    print(f"\nthe same tensors from all, on all ranks: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
