"""Encode the manifest `dcp-hf.json`, which lists the files of a checkpoint.

The digests of tensors are in one file per rank (`rank_digests`); the manifest lists these files and
stays small. A save publishes the manifest last: once it is there, the checkpoint is complete.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from dcp_hf_writer.formats.names_on_disk import path_in_export
from dcp_hf_writer.plan.rank_report import DIGEST_NAME, RankReport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcp_hf_writer.plan.layout import Layout
    from dcp_hf_writer.plan.rank_report import DigestsFile

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True)
class WholeFile:
    """A file that the coordinator wrote in one piece."""

    name: str
    """Path within the checkpoint."""
    nbytes: int
    """Its size, in bytes."""
    digest: str
    """xxh3_64 of its bytes, in hex."""


@dataclass(frozen=True, slots=True)
class OtherHalf:
    """The half of a checkpoint that lies in another place; both have the id of the save."""

    holds: Literal["dcp", "hf"]
    """Which half it is."""
    path: str
    """Its directory, absolute, or its URL without credentials."""


def encode_manifest(
    *,
    save_id: str,
    target: str,
    owner: Mapping[str, Any],
    step: int | None,
    subdir: str,
    layout: Layout | None,
    once: Sequence[str] = (),
    reports: Sequence[RankReport],
    whole_files: Sequence[WholeFile],
    seconds: Mapping[str, float],
    export_error: str | None,
    other_half: OtherHalf | None = None,
) -> bytes:
    """Encode the manifest of a checkpoint.

    Args:
        save_id: Id of the save.
        target: Path that the checkpoint is published under.
        owner: Fields that identify the coordinator's process.
        step: Training step, if the path contains it.
        subdir: Directory of the export.
        layout: The export; `None` without one.
        once: FQNs of the tensors that only the export stores.
        reports: The reports of all ranks, one per rank.
        whole_files: Files written in one piece, by path within the checkpoint.
        seconds: Seconds that the coordinator spent in each phase.
        export_error: Why a requested export failed; `None` if it did not, or none was requested.
        other_half: Where the other half lies, if the halves lie apart.

    Returns:
        JSON with one compact line per top-level entry. The last entry is the digest of all bytes
        before it.
    """
    fields: dict[str, Any] = {
        "format": "dcp-hf",
        "version": FORMAT_VERSION,
        "save_id": save_id,
        "target": target,
        "owner": dict(owner),
        "step": step,
        "world_size": len(reports),
        "digest": DIGEST_NAME,
        "nbytes": _total_nbytes(reports, whole_files),
        "timings": {
            "coordinator": _rounded(seconds),
            "ranks": [
                {"rank": r.rank, "host": r.host, **_rounded(r.seconds)} for r in _by_rank(reports)
            ],
        },
        "files": {file.name: [file.nbytes, file.digest] for file in whole_files},
        "dcp": {
            file.name: {"nbytes": file.nbytes, "rest": file.rest, "rank": report.rank}
            for report in _by_rank(reports)
            for file in report.dcp_files
        },
        "once": list(once),
        "hf": None if layout is None else _export(layout, subdir),
        "digests": {
            report.digests.name: _digests_entry(report, report.digests, layout)
            for report in _by_rank(reports)
            if report.digests is not None
        },
        "export_error": export_error,
    }
    if other_half is not None:
        fields["other_half"] = {"holds": other_half.holds, "path": other_half.path}
    return _encode(fields)


def _encode(fields: Mapping[str, Any]) -> bytes:
    lines = (
        f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'), ensure_ascii=False)}"
        for name, value in fields.items()
    )
    above = ("{\n" + ",\n".join(lines) + ",\n").encode()
    return above + f'"digest_above": "{xxhash.xxh3_64_hexdigest(above)}"\n}}\n'.encode()


def _export(layout: Layout, subdir: str) -> dict[str, Any]:
    return {
        "subdir": subdir,
        "tied": dict(layout.tied),
        "files": {
            file.name: {
                "nbytes": file.nbytes,
                "header_nbytes": len(file.header),
                "header": xxhash.xxh3_64_hexdigest(file.header),
            }
            for file in layout.files
        },
    }


def _digests_entry(report: RankReport, file: DigestsFile, layout: Layout | None) -> dict[str, Any]:
    # A rank may have written blocks of an export that failed later.
    has_blocks = layout is not None and file.hf_files is not None
    return {
        "rank": report.rank,
        "nbytes": file.nbytes,
        "digest": file.digest,
        "hf_files": file.hf_files if has_blocks else None,
        "hf_nbytes": file.hf_nbytes if has_blocks else 0,
    }


def _by_rank(reports: Sequence[RankReport]) -> list[RankReport]:
    return sorted(reports, key=lambda report: report.rank)


def _total_nbytes(
    reports: Sequence[RankReport], whole_files: Sequence[WholeFile]
) -> dict[str, int]:
    total = {"other": sum(file.nbytes for file in whole_files), "digests": 0}
    for report in reports:
        total["digests"] += 0 if report.digests is None else report.digests.nbytes
        for half, nbytes in report.nbytes.items():
            total[half] = total.get(half, 0) + nbytes
    return total


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {phase: round(value, 4) for phase, value in seconds.items()}


def without_export(manifest: bytes) -> bytes:
    """Return the manifest of the same checkpoint without its export, with a new digest.

    Args:
        manifest: A manifest that `parse_manifest` accepts.
    """
    fields = json.loads(manifest)
    export = fields.get("hf")
    if export is None:
        return manifest
    below = path_in_export(export["subdir"], "")
    fields["files"] = {
        name: file for name, file in fields["files"].items() if not name.startswith(below)
    }
    fields["nbytes"]["other"] = sum(nbytes for nbytes, _ in fields["files"].values())
    fields["nbytes"].pop("hf", None)
    fields["hf"] = None
    for entry in fields.get("digests", {}).values():
        entry |= {"hf_files": None, "hf_nbytes": 0}
    fields.pop("digest_above")
    return _encode(fields)
