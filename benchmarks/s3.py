"""Measure a save of both formats to S3 beside torch's own writer, all in one run.

    python benchmarks/s3.py --gib 0.5 --rounds 5

Two ranks save one state dict to `rclone serve s3` on the loopback interface, which keeps it in
memory (`--root`). The contenders take turns, as in `save.py`; the first round is not counted.

- `ours`: `async_save` with `HFDualWriter`, DCP and HuggingFace;
- `torch`: `async_save` with `FsspecWriter` over s3fs, DCP only;
- `floor`: the bytes of both formats as one object per rank and format, by the client that s3fs
  uses, in parts of 64 MiB, 8 at a time, without digests of our own.

Requests are those that the ranks send. Peak memory is above what a rank held before the save, in
the run of all contenders: a contender reuses what others have freed. So it is an upper bound for
the first that needs memory, and the first round counts for it too.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from machine import describe_machine, held, peak_rss_nbytes, reset_peak
from ranks import Rank, run_ranks
from states import Workload, build_state_dict

# The servers are those of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.s3_servers import S3Bucket, serving

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = 2
PART_NBYTES = 64 << 20
IN_FLIGHT = 8
CONTENDERS = ("ours", "torch", "floor")


@dataclass
class Figures:
    """What the saves of one contender took; the slowest or largest rank of each."""

    total_s: list[float] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)
    requests: int = 0
    written: int = 0
    peak: int = 0


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, default=0.5, help="size of the weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--root", default="/dev/shm", help="directory that rclone serves")  # noqa: S108
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    workload = Workload(options.gib, "bfloat16", "fsdp", optim=False)
    print(f"{describe_machine(options.root)}, load {os.getloadavg()[0]:.1f}")
    print(f"{workload.describe()}; {RANKS} ranks, {options.rounds} rounds, medians\n")
    figures = {name: Figures() for name in CONTENDERS}

    def take(_: int, facts: dict[str, Any]) -> None:
        one = figures[facts["name"]]
        one.requests, one.written = facts["requests"], facts["written"]
        one.peak = max(one.peak, facts["peak"])
        if facts["round"] > 0:
            one.total_s.append(facts["total_s"])
            one.stall_s.append(facts["stall_s"])

    # rclone keeps no digest of an object: for each listing, it would read and hash all of them.
    with serving("rclone", "--etag-hash", "", root=options.root) as server:
        bucket = server.new_bucket()
        run_ranks(
            measure, workload, bucket, options.rounds, world_size=RANKS, timeout_s=3600,
            on_event=take,
        )  # fmt: skip
    show(figures)
    if options.json:
        facts = {name: vars(one) for name, one in figures.items()}
        Path(options.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def show(figures: dict[str, Figures]) -> None:
    """Print the table, and the bars of issue 10."""
    print("         total s   p95 s  stall s   GB/s  requests  written GB  peak GB")
    for name, one in figures.items():
        total = statistics.median(one.total_s)
        worst = sorted(one.total_s)[min(len(one.total_s) - 1, round(0.95 * len(one.total_s)))]
        print(
            f"{name:8}{total:8.2f}{worst:8.2f}{statistics.median(one.stall_s):9.3f}"
            f"{one.written / total / 1e9:7.2f}{one.requests:10}{one.written / 1e9:12.2f}"
            f"{one.peak / 1e9:9.2f}"
        )
    rate = {name: one.written / statistics.median(one.total_s) for name, one in figures.items()}
    total = {name: statistics.median(one.total_s) for name, one in figures.items()}
    print(f"\nrate of the floor: {rate['ours'] / rate['floor']:.2f}x (bar: >= 0.8x)")
    print(f"time of torch, DCP only: {total['ours'] / total['torch']:.2f}x (bar: <= 1.0x)")


def measure(rank: Rank, workload: Workload, bucket: S3Bucket, rounds: int) -> None:
    """Body of a rank: all contenders in turns; rank 0 reports each save."""
    state_dict = build_state_dict(workload, init_device_mesh("cpu", (rank.world_size,)))
    sent = count_requests()
    saves = {"ours": _Ours(bucket), "torch": _Torch(bucket), "floor": _Floor(bucket, state_dict)}
    for number in range(rounds + 1):
        turn = number % len(CONTENDERS)
        for name in CONTENDERS[turn:] + CONTENDERS[:turn]:
            gc.collect()
            base = held().rss_nbytes if reset_peak() else 0
            before = sent()
            dist.barrier()
            stall, total = saves[name](state_dict, f"{name}-{number}")
            peak = peak_rss_nbytes() - base if base else 0
            facts: list[Any] = [None] * rank.world_size
            dist.all_gather_object(facts, (stall, total, sent() - before, peak))
            if rank.rank == 0:
                rank.emit(
                    name=name, round=number, stall_s=max(one[0] for one in facts),
                    total_s=max(one[1] for one in facts), requests=sum(one[2] for one in facts),
                    peak=max(one[3] for one in facts), written=empty(bucket),
                )  # fmt: skip
            dist.barrier()


def count_requests() -> Callable[[], int]:
    """Count the requests that this process sends by aiobotocore; return a reader of the count."""
    from aiobotocore.httpsession import AIOHTTPSession  # noqa: PLC0415 - in the ranks only

    send, count = AIOHTTPSession.send, [0]

    async def counted(self: Any, request: Any) -> Any:
        count[0] += 1
        return await send(self, request)

    AIOHTTPSession.send = counted
    return lambda: count[0]


def empty(bucket: S3Bucket) -> int:
    """Delete all objects; return how many bytes they had."""
    client = bucket.client()
    nbytes = 0
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name):
        for entry in page.get("Contents", ()):
            nbytes += entry["Size"]
            client.delete_object(Bucket=bucket.name, Key=entry["Key"])
    return nbytes


class _Ours:
    def __init__(self, bucket: S3Bucket) -> None:
        from dcp_hf_writer import HFExport  # noqa: PLC0415 - in the ranks only

        config = {"config.json": json.dumps({"model_type": "qwen2"}).encode()}
        self._bucket, self._export = bucket, HFExport(assets=config)

    def __call__(self, state_dict: dict[str, Any], name: str) -> tuple[float, float]:
        from dcp_hf_writer import HFDualWriter  # noqa: PLC0415 - in the ranks only

        writer = HFDualWriter(
            f"{self._bucket.url}/{name}",
            export=self._export,
            storage_options=self._bucket.storage_options,
        )
        return _timed(lambda: dcp.async_save(state_dict, storage_writer=writer))


def _fsspec_writer() -> Any:
    """Torch's own writer to fsspec stores; its module has another name since torch 2.15."""
    package = "torch.distributed.checkpoint"
    name = f"{package}.fsspec_filesystem"
    if importlib.util.find_spec(name) is None:
        name = f"{package}._fsspec_filesystem"
    return importlib.import_module(name).FsspecWriter


