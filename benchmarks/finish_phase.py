"""The finish phase of the coordinator for DeepSeek-V3 with Adam, on simulated ranks.

    python benchmarks/planning.py --finish --fsdp 16

Each rank holds its shards of the float32 weights and of Adam's two moments; the export casts the
weights to bfloat16. The ranks report as real ones do: the real code makes their blocks, digests
files and reports, and each report goes through pickle. Only the bytes of the tensors are not there,
so the digests are arbitrary numbers.

Python collects no garbage meanwhile: most of its time would go into the millions of items that the
simulation holds for all ranks, and not into what is measured.
"""

from __future__ import annotations

import dataclasses
import gc
import pickle
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

import deepseek
from dcp_hf_writer import HFExport
from dcp_hf_writer.plan.coverage import check_coverage
from dcp_hf_writer.plan.encode_manifest import WholeFile, encode_manifest
from dcp_hf_writer.plan.global_plan import GlobalPlan, plan_globally, rank_plans
from dcp_hf_writer.plan.rank_digests import pack_report
from dcp_hf_writer.plan.rank_report import DCPFile, RankReport
from dcp_hf_writer.preflight.rank_facts import check_facts
from dcp_hf_writer.save.hf_half import block_of, nbytes_of_blocks, regions_by_file
from machine import held, peak_rss_nbytes, reset_peak

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.distributed.checkpoint.planner import SavePlan, WriteItem

MOMENTS = ("exp_avg", "exp_avg_sq")
PHASES = ("slot wait", "write dcp", "write hf", "sync", "stage", "stage wait", "plan", "prepare")


@dataclass(slots=True)
class Traffic:
    """Pickled bytes that each rank exchanges with the coordinator; one number a rank."""

    plan_ours: list[int] = field(default_factory=list)
    """Of the plan that a rank gets, what we add to DCP's part."""
    plan_dcp: list[int] = field(default_factory=list)
    """Of the plan that a rank gets, DCP's part."""
    report: list[int] = field(default_factory=list)
    """The report that a rank sends."""
    results_dcp: list[int] = field(default_factory=list)
    """DCP's results, which a rank sends beside its report."""
    digests: list[int] = field(default_factory=list)
    """The digests file of a rank; it goes to storage, not to the coordinator."""


def with_adam(plans: Iterator[SavePlan]) -> Iterator[SavePlan]:
    """Yield the plans of ranks that hold float32 weights, and two moments of each."""
    names: dict[tuple[str, str], str] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for rank, plan in enumerate(plans):
        weights = [_as_float32(item) for item in plan.items]
        items = list(weights)
        for moment in MOMENTS:
            for item in weights:
                name = (moment, item.index.fqn)
                if name not in names:
                    fqn = names[name] = f"optim.state.{item.index.fqn[6:]}.{moment}"
                    paths[fqn] = ("optim", "state", item.index.fqn[6:], moment)
                index = dataclasses.replace(item.index, fqn=names[name])
                items.append(dataclasses.replace(item, index=index))
        facts = plan.storage_data
        if rank == 0:
            paths = {**plan.planner_data, **paths}
            facts = dataclasses.replace(facts, order=tuple(paths))
        yield dataclasses.replace(plan, items=items, planner_data=paths, storage_data=facts)


def print_finish(layers: int, mesh: deepseek.Mesh) -> None:
    """Print seconds, memory and traffic of one save, from the plans to the manifest."""
    gc.disable()
    specs = deepseek.compile_specs(deepseek.expert_pieces(layers))
    export = HFExport(specs=specs, dtype=torch.bfloat16)
    plans = [
        pickle.loads(pickle.dumps(plan))  # noqa: S301
        for plan in with_adam(deepseek.local_plans(layers, mesh))
    ]
    items = sum(len(plan.items) for plan in plans)
    bare = [dataclasses.replace(plan, storage_data=None) for plan in plans]
    plan, prepared, planning = _planned(plans, bare, export)
    layout = plan.layout
    assert layout is not None
    traffic, sent = _reports(prepared, bare)
    del plans, bare, prepared
    plan = dataclasses.replace(plan, plans=[])
    # While a job writes, its coordinator keeps the plan; the peak counts from here.
    gc.collect()
    reset_peak()
    before = held().rss_nbytes
    reports, gathered_s = _timed(lambda: [pickle.loads(data) for data in sent])  # noqa: S301
    _, coverage_s = _timed(lambda: check_coverage(layout, reports))
    manifest, manifest_s = _timed(lambda: _manifest(plan, reports))
    peak = peak_rss_nbytes() - before
    blocks = sum(len(report.columns) for report in reports)
    keys = sum(len(file.keys) for file in layout.files)
    print(
        f"\nfinish phase: {mesh.size:,} ranks, {items:,} items, {blocks:,} blocks of {keys:,} "
        f"HuggingFace tensors in {len(layout.files)} files"
    )
    print(f"  planning            {planning[0]:>8.2f} s  {planning[1] / (1 << 20):>8.0f} MiB above")
    print(f"  reports unpickled   {gathered_s:>8.2f} s")
    print(f"  coverage            {coverage_s:>8.2f} s")
    print(f"  manifest            {manifest_s:>8.2f} s")
    print(f"  peak of these three            {peak / (1 << 20):>8.0f} MiB above")
    print(f"  dcp-hf.json         {len(manifest) / 1e6:>8.3f} MB")
    print(f"  digests files       {sum(traffic.digests) / 1e6:>8.1f} MB in all")
    _print_traffic(traffic)
    print("  bar: coverage + manifest <= 5 s, peak < 1,024 MiB, dcp-hf.json < 1 MB")


