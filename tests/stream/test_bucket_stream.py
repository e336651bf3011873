"""iter_hf_buckets on real ranks: what it yields is what HFDualWriter writes, bit for bit."""

from __future__ import annotations

import ctypes
import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer import (
    HFDualWriter,
    HFExport,
    HFSavePlanner,
    LoadSpec,
    Piece,
    ShardSpec,
    iter_hf_buckets,
)
from dcp_hf_writer.stream.local_shards import _distinct
from support.compare import tensor_difference
from support.parallel_models import can_distribute, parallel_model, unsharded
from support.rank_process import Raised
from support.rank_tensors import tensor
from support.ranks import run_ranks
from support.sharded_models import SHARDINGS, build_model, shard
from support.state_cases import CASES
from support.stock_readers import load_hf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

MODELS = ("llama_bf16", "llama_tied", "gpt_oss")

# In bytes: smaller than most tensors; some of them; everything at once.
BUCKETS: tuple[int | str, ...] = (1000, 20_000, "1GB")

# Cases of a state dict that say nothing more of a stream, or save for a long time.
LEFT_OUT = {"many_small_tensors", "like_base_index", "like_base_of_one_file"}
LARGE = {"cast_larger_than_a_buffer"}

EXPERTS, ROWS, HIDDEN = 4, 6, 5

Found = dict[str, torch.Tensor]


def collect(buckets: Iterable[list[tuple[str, torch.Tensor]]]) -> Found:
    """Copy what a stream yields; no name may come twice."""
    found: Found = {}
    for bucket in buckets:
        for key, value in bucket:
            assert key not in found, f"{key} came twice"
            found[key] = value.clone()
    return found


def difference(
    state: dict[str, Any],
    specs: Any,
    expected: Found,
    *,
    sizes: tuple[int | str, ...] = BUCKETS,
    **options: Any,
) -> str | None:
    """Stream in buckets of each size; say how what comes differs from what should."""
    for size in sizes:
        found = collect(iter_hf_buckets(state, specs, bucket_bytes=size, **options))
        wrong = tensor_difference(found, expected)
        if wrong is not None:
            return f"bucket_bytes={size!r}: {wrong}"
    return None


