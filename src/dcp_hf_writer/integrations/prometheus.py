"""Metrics of saves as a text file that Prometheus' node exporter reads."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from dcp_hf_writer.save.progress_heartbeat import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dcp_hf_writer.save.finished_save import FinishedSave, SaveOutcome

_PREFIX = "dcp_hf_"
_OUTCOMES: Final[tuple[SaveOutcome, ...]] = ("published", "without export", "failed")

Sample = tuple[dict[str, str], float]


class PrometheusTextfile:
    """Writes the metrics of the saves of this process; pass it as `report_to=`.

        HFDualWriter(path, report_to=PrometheusTextfile("/var/lib/node_exporter/train.prom"))

    The file is replaced in one step after each save. Counters begin at zero with the process, as
    counters of Prometheus do. Thread-safe.

    Source:
        Prometheus, "Exposition formats": text format 0.0.4.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, labels: Mapping[str, str] | None = None
    ) -> None:
        """Prepare the metrics; writes nothing.

        Args:
            path: The file; the textfile collector reads files that end with `.prom`.
            labels: Labels of every sample, such as `{"run": "a"}`.
        """
        self.path = os.path.abspath(os.fspath(path))
        self._labels = dict(labels or {})
        self._lock = threading.Lock()
        self._saves: dict[SaveOutcome, int] = dict.fromkeys(_OUTCOMES, 0)
        self._nbytes = {"dcp": 0, "hf": 0}
        self._published: FinishedSave | None = None

    def __call__(self, finished: FinishedSave) -> None:
        """Count a save, and replace the file.

        Raises:
            OSError: If the file cannot be written.
        """
        with self._lock:
            self._saves[finished.outcome] += 1
            self._nbytes["dcp"] += finished.dcp_nbytes
            self._nbytes["hf"] += finished.hf_nbytes
            if finished.outcome != "failed":
                self._published = finished
            replace_file(self.path, self.text(finished).encode())

    def text(self, finished: FinishedSave) -> str:
        """Return the content of the file after a save, in the text format."""
        saves: list[Sample] = [({"outcome": name}, n) for name, n in self._saves.items()]
        nbytes: list[Sample] = [({"half": half}, n) for half, n in self._nbytes.items()]
        phases: list[Sample] = [({"phase": name}, s) for name, s in finished.seconds.items()]
        parts = [
            self._metric("saves_total", "counter", "Saves that ended.", saves),
            self._metric("saved_bytes_total", "counter", "Bytes published.", nbytes),
            self._metric(
                "save_seconds",
                "gauge",
                "Duration of the latest save, from staging to its end.",
                [({}, finished.total_s)],
            ),
            self._metric(
                "save_phase_seconds", "gauge", "Phases of the latest save on rank 0.", phases
            ),
        ]
        if finished.stall_s is not None:
            says = "Time for which the latest save held training up."
            parts.append(
                self._metric("save_stall_seconds", "gauge", says, [({}, finished.stall_s)])
            )
        if self._published is not None:
            parts += self._about_published(self._published)
        return "".join(parts)

    def _about_published(self, published: FinishedSave) -> Iterable[str]:
        says = "When the latest checkpoint was published, in seconds since 1970."
        yield self._metric("published_timestamp_seconds", "gauge", says, [({}, published.ended)])
        if published.step is not None:
            says = "Training step of the latest checkpoint."
            yield self._metric("published_step", "gauge", says, [({}, published.step)])

    def _metric(self, name: str, kind: str, says: str, samples: Iterable[Sample]) -> str:
        full = _PREFIX + name
        lines = [f"# HELP {full} {says}", f"# TYPE {full} {kind}"]
        for labels, value in samples:
            pairs = {**self._labels, **labels}
            inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in pairs.items())
            lines.append(f"{full}{{{inner}}} {value!r}" if inner else f"{full} {value!r}")
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