class _Torch:
    def __init__(self, bucket: S3Bucket) -> None:
        self._bucket = bucket

    def __call__(self, state_dict: dict[str, Any], name: str) -> tuple[float, float]:
        writer_class = _fsspec_writer()
        url = f"{self._bucket.url}/{name}"
        writer = writer_class(url, **self._bucket.storage_options)
        return _timed(lambda: dcp.async_save(state_dict, storage_writer=writer))


def _timed(save: Callable[[], Any]) -> tuple[float, float]:
    start = time.perf_counter()
    future = save()
    stall = time.perf_counter() - start
    future.result()
    return stall, time.perf_counter() - start


class _Floor:
    """Uploads this rank's bytes twice, without any of what makes a checkpoint of them."""

    def __init__(self, bucket: S3Bucket, state_dict: dict[str, Any]) -> None:
        import s3fs  # noqa: PLC0415 - in the ranks only

        self._bucket = bucket
        self._fs = s3fs.S3FileSystem(
            **bucket.storage_options, skip_instance_cache=True, use_listings_cache=False
        )
        local = (tensor.to_local() for tensor in state_dict["model"].values())
        self._nbytes = sum(one.numel() * one.itemsize for one in local)
        self._data = bytearray(os.urandom(1 << 20) * (self._nbytes // (1 << 20) + 1))

    def __call__(self, state_dict: dict[str, Any], name: str) -> tuple[float, float]:  # noqa: ARG002
        start = time.perf_counter()
        snapshot = memoryview(bytes(memoryview(self._data)[: self._nbytes]))
        stall = time.perf_counter() - start
        with ThreadPoolExecutor(2) as threads:
            keys = [f"{name}/{half}-{dist.get_rank()}" for half in ("dcp", "hf")]
            list(threads.map(lambda key: self._upload(key, snapshot), keys))
        dist.barrier()
        return stall, time.perf_counter() - start

    def _upload(self, key: str, data: memoryview) -> None:
        upload = asyncio.run_coroutine_threadsafe(self._send(key, data), self._fs.loop)
        upload.result()

    async def _send(self, key: str, data: memoryview) -> None:
        client = await self._fs.set_session()
        names = {"Bucket": self._bucket.name, "Key": key}
        begun = await client.create_multipart_upload(**names)
        names["UploadId"] = begun["UploadId"]
        places = asyncio.Semaphore(IN_FLIGHT // 2)

        async def part(number: int, start: int) -> dict[str, Any]:
            async with places:
                body = bytes(data[start : start + PART_NBYTES])
                sent = await client.upload_part(**names, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": sent["ETag"]}

        starts = range(0, len(data), PART_NBYTES)
        parts = await asyncio.gather(*(part(n, start) for n, start in enumerate(starts, 1)))
        await client.complete_multipart_upload(**names, MultipartUpload={"Parts": parts})


if __name__ == "__main__":
    main()