def attempt(check: Callable[[], str | None]) -> str | Raised | None:
    """Run a check; return what it raises, so that one failure hides no other."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - the parent raises it
        return Raised.of(error)


def stream_models(rank: int, world_size: int, root: Path) -> dict[str, str | Raised | None]:
    """Save and stream models in each way to shard them over so many ranks."""
    shardings = [name for name, size in SHARDINGS.items() if size == world_size]
    if world_size == 1:
        shardings = ["whole"]
    found = {}
    for sharding, name in itertools.product(shardings, MODELS):
        model = build_model(name) if sharding == "whole" else shard(build_model(name), sharding)
        state = {"model": model.state_dict(), "step": 3}
        where = root / f"{world_size}-{sharding}-{name}"
        writer = HFDualWriter(where, export=HFExport(assets=(model.config,)))
        dcp.async_save(state, storage_writer=writer).result()
        expected = load_hf(where / "hf")
        for kind, given in {"nested": state, "flat": model.state_dict()}.items():
            found[f"{sharding} {name} {kind}"] = attempt(
                lambda given=given, expected=expected: difference(given, None, expected)
            )
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stream_equals_the_export_when_a_model_is_sharded(world_size: int, tmp_path: Path) -> None:
    for found in run_ranks(stream_models, world_size, tmp_path):
        assert_none(found)
        assert len(found) >= 2 * len(MODELS)


def assert_none(found: dict[str, str | Raised | None]) -> None:
    for result in found.values():
        if isinstance(result, Raised):
            result.reraise()
    assert {name: result for name, result in found.items() if result is not None} == {}


MOE_MODELS = ("qwen3_moe", "deepseek_v3")
MOE_PARALLELISMS = ("fsdp", "tp", "fsdp_tp", "ep_fsdp", "ep_fsdp_tp")


def stream_moe_models(rank: int, world_size: int, root: Path) -> dict[str, str | Raised | None]:
    """Stream models of transformers that fuse experts, as the export of the save has them."""
    found = {}
    for name, parallelism in itertools.product(MOE_MODELS, MOE_PARALLELISMS):
        model = parallel_model(name, parallelism, saved=None)
        export = HFExport.from_transformers(model)
        state, expected = model.state_dict(), load_hf(root / name)
        case = f"{name} {parallelism}"
        found[case] = attempt(
            lambda state=state, export=export, expected=expected: difference(
                state, export, expected
            )
        )
        if parallelism.startswith("ep_"):
            found[f"{case} preserved"] = attempt(
                lambda state=state, export=export, expected=expected: experts_difference(
                    state, export, expected
                )
            )
    return found


def experts_difference(state: dict[str, Any], export: HFExport, expected: Found) -> str | None:
    """As `difference`, with the experts of each rank left where they are."""
    place = next(
        value.device_mesh.get_local_rank("ep")
        for value in state.values()
        if isinstance(value, DTensor) and "ep" in (value.device_mesh.mesh_dim_names or ())
    )
    own = {
        key: one
        for key, one in expected.items()
        if (number := expert_of(key)) is None or number // 2 == place
    }
    return difference(state, export, own, preserve="ep")


def expert_of(key: str) -> int | None:
    _, is_expert, rest = key.partition(".experts.")
    return int(rest.partition(".")[0]) if is_expert else None


@pytest.mark.skipif(
    not can_distribute(), reason="transformers shards models so on CPUs, from 5.21 on"
)
def test_stream_equals_save_pretrained_when_experts_are_parallel(tmp_path: Path) -> None:
    for name in MOE_MODELS:
        unsharded(name).save_pretrained(tmp_path / name)
    for found in run_ranks(stream_moe_models, 4, tmp_path):
        assert_none(found)
        assert len(found) == 14


def stacked(name: str, parts: tuple[str, ...], rows: int, columns: int) -> LoadSpec:
    """Say that a stack of experts holds `parts` of each, one after the other."""
    numel = rows * columns
    return LoadSpec(
        name,
        global_shape=(EXPERTS, len(parts) * rows, columns),
        pieces=[
            Piece(f"mlp.{e}.{part}", (rows, columns), ((numel, 1, 1),), 0, i * numel)
            for i, (e, part) in enumerate(itertools.product(range(EXPERTS), parts))
        ],
    )


def moe_specs() -> list[LoadSpec]:
    """Return specs of every form: parts of experts, transposed, padded, joined, cast, tied."""
    half = 3 * HIDDEN
    return [
        stacked("gate_up", ("gate", "up"), ROWS, HIDDEN),
        stacked("down", ("down",), HIDDEN, ROWS),
        LoadSpec(
            "router",
            global_shape=(HIDDEN, EXPERTS),
            pieces=[Piece("gate", (EXPERTS, HIDDEN), ((EXPERTS, HIDDEN, 1), (HIDDEN, 1, EXPERTS)))],
        ),
        LoadSpec("embed", "embed.weight", (12, HIDDEN), origin_shape=(10, HIDDEN)),
        LoadSpec("k", pieces=[Piece("kv", (6, HIDDEN), ((half, 1, 1),))], global_shape=(3, HIDDEN)),
        LoadSpec(
            "v",
            pieces=[Piece("kv", (6, HIDDEN), ((half, 1, 1),), hf_start=half)],
            global_shape=(3, HIDDEN),
        ),
        LoadSpec("norm", "norm.weight", (HIDDEN,), dtype=torch.float32),
        LoadSpec("head", "lm_head.weight", (12, HIDDEN), alias_of="embed.weight"),
    ]


def moe_full() -> Found:
    """Return the whole runtime tensors."""
    return {
        "embed": tensor("embed", 12, HIDDEN),
        "gate_up": tensor("gate_up", EXPERTS, 2 * ROWS, HIDDEN),
        "down": tensor("down", EXPERTS, HIDDEN, ROWS),
        "router": tensor("router", HIDDEN, EXPERTS),
        "k": tensor("k", 3, HIDDEN),
        "v": tensor("v", 3, HIDDEN),
        "q": tensor("q", 6, HIDDEN, dtype=torch.bfloat16),
        "norm": tensor("norm", HIDDEN, dtype=torch.bfloat16),
        "bias": tensor("bias", EXPERTS, dtype=torch.float64),
        "head": tensor("embed", 12, HIDDEN),
    }


def moe_expected(dtype: torch.dtype | None = None) -> Found:
    """Return the HuggingFace tensors, by indexing alone."""
    full = moe_full()
    found = {"embed.weight": full["embed"][:10], "gate": full["router"].T}
    for e in range(EXPERTS):
        found[f"mlp.{e}.gate"] = full["gate_up"][e, :ROWS]
        found[f"mlp.{e}.up"] = full["gate_up"][e, ROWS:]
        found[f"mlp.{e}.down"] = full["down"][e]
    found["kv"] = torch.cat([full["k"], full["v"]])
    found |= {"q": full["q"], "bias": full["bias"]}
    if dtype is not None:
        found = {key: one.to(dtype) for key, one in found.items()}
    return found | {"norm.weight": full["norm"].float()}


FSDP = (Shard(0),)
# As transformers places experts under FSDP and expert or tensor parallelism.
EP = (_StridedShard(0, split_factor=2), Shard(0))
TP = (Shard(0), _StridedShard(1, split_factor=2))
TP_DOWN = (Shard(0), Shard(2))
# Of the other tensors, by FQN: over all ranks, by rows or columns, or on the mesh of the experts.
DENSE: dict[str, tuple[Any, ...]] = {
    "embed": FSDP,
    "router": (Shard(0), Replicate()),
    "k": FSDP,
    "v": (Shard(1), Replicate()),
    "q": (Shard(1),),
    "norm": FSDP,
    "head": FSDP,
}


def moe_state(
    meshes: dict[int, DeviceMesh], experts: dict[str, tuple[Any, ...]]
) -> dict[str, torch.Tensor]:
    placed = {**DENSE, **experts}
    return {
        name: distribute_tensor(one, meshes[len(placed[name])], placed[name], src_data_rank=None)
        if name in placed
        else one
        for name, one in moe_full().items()
    }


def stream_experts(rank: int, world_size: int, root: Path) -> dict[str, str | Raised | None]:
    """Save and stream one model whose experts are sharded in several ways."""
    meshes = {
        1: init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",)),
        2: init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("efsdp", "ep")),
    }
    ways = {
        "ep": {"gate_up": EP, "down": EP},
        "tp": {"gate_up": TP, "down": TP_DOWN},
        "fsdp": {"gate_up": FSDP, "down": FSDP},
        "mixed": {"gate_up": (_StridedShard(1, split_factor=2),), "down": EP},
    }
    specs, found = moe_specs(), {}
    for (way, experts), dtype in itertools.product(ways.items(), (None, torch.bfloat16)):
        state = moe_state(meshes, experts)
        name = f"{way} {dtype}"
        where = root / name.replace(" ", "-")
        writer = HFDualWriter(where, export=HFExport(specs=specs, dtype=dtype))
        dcp.async_save(state, storage_writer=writer, planner=HFSavePlanner(specs)).result()
        expected = load_hf(where / "hf")
        found[f"{name} saved"] = tensor_difference(expected, moe_expected(dtype))
        found[name] = attempt(
            lambda state=state, expected=expected, dtype=dtype: difference(
                state, specs, expected, dtype=dtype
            )
        )
        if way == "ep":
            place = meshes[2].get_local_rank("ep")
            found[f"{name} preserved"] = attempt(
                lambda state=state, expected=expected, dtype=dtype, place=place: (
                    preserved_difference(state, expected, place, dtype=dtype)
                )
            )
    return found


def preserved_difference(
    state: dict[str, Any], expected: Found, place: int, *, dtype: torch.dtype | None
) -> str | None:
    """As `difference`, for the ranks of one place along the dimension of the experts."""
    half = EXPERTS // 2
    kept = [f"mlp.{e}." for e in range(place * half, (place + 1) * half)]
    own = {
        key: one
        for key, one in expected.items()
        if not key.startswith("mlp.") or key.startswith(tuple(kept))
    }
    return difference(state, moe_specs(), own, preserve="ep", dtype=dtype)


def test_stream_equals_the_export_when_experts_are_sharded(tmp_path: Path) -> None:
    results = run_ranks(stream_experts, 4, tmp_path)
    for found in results:
        assert_none(found)
        assert len(found) == 2 * (4 * 2 + 1)


def stream_by_all_gathers(rank: int, world_size: int) -> dict[str, str | Raised | None]:
    """Stream as over NCCL, which gathers in place; gloo can, though it is left out there."""
    from dcp_hf_writer.stream import fill_buckets

    fill_buckets.is_gloo = lambda *_: False
    meshes = {
        1: init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",)),
        2: init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("efsdp", "ep")),
    }
    state = moe_state(meshes, {"gate_up": TP, "down": TP_DOWN})
    return {"gathered": attempt(lambda: difference(state, moe_specs(), moe_expected()))}


def test_stream_is_the_same_when_parts_are_gathered_in_place() -> None:
    for found in run_ranks(stream_by_all_gathers, 4):
        assert_none(found)


def stream_cases(rank: int, world_size: int, root: Path) -> dict[str, str | Raised | None]:
    meshes = {
        (4,): init_device_mesh("cpu", (world_size,)),
        (2, 2): init_device_mesh("cpu", (2, 2)),
    }
    found = {}
    for name in sorted(CASES.keys() - LEFT_OUT):
        case = CASES[name](root)
        state = {"model": case.sharded(meshes), "step": 3}
        sizes = ("1MB",) if name in LARGE else BUCKETS
        found[name] = attempt(
            lambda case=case, state=state, sizes=sizes: difference(
                state, HFExport(**case.export), case.expected(), sizes=sizes
            )
        )
    return found


def test_stream_of_every_state_dict_that_can_be_saved_is_what_ranks_hold(tmp_path: Path) -> None:
    for found in run_ranks(stream_cases, 4, tmp_path):
        assert_none(found)


def stream_by_hand(rank: int, world_size: int) -> dict[str, str | Raised | None]:
    """Stream experts that each rank holds as a plain tensor, in several ways."""
    full, expected = moe_full()["gate_up"], moe_expected()
    expected = {key: one for key, one in expected.items() if key.endswith((".gate", ".up"))}
    spec = stacked("gate_up", ("gate", "up"), ROWS, HIDDEN)

    def cut_as(*shards: ShardSpec) -> LoadSpec:
        return LoadSpec(
            spec.name, global_shape=spec.global_shape, pieces=spec.pieces, shards=shards
        )

    found = {}
    own = full.chunk(world_size)[rank].clone()
    found["all ranks"] = attempt(
        lambda: difference({"gate_up": own}, [cut_as(ShardSpec(0, rank, world_size))], expected)
    )
    # Of two pairs of ranks, each holds all of it: two groups that do not know of one another.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "ep"))
    place = mesh.get_local_rank("ep")
    half, pair = cut_as(ShardSpec(0, place, 2)), full.chunk(2)[place].clone()
    found["pairs"] = attempt(
        lambda: difference({"gate_up": pair}, [half], expected, group=mesh.get_group("ep"))
    )
    # Two ranks hold the same part.
    found["replicas"] = attempt(lambda: difference({"gate_up": pair}, [half], expected))
    # Experts by hand, of which the ranks that share them hold rows of gate and of up.
    rows = [part.chunk(2, 1)[rank // 2] for part in pair.chunk(2, 1)]
    both = torch.cat(rows, 1)
    interleaved = cut_as(ShardSpec(0, place, 2), ShardSpec(1, rank // 2, 2, interleave=2))
    found["interleaved"] = attempt(lambda: difference({"gate_up": both}, [interleaved], expected))
    shared = distribute_tensor(pair, mesh["replicas"], [Shard(1)], src_data_rank=None)
    found["DTensor"] = attempt(lambda: difference({"gate_up": shared}, [half], expected))
    return found


def test_stream_of_tensors_sharded_by_hand_is_the_whole() -> None:
    for found in run_ranks(stream_by_hand, 4):
        assert_none(found)
        assert len(found) == 5


def test_part_that_several_ranks_hold_is_sent_once() -> None:
    first, second = ((ShardSpec(0, i, 2),) for i in range(2))
    # The same rows, said in another way.
    also_second = (ShardSpec(0, 1, 2), ShardSpec(1, 0, 1))
    assert _distinct("w", (4, 2), [first, second, first, also_second]) == (
        first,
        second,
        None,
        None,
    )


def stream_and_keep(rank: int, world_size: int) -> dict[str, Any]:
    """Look at the memory of buckets, and at what closing early leaves."""
    mesh = init_device_mesh("cpu", (world_size,))
    full = {f"w{i}": tensor(f"w{i}", 8, 32) for i in range(6)}
    state = {
        name: distribute_tensor(one, mesh, FSDP, src_data_rank=None) for name, one in full.items()
    }
    nbytes = full["w0"].nbytes
    buckets, changed = [], []
    for bucket in iter_hf_buckets(state, bucket_bytes=nbytes):
        # The one before is still what it was.
        for key, value in itertools.chain.from_iterable(buckets[-1:]):
            changed += [] if torch.equal(value, full[key]) else [key]
        buckets.append(bucket)
    addresses = [bucket[0][1].data_ptr() for bucket in buckets]
    closed = iter_hf_buckets(state, bucket_bytes=nbytes)
    first = next(closed)
    closed.close()
    return {
        "changed": changed,
        "keys": [[key for key, _ in bucket] for bucket in buckets],
        "turns": [addresses[:2] * 3 == addresses, len(set(addresses))],
        "closed": tensor_difference(dict(first), {"w0": full["w0"]}),
        "after": tensor_difference(collect(iter_hf_buckets(state, bucket_bytes=nbytes)), full),
        "tracked": any(value.requires_grad for bucket in buckets for _, value in bucket),
    }


def test_bucket_is_valid_until_the_next_but_one_and_a_stream_may_be_closed() -> None:
    for found in run_ranks(stream_and_keep, 2):
        assert found == {
            "changed": [],
            "keys": [[f"w{i}"] for i in range(6)],
            "turns": [True, 2],
            "closed": None,
            "after": None,
            "tracked": False,
        }


MIB = 1 << 20


def stream_within(rank: int, world_size: int, bucket_bytes: int) -> dict[str, int]:
    """Measure the resident memory of a stream: what it holds, and what it reached."""
    mesh = init_device_mesh("cpu", (world_size,))
    count, rows, columns = 64, 512, 512
    numel = rows // 2 * columns
    shape = (count // world_size, rows, columns)
    local = torch.empty(shape).uniform_()
    stack = DTensor.from_local(local, mesh, FSDP, run_check=False)
    inner = torch.empty((count, rows, columns // world_size)).uniform_()
    wide = DTensor.from_local(inner, mesh, [Shard(2)], run_check=False)
    specs = [
        LoadSpec(
            name,
            global_shape=(count, rows, columns),
            pieces=[
                Piece(f"{name}.{i}", (rows // 2, columns), ((numel, 1, 1),), 0, i * numel)
                for i in range(2 * count)
            ],
        )
        for name in ("stack", "wide")
    ]
    state = {"stack": stack, "wide": wide}
    # Once for what torch and gloo take for themselves.
    for _ in iter_hf_buckets(state, specs, bucket_bytes=bucket_bytes):
        pass
    dist.barrier()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    held = status("VmRSS")
    streamed = 0
    for bucket in iter_hf_buckets(state, specs, bucket_bytes=bucket_bytes):
        streamed += sum(value.nbytes for _, value in bucket)
    return {"streamed": streamed, "more": status("VmHWM") - held}


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("bucket_bytes", [2 * MIB, 8 * MIB])
def test_memory_is_bounded_by_three_buckets(bucket_bytes: int) -> None:
    for found in run_ranks(stream_within, 2, bucket_bytes):
        assert found["streamed"] == 128 * MIB
        assert found["more"] <= 3 * bucket_bytes + 2 * MIB
