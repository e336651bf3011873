"""`inspect`: what a checkpoint holds: tensors, dtypes, files, and who wrote what."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dcp_hf_writer.check.check_dcp import items_by_file
from dcp_hf_writer.cli import exit_codes
from dcp_hf_writer.cli.key_pattern import compile_pattern
from dcp_hf_writer.cli.plain_text import count, duration, shape, size
from dcp_hf_writer.cli.run_command import Outcome, line, line_of_rest, print_table, row, table
from dcp_hf_writer.digests.stored_digests import StoredDigests
from dcp_hf_writer.formats.names_on_disk import METADATA_NAME, rank_of_dcp_file
from dcp_hf_writer.formats.parse_dcp_metadata import paths_in
from dcp_hf_writer.formats.weights_once_places import StoredOnce
from dcp_hf_writer.load.choose_half import find_place, has_weights, read_dcp_metadata
from dcp_hf_writer.load.hf_directory import open_hf_directory
from dcp_hf_writer.load.read_manifest import manifest_of
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.open_inputs import OpenInputs
from dcp_hf_writer.storage.wrong_paths import wrong_path_errors

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Mapping

    from rich.console import Console
    from torch.distributed.checkpoint.metadata import Metadata

    from dcp_hf_writer.load.hf_directory import HFDirectory
    from dcp_hf_writer.plan.manifest import Manifest
    from dcp_hf_writer.storage.input_contract import InputFiles

_FILES_SHOWN = 20


def inspect_checkpoint(path: str, pattern: str | None) -> Outcome:
    """Describe both halves; with `pattern`, also each tensor whose name matches it.

    Raises:
        ConfigError: If `path` or `pattern` cannot be used.
        ReadError: If there is no checkpoint, or a file cannot be read.
        CorruptCheckpointError: If metadata, manifest or a header is damaged.
    """
    matches = compile_pattern(pattern)
    files = open_directory(path)
    with wrong_path_errors(files.path, path):
        names = files.names()
    metadata = read_dcp_metadata(files) if METADATA_NAME in names else None
    manifest = manifest_of(files)
    directory, subdir = _export(path, files, manifest, is_dcp=metadata is not None)
    sizes = files.tree()
    value: dict[str, Any] = {
        "path": files.path,
        "save": None if manifest is None else _save(manifest),
        "dcp": None if metadata is None else _dcp(metadata, manifest, sizes),
        "hf": None if directory is None else _hf(directory, subdir, sizes),
        "ranks": [] if manifest is None else bytes_by_rank(manifest),
        "tensors": None,
    }
    if matches is None:
        return Outcome(value, exit_codes.PROBLEM if _lacks_dcp(value) else exit_codes.OK)
    found = [
        *([] if metadata is None else _dcp_tensors(metadata, matches)),
        *([] if directory is None else _hf_tensors(directory, files, manifest, matches)),
    ]
    value["tensors"] = found
    return Outcome(value, exit_codes.OK if found else exit_codes.PROBLEM)


def _lacks_dcp(value: dict[str, Any]) -> bool:
    """Whether the manifest tells of a DCP half, and DCP's metadata is missing."""
    return value["dcp"] is None and any(one["dcp_nbytes"] for one in value["ranks"])


def _export(
    path: str, files: InputFiles, manifest: Manifest | None, *, is_dcp: bool
) -> tuple[HFDirectory | None, str]:
    """Open the HuggingFace half, if there is one."""
    if is_dcp:
        subdir = "hf" if manifest is None or manifest.hf is None else manifest.hf.subdir
        if not has_weights(files.below(subdir)):
            return None, ""
    place = find_place(path, "hf", None, with_manifest=False)
    with OpenInputs(place.weights) as inputs:
        return open_hf_directory(inputs, only=place.only), place.subdir or ""


def _save(manifest: Manifest) -> dict[str, Any]:
    return {
        "save_id": manifest.save_id,
        "target": manifest.target,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "export_error": manifest.export_error,
        "seconds": dict(manifest.seconds),
        "weights_once": len(manifest.once),
        "tied": {} if manifest.hf is None else dict(manifest.hf.tied),
        "other_half": None if manifest.other_half is None else manifest.other_half.path,
    }


