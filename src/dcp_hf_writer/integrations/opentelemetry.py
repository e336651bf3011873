"""Spans of saves for OpenTelemetry; needs the extra `otel`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError

if TYPE_CHECKING:
    from dcp_hf_writer.save.finished_save import FinishedSave

_NS = 10**9


class SaveSpans:
    """Makes a span of each finished save; pass it as `report_to=`.

        HFDualWriter(path, report_to=SaveSpans())

    The span covers the time from the beginning of staging to the end of the save. It has one event
    with the seconds of each phase, because a save measures durations, not start times.
    """

    def __init__(self, tracer_provider: Any = None) -> None:
        """Get a tracer.

        Args:
            tracer_provider: A `TracerProvider`; `None` takes the global one.

        Raises:
            ConfigError: If OpenTelemetry is not installed.
        """
        try:
            trace: Any = import_module("opentelemetry.trace")
        except ModuleNotFoundError as error:
            raise ConfigError(
                "SaveSpans needs OpenTelemetry",
                found=f"{error.name} is not installed",
                hint="pip install 'dcp-hf-writer[otel]'",
            ) from error
        self._status = trace.Status, trace.StatusCode
        self._tracer = trace.get_tracer("dcp_hf_writer", tracer_provider=tracer_provider)

    def __call__(self, finished: FinishedSave) -> None:
        """Make the span of a save."""
        ended = int(finished.ended * _NS)
        span = self._tracer.start_span(
            "save checkpoint",
            start_time=ended - int(finished.total_s * _NS),
            attributes=_attributes(finished),
        )
        seconds = {f"{name} s": value for name, value in finished.seconds.items()}
        span.add_event("phases of rank 0", attributes=seconds, timestamp=ended)
        status, code = self._status
        if finished.error is not None:
            span.set_status(status(code.ERROR, finished.error))
        else:
            span.set_status(status(code.OK))
        span.end(end_time=ended)


def _attributes(finished: FinishedSave) -> dict[str, str | int | float]:
    found: dict[str, str | int | float | None] = {
        "checkpoint.path": finished.path,
        "checkpoint.step": finished.step,
        "checkpoint.outcome": finished.outcome,
        "checkpoint.dcp_nbytes": finished.dcp_nbytes,
        "checkpoint.hf_nbytes": finished.hf_nbytes,
        "checkpoint.stall_s": finished.stall_s,
    }
    return {name: value for name, value in found.items() if value is not None}