def _planned(
    plans: list[SavePlan], bare: list[SavePlan], export: HFExport
) -> tuple[GlobalPlan, list[SavePlan], tuple[float, int]]:
    """Plan; the plan, the ranks' plans, and the seconds and bytes of memory that it took."""
    gc.collect()
    reset_peak()
    before = held().rss_nbytes

    def work() -> tuple[GlobalPlan, list[SavePlan]]:
        check_facts(plans)
        plan = plan_globally(plans, export, options="", file_of_key=None)
        return plan, rank_plans(plan, bare)

    (plan, prepared), seconds = _timed(work)
    return plan, prepared, (seconds, peak_rss_nbytes() - before)


def _reports(prepared: Sequence[SavePlan], bare: Sequence[SavePlan]) -> tuple[Traffic, list[bytes]]:
    """Return the traffic of all ranks, and their pickled reports."""
    traffic, sent = Traffic(), []
    for rank, (plan, dcp) in enumerate(zip(prepared, bare, strict=True)):
        theirs = len(pickle.dumps(dcp))
        traffic.plan_dcp.append(theirs)
        traffic.plan_ours.append(len(pickle.dumps(plan)) - theirs)
        file, results = _dcp_half(rank, plan.items)
        traffic.results_dcp.append(len(pickle.dumps(results)))
        report = RankReport(rank, f"host{rank // 8}", dcp_files=[file])
        work = regions_by_file(plan.items, plan.storage_data.targets)
        for blocks in work.values():
            report.blocks += [
                block_of(region, f"{hash((rank, number)) % (1 << 64):016x}")
                for number, (_, region) in enumerate(blocks)
            ]
            report.nbytes["hf"] = report.nbytes.get("hf", 0) + nbytes_of_blocks(blocks)
        report.nbytes["dcp"] = file.nbytes
        report.seconds = dict.fromkeys(PHASES, 1.2345678)
        traffic.digests.append(len(pack_report(report, plan.storage_data.targets)))
        sent.append(pickle.dumps(report))
        traffic.report.append(len(sent[-1]))
    return traffic, sent


def _dcp_half(rank: int, items: Sequence[WriteItem]) -> tuple[DCPFile, list[WriteResult]]:
    """Return the DCP file of a rank, and DCP's results."""
    name, ranges, results, start = f"__{rank}_0.distcp", [], [], 0
    for item in items:
        nbytes = item.tensor_data.chunk.sizes.numel() * 4
        ranges.append((start + 640, nbytes, f"{hash((rank, start)) % (1 << 64):016x}"))
        results.append(WriteResult(item.index, nbytes, _StorageInfo(name, start, nbytes + 1024)))
        start += nbytes + 1024
    return DCPFile(name, start, tuple(ranges), "0" * 16), results


def _manifest(plan: GlobalPlan, reports: Sequence[RankReport]) -> bytes:
    return encode_manifest(
        save_id="20260101T000000-00000000-1-000000000000",
        target="/checkpoints/run/step-100",
        owner={"host": "host0", "pid": 1},
        step=100,
        subdir="hf",
        layout=plan.layout,
        reports=reports,
        whole_files=[WholeFile(".metadata", 1, "0" * 16)],
        seconds=dict.fromkeys(PHASES, 1.2345678),
        export_error=None,
    )


def _print_traffic(traffic: Traffic) -> None:
    print("  kB of each rank, pickled: median, most, all ranks together in MB")
    rows: Mapping[str, list[int]] = {
        "to the rank, our part of its plan": traffic.plan_ours,
        "to the rank, DCP's part": traffic.plan_dcp,
        "from the rank, our report": traffic.report,
        "from the rank, DCP's results": traffic.results_dcp,
    }
    for what, sizes in rows.items():
        print(
            f"    {what:<36} {statistics.median(sizes) / 1e3:>8.1f} {max(sizes) / 1e3:>8.1f} "
            f"{sum(sizes) / 1e6:>8.1f}"
        )


def _as_float32(item: WriteItem) -> WriteItem:
    data = item.tensor_data
    properties = dataclasses.replace(data.properties, dtype=torch.float32)
    return dataclasses.replace(item, tensor_data=dataclasses.replace(data, properties=properties))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    gc.collect()
    began = time.process_time()
    found = work()
    return found, time.process_time() - began
