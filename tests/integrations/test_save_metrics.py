"""Prometheus' and OpenTelemetry's own code reads what `report_to=` helpers write."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import FinishedSave, HFDualWriter
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.integrations.opentelemetry import SaveSpans
from dcp_hf_writer.integrations.prometheus import PrometheusTextfile
from support.small_states import state_of

if TYPE_CHECKING:
    from pathlib import Path

SAVE = FinishedSave(
    path="/run/step-7",
    step=7,
    outcome="published",
    error=None,
    dcp_nbytes=100,
    hf_nbytes=50,
    stall_s=0.25,
    total_s=2.0,
    seconds={"plan": 0.5, "write dcp": 1.0},
    ended=1000.5,
)
FAILED = replace(SAVE, outcome="failed", error="WriteError: x", dcp_nbytes=0, hf_nbytes=0, step=8)


def samples(path: Path) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Read a file with the parser of Prometheus' client."""
    parser = pytest.importorskip("prometheus_client.parser")
    families = parser.text_string_to_metric_families(path.read_text())
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in families
        for one in family.samples
    }


def test_textfile_counts_saves_and_tells_of_the_latest(tmp_path: Path) -> None:
    path = tmp_path / "train.prom"
    hook = PrometheusTextfile(path, labels={"run": 'a "b"\\c\nd'})
    hook(SAVE)
    hook(FAILED)
    found = samples(path)
    run = ("run", 'a "b"\\c\nd')

    def value(name: str, **labels: str) -> float:
        return found["dcp_hf_" + name, frozenset({run, *labels.items()})]

    assert value("saves_total", outcome="published") == 1
    assert value("saves_total", outcome="failed") == 1
    assert value("saves_total", outcome="without export") == 0
    assert value("saved_bytes_total", half="dcp") == 100
    assert value("saved_bytes_total", half="hf") == 50
    assert value("save_seconds") == 2
    assert value("save_stall_seconds") == 0.25
    assert value("save_phase_seconds", phase="write dcp") == 1
    assert value("published_step") == 7
    assert value("published_timestamp_seconds") == 1000.5
    assert [one.name for one in tmp_path.iterdir()] == ["train.prom"]


def test_textfile_of_a_real_save_is_valid(tmp_path: Path) -> None:
    hook = PrometheusTextfile(tmp_path / "train.prom")
    writer = HFDualWriter(tmp_path / "step-7", report_to=hook)
    dcp.async_save(state_of(1), storage_writer=writer, no_dist=True).result(60)
    found = samples(tmp_path / "train.prom")
    assert found["dcp_hf_published_step", frozenset()] == 7
    assert found["dcp_hf_saves_total", frozenset({("outcome", "published")})] == 1


def test_spans_of_saves_have_times_attributes_and_status() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    hook = SaveSpans(provider)
    hook(SAVE)
    hook(FAILED)
    good, bad = exporter.get_finished_spans()
    assert good.name == "save checkpoint"
    assert (good.start_time, good.end_time) == (998_500_000_000, 1_000_500_000_000)
    assert good.attributes == {
        "checkpoint.path": "/run/step-7",
        "checkpoint.step": 7,
        "checkpoint.outcome": "published",
        "checkpoint.dcp_nbytes": 100,
        "checkpoint.hf_nbytes": 50,
        "checkpoint.stall_s": 0.25,
    }
    (event,) = good.events
    assert event.attributes == {"plan s": 0.5, "write dcp s": 1.0}
    assert (good.status.is_ok, bad.status.is_ok) == (True, False)
    assert bad.status.description == "WriteError: x"


def test_spans_without_opentelemetry_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry", "opentelemetry.trace"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'dcp-hf-writer\[otel\]'"):
        SaveSpans()