def _dcp(metadata: Metadata, manifest: Manifest | None, sizes: Mapping[str, int]) -> dict[str, Any]:
    entries: dict[str, dict[str, Any]] = {}
    paths = paths_in(metadata)
    for fqn, stored in metadata.state_dict_metadata.items():
        top = str(paths[fqn][0]) if paths.get(fqn) else fqn.partition(".")[0]
        entry = entries.setdefault(top, _no_tensors())
        if not isinstance(stored, TensorStorageMetadata):
            entry["values"] += 1
            continue
        numel, dtype = math.prod(stored.size), str(stored.properties.dtype).removeprefix("torch.")
        _add(entry, dtype, numel, numel * stored.properties.dtype.itemsize)
        entry["chunks"] += len(stored.chunks)
    files = [
        {"name": name, "nbytes": sizes.get(name, 0), "items": len(items), "rank": _rank_of(name)}
        for name, items in sorted(items_by_file(metadata).items())
    ]
    return {"entries": entries, "files": files, "has_manifest": manifest is not None}


def _hf(directory: HFDirectory, subdir: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    total = _no_tensors()
    for header in directory.headers.values():
        for tensor in header.tensors.values():
            _add(total, tensor.dtype, math.prod(tensor.shape), tensor.nbytes)
    below = f"{subdir}/" if subdir else ""
    files = [
        {"name": below + name, "nbytes": sizes.get(below + name, 0), "tensors": len(header.tensors)}
        for name, header in directory.headers.items()
    ]
    config = directory.config or {}
    architectures = [str(name) for name in config.get("architectures") or []]
    return {**total, "subdir": subdir, "files": files, "architectures": architectures}


def _no_tensors() -> dict[str, Any]:
    return {"tensors": 0, "parameters": 0, "nbytes": 0, "dtypes": {}, "chunks": 0, "values": 0}


def _add(total: dict[str, Any], dtype: str, numel: int, nbytes: int) -> None:
    total["tensors"] += 1
    total["parameters"] += numel
    total["nbytes"] += nbytes
    total["dtypes"][dtype] = total["dtypes"].get(dtype, 0) + 1


def bytes_by_rank(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the bytes that each rank wrote: what the manifest says."""
    dcp, export = Counter[int](), Counter[int]()
    for name, file in manifest.dcp.items():
        owner = _rank_of(name)
        if owner is not None:
            dcp[owner] += file.nbytes
    for part in manifest.digests:
        export[part.rank] += part.hf_nbytes
    for one in () if manifest.hf is None else manifest.hf.files.values():
        for tensor in (one.tensors or {}).values():
            for block in tensor.blocks:
                if block.runs is not None:
                    export[block.rank] += block.runs.count * block.runs.nbytes
    ranks = range(manifest.world_size)
    return [{"rank": n, "dcp_nbytes": dcp[n], "hf_nbytes": export[n]} for n in ranks]


def _rank_of(name: str) -> int | None:
    return rank_of_dcp_file(name.rpartition("/")[2])


def _dcp_tensors(metadata: Metadata, matches: re.Pattern[str]) -> Iterable[dict[str, Any]]:
    places: dict[str, list[dict[str, Any]]] = {}
    for index, where in (metadata.storage_data or {}).items():
        if not matches.search(index.fqn):
            continue
        is_once = isinstance(where, StoredOnce)
        name = ", ".join(sorted({p.path for p in where.parts})) if is_once else where.relative_path
        place = {
            "offsets": None if index.offset is None else list(index.offset),
            "file": name,
            "start": None if is_once else where.offset,
            "nbytes": where.nbytes if is_once else where.length,
            "rank": _rank_of(name),
        }
        places.setdefault(index.fqn, []).append(place)
    for fqn, stored in metadata.state_dict_metadata.items():
        if matches.search(fqn):
            sizes, dtype = None, None
            if isinstance(stored, TensorStorageMetadata):
                sizes = list(stored.size)
                dtype = str(stored.properties.dtype).removeprefix("torch.")
            found = {"half": "dcp", "name": fqn, "shape": sizes, "dtype": dtype}
            yield {**found, "places": places.get(fqn, [])}


def _hf_tensors(
    directory: HFDirectory,
    files: InputFiles,
    manifest: Manifest | None,
    matches: re.Pattern[str],
) -> Iterable[dict[str, Any]]:
    listed = {} if manifest is None or manifest.hf is None else manifest.hf.files
    shown = {
        file
        for file, header in directory.headers.items()
        if file in listed and any(map(matches.search, header.tensors))
    }
    known = {} if manifest is None else StoredDigests(files, manifest).blocks(shown)
    for file, header in directory.headers.items():
        for key, tensor in header.tensors.items():
            if not matches.search(key):
                continue
            stop = tensor.start + tensor.nbytes
            writers = known[file].ranks_in(tensor.start, stop) if file in known else []
            place = {"offsets": None, "file": file, "start": tensor.start, "nbytes": tensor.nbytes}
            places = [{**place, "rank": rank} for rank in writers] or [{**place, "rank": None}]
            yield {
                "half": "hf",
                "name": key,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "places": places,
            }


def show_checkpoint(value: dict[str, Any], console: Console) -> None:
    """Print the description for people."""
    line(console, value["path"], "bold")
    if value["save"] is not None:
        _show_save(value["save"], console)
    if value["tensors"] is not None:
        _show_tensors(value["tensors"], console)
        return
    if value["dcp"] is not None:
        _show_dcp(value["dcp"], console)
    elif _lacks_dcp(value):
        line(console, f"\nDCP half: {METADATA_NAME} is missing, so nothing can load it", "bold red")
    if value["hf"] is not None:
        _show_hf(value["hf"], console)
    elif value["save"] is not None and value["save"]["other_half"] is None:
        line(console, "\nno HuggingFace half")
    if value["ranks"]:
        _show_ranks(value["ranks"], console)


def _show_save(save: dict[str, Any], console: Console) -> None:
    step = "" if save["step"] is None else f"step {save['step']}, "
    total = save["seconds"].get("total")
    took = "" if total is None else f", {duration(total)}"
    line(
        console, f"{step}saved by {count(save['world_size'], 'rank')}{took}; save {save['save_id']}"
    )
    if save["other_half"] is not None:
        line(console, f"the halves lie apart; the other one: {save['other_half']}")
    if save["weights_once"]:
        many = count(save["weights_once"], "tensor")
        line(console, f"weights once: {many} of the DCP half lie only in the HuggingFace half")
    if save["export_error"] is not None:
        line(console, f"the export failed: {save['export_error']}", "red")
    for dropped, kept in save["tied"].items():
        line(console, f"tied: {dropped} = {kept}")


def _show_dcp(dcp: dict[str, Any], console: Console) -> None:
    line(console, "\nDCP half" + ("" if dcp["has_manifest"] else " (without a manifest)"), "bold")
    totals = ("tensors", "chunks", "elements", "bytes", "values")
    made = table("entry", *totals, "dtypes", numbers=totals)
    for name, entry in dcp["entries"].items():
        many = (f"{entry[key]:,}" for key in ("tensors", "chunks", "parameters"))
        row(made, name, *many, size(entry["nbytes"]), entry["values"], _dtypes(entry["dtypes"]))
    print_table(console, made)
    numbers = ("bytes", "items", "rank")
    made = table("file", *numbers, numbers=numbers)
    for file in dcp["files"][:_FILES_SHOWN]:
        rank = "-" if file["rank"] is None else file["rank"]
        row(made, file["name"], size(file["nbytes"]), file["items"], rank)
    print_table(console, made)
    line_of_rest(console, dcp["files"], _FILES_SHOWN, "files")


def _show_hf(hf: dict[str, Any], console: Console) -> None:
    kind = ", ".join(hf["architectures"])
    line(console, "\nHuggingFace half" + (f" ({kind})" if kind else ""), "bold")
    line(
        console,
        f"{count(hf['tensors'], 'tensor')}, {hf['parameters']:,} elements, {size(hf['nbytes'])}, "
        f"{_dtypes(hf['dtypes'])}",
    )
    numbers = ("bytes", "tensors")
    made = table("file", *numbers, numbers=numbers)
    for file in hf["files"][:_FILES_SHOWN]:
        row(made, file["name"], size(file["nbytes"]), file["tensors"])
    print_table(console, made)
    line_of_rest(console, hf["files"], _FILES_SHOWN, "files")


def _show_ranks(ranks: list[dict[str, Any]], console: Console) -> None:
    line(console, "\nwritten by", "bold")
    numbers = ("rank", "DCP", "HF")
    made = table(*numbers, numbers=numbers)
    for one in ranks[:_FILES_SHOWN]:
        row(made, one["rank"], size(one["dcp_nbytes"]), size(one["hf_nbytes"]))
    print_table(console, made)
    line_of_rest(console, ranks, _FILES_SHOWN, "ranks")


def _show_tensors(tensors: list[dict[str, Any]], console: Console) -> None:
    if not tensors:
        line(console, "no tensor has such a name", "yellow")
        return
    for one in tensors:
        what = "a value" if one["shape"] is None else f"{one['dtype']} {shape(one['shape'])}"
        line(console, one["name"], "bold")
        line(console, f"  {one['half']}: {what}")
        for place in one["places"]:
            line(console, f"    {_place(place)}")


def _place(place: dict[str, Any]) -> str:
    text = f"{place['file']}"
    if place["start"] is not None:
        text += f", bytes {place['start']:,} to {place['start'] + place['nbytes']:,}"
    if place["offsets"]:
        text += f", elements from {shape(place['offsets'])}"
    return text if place["rank"] is None else f"{text}, rank {place['rank']}"


def _dtypes(dtypes: Mapping[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{name} ({number})" for name, number in sorted(dtypes.items()))
