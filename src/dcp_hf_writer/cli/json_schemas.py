"""JSON schemas of what `--json` prints: one for each command. Pure values.

A field may be added in any release. If a field changes its meaning, `version` grows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import FACTS

if TYPE_CHECKING:
    from collections.abc import Mapping

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"

_NONE: dict[str, Schema] = {}


def _of(kind: str, says: str, *, or_null: bool = False) -> Schema:
    return {"type": [kind, "null"] if or_null else kind, "description": says}


def _text(says: str) -> Schema:
    return _of("string", says)


def _maybe_text(says: str) -> Schema:
    return _of("string", says, or_null=True)


def _whole(says: str) -> Schema:
    return {**_of("integer", says), "minimum": 0}


def _maybe_whole(says: str) -> Schema:
    return {**_of("integer", says, or_null=True), "minimum": 0}


def _number(says: str) -> Schema:
    return _of("number", says)


def _maybe_number(says: str) -> Schema:
    return _of("number", says, or_null=True)


def _flag(says: str) -> Schema:
    return _of("boolean", says)


def _many(items: Schema, says: str, *, or_null: bool = False) -> Schema:
    return {**_of("array", says, or_null=or_null), "items": items}


def _map(values: Schema, says: str) -> Schema:
    return {**_of("object", says), "additionalProperties": values}


def _fields(
    says: str, fields: Mapping[str, Schema] = _NONE, /, *, or_null: bool = False, **more: Schema
) -> Schema:
    return {
        **_of("object", says, or_null=or_null),
        "properties": {**fields, **more},
        "required": [*fields, *more],
        "additionalProperties": False,
    }


def _answer(command: str, says: str, **fields: Schema) -> Schema:
    about: dict[str, Schema] = {"command": {"const": command}, "version": {"const": 1}}
    return {"$schema": _DIALECT, **_fields(says, {**about, **fields})}


_SHAPE = _many(_whole("sizes"), "sizes in elements, one for each dimension", or_null=True)

_STEP = _fields(
    "one step directory",
    step=_whole("number of the step"),
    path=_text("absolute path"),
    state={
        "enum": ["committed", "unverified", "incomplete"],
        "description": "committed: the manifest and all sizes agree; unverified: whole, but "
        "another program wrote it, so there are no digests; incomplete: no whole checkpoint",
    },
    problem=_maybe_text("why it is incomplete"),
    kind=_maybe_text("manifest (this package), dcp, parts (DCP in subdirectories) or hf"),
    is_snapshot=_flag("whether it is the snapshot slot"),
    is_pinned=_flag("whether retention keeps it"),
    metrics=_map(_number("value"), "metrics that the run noted"),
    dcp_nbytes=_whole("bytes of all files outside the HuggingFace half"),
    hf_nbytes=_whole("bytes of the HuggingFace half"),
    weights_once=_flag("whether weights lie only in the HuggingFace half"),
    world_size=_maybe_whole("ranks that saved it"),
    save_id=_maybe_text("id of the save"),
    age_s=_maybe_number("seconds since the commit; null behind a URL"),
    other_half=_maybe_text("place of the other half; null unless the halves lie apart"),
)

_PROBLEM = _fields(
    "one problem",
    file=_text("path within the checkpoint; empty for the whole"),
    what=_text("what is wrong"),
    key=_maybe_text("HuggingFace name of the tensor"),
    fqn=_maybe_text("name of the tensor in the state dict"),
    start=_maybe_whole("first byte concerned"),
    stop=_maybe_whole("one past the last byte concerned"),
    rank=_maybe_whole("rank that wrote the bytes"),
    expected=_maybe_text("what should have been there"),
    found=_maybe_text("what was there"),
    hint=_maybe_text("what to do"),
    text=_text("all of it as one line"),
)

_CHECKED = _fields(
    "one checkpoint",
    ok=_flag("whether no problem was found"),
    path=_text("path or URL"),
    checked={"enum": ["digests", "structure", "nothing"], "description": "what could be checked"},
    problems=_many(_PROBLEM, "faults that make it unfit to load"),
    warnings=_many(_PROBLEM, "oddities that change nothing for a reader"),
    file_count=_whole("files"),
    tensor_count=_whole("tensors in safetensors files"),
    digest_count=_whole("digests compared"),
    nbytes=_whole("bytes read for them"),
    seconds=_number("duration"),
)

_TENSORS = {
    "tensors": _whole("tensors"),
    "parameters": _whole("elements of all tensors"),
    "nbytes": _whole("bytes of all tensors"),
    "dtypes": _map(_whole("tensors"), "tensors by dtype"),
    "chunks": _whole("chunks of the tensors (DCP half)"),
    "values": _whole("values that are not tensors (DCP half)"),
}

_SAVE = _fields(
    "what the manifest says of the save; null without a manifest",
    or_null=True,
    save_id=_text("id of the save"),
    target=_text("path that it was saved under"),
    step=_maybe_whole("training step"),
    world_size=_whole("ranks"),
    export_error=_maybe_text("why a requested export failed"),
    seconds=_map(_number("seconds"), "seconds of the coordinator by phase"),
    weights_once=_whole("tensors that lie only in the HuggingFace half"),
    tied=_map(_text("kept name"), "names that the export leaves out, and where their bytes are"),
    other_half=_maybe_text("place of the other half; null unless the halves lie apart"),
)

_PIN = {
    "root": _text("absolute path of the run"),
    "step": _whole("number of the step"),
    "is_pinned": _flag("whether retention keeps it now"),
}

_KIND = _fields(
    "shape and dtype; null if the tensor is missing",
    or_null=True,
    shape=_SHAPE,
    dtype=_text("torch dtype"),
)

_DIFFERENCE = _fields(
    "one tensor that differs",
    name=_text("name of the tensor"),
    what={
        "enum": ["only in a", "only in b", "shape", "dtype", "values", "dtype and values"],
        "description": "how it differs",
    },
    a=_KIND,
    b=_KIND,
    differing=_maybe_whole("elements with other values; null if shapes differ"),
    max_abs=_maybe_number("largest |a - b|; null if it is not finite or not known"),
    max_rel=_maybe_number("largest |a - b| / max(|a|, |b|)"),
    is_finite=_flag("false if a NaN or an infinite value differs"),
)

_INSPECT = {
    "path": _text("path or URL"),
    "save": _SAVE,
    "dcp": _fields(
        "the DCP half; null without one",
        or_null=True,
        entries=_map(_fields("totals", _TENSORS), "by entry at the top of the state dict"),
        files=_many(
            _fields(
                "one file",
                name=_text("path within the checkpoint"),
                nbytes=_whole("size"),
                items=_whole("items in it"),
                rank=_maybe_whole("rank that wrote it"),
            ),
            "data files",
        ),
        has_manifest=_flag("whether this package wrote it"),
    ),
    "hf": _fields(
        "the HuggingFace half; null without one",
        _TENSORS,
        or_null=True,
        subdir=_text("directory within the checkpoint; empty if the path is the export"),
        files=_many(
            _fields(
                "one file",
                name=_text("path within the checkpoint"),
                nbytes=_whole("size"),
                tensors=_whole("tensors in it"),
            ),
            "files of weights",
        ),
        architectures=_many(_text("class"), "architectures in config.json"),
    ),
    "ranks": _many(
        _fields(
            "one rank",
            rank=_whole("rank"),
            dcp_nbytes=_whole("bytes of its DCP files"),
            hf_nbytes=_whole("bytes of its parts of the export"),
        ),
        "who wrote what; empty without a manifest",
    ),
    "tensors": _many(
        _fields(
            "one tensor or value",
            half={"enum": ["dcp", "hf"]},
            name=_text("name in that half"),
            shape=_SHAPE,
            dtype=_maybe_text("dtype; null for a value"),
            places=_many(
                _fields(
                    "one part",
                    offsets=_SHAPE,
                    file=_text("file"),
                    start=_maybe_whole("first byte in the file"),
                    nbytes=_whole("bytes"),
                    rank=_maybe_whole("rank that wrote it"),
                ),
                "where its parts are",
            ),
        ),
        "the tensors that --key matches; null without --key",
        or_null=True,
    ),
}

ERROR = {
    "$schema": _DIALECT,
    **_fields(
        "what every command prints instead of its answer if it fails",
        command=_text("name of the command"),
        version={"const": 1},
        error=_fields(
            "the error",
            {fact: _maybe_text(f"{fact} of the error, if it is known") for fact in FACTS},
            type=_text("class of dcp_hf_writer.errors, or another exception"),
            problem=_text("what went wrong"),
        ),
    ),
}
"""Schema of the answer of a command that failed."""

SCHEMAS: dict[str, Schema] = {
    "ls": _answer(
        "ls",
        "the steps of a run",
        root=_text("absolute path of the run"),
        latest=_maybe_whole("newest step with a whole checkpoint"),
        steps=_many(_STEP, "the steps, ascending"),
        leftovers=_many(_text("name"), "directories of saves in flight, dead saves and deletions"),
    ),
    "latest": _answer(
        "latest",
        "the newest whole checkpoint; all null if there is none",
        root=_text("absolute path of the run"),
        step=_maybe_whole("number of the step"),
        path=_maybe_text("absolute path of the checkpoint"),
        export=_maybe_text("absolute path of its HuggingFace half"),
    ),
    "verify": _answer(
        "verify",
        "the result of a check",
        ok=_flag("whether no problem was found in any checkpoint"),
        checkpoints=_many(_CHECKED, "one for each checkpoint"),
    ),
    "inspect": _answer("inspect", "what a checkpoint holds", **_INSPECT),
    "diff": _answer(
        "diff",
        "how two checkpoints differ",
        a=_text("the first path"),
        b=_text("the second path"),
        halves=_many({"enum": ["dcp", "hf"]}, "the half that was read of each"),
        equal=_whole("tensors that are equal in shape, dtype and values"),
        differences=_many(_DIFFERENCE, "the others, by name"),
    ),
    "materialize": _answer(
        "materialize",
        "what was written",
        source=_text("the checkpoint that was read"),
        path=_text("absolute path of the new checkpoint"),
        nbytes=_whole("its size"),
        seconds=_number("duration"),
    ),
    "gc": _answer(
        "gc",
        "what was deleted, or would be",
        root=_text("absolute path of the run"),
        dry_run=_flag("whether nothing was deleted"),
        steps=_many(_whole("step"), "checkpoints that the retention gives up"),
        exports=_many(_whole("step"), "steps that lose only their export"),
        snapshots=_many(_whole("step"), "snapshots that a newer checkpoint replaces"),
        leftovers=_many(
            _fields(
                "one directory",
                name=_text("name in the run"),
                state={"enum": ["dead", "alive", "unknown"], "description": "its save"},
                nbytes=_whole("size"),
            ),
            "directories of saves and deletions that were there before",
        ),
        remaining=_many(_text("name"), "those that are there afterwards; empty in a dry run"),
        nbytes=_whole("bytes of what goes"),
    ),
    "pin": _answer("pin", "the pin of a step", **_PIN),
    "unpin": _answer("unpin", "the pin of a step", **_PIN),
    "report": _answer(
        "report",
        "where the time of a save went",
        path=_text("path or URL"),
        save_id=_text("id of the save"),
        step=_maybe_whole("training step"),
        coordinator=_map(_number("seconds"), "seconds of the coordinator by phase"),
        ranks=_many(
            _fields(
                "one rank",
                rank=_whole("rank"),
                host=_text("host"),
                seconds=_map(_number("seconds"), "seconds by phase"),
                dcp_nbytes=_whole("bytes of its DCP files"),
                hf_nbytes=_whole("bytes of its parts of the export"),
            ),
            "the ranks",
        ),
        nbytes=_whole("bytes of all ranks"),
        written=_many(_text("path"), "files that the command wrote"),
    ),
    "doctor": _answer(
        "doctor",
        "what a place for checkpoints can do",
        path=_text("absolute path of the checkpoint that would be made"),
        probed=_text("existing directory that was probed"),
        file_system=_maybe_text("type of the file system"),
        is_coherent=_flag("whether it is known to keep the page caches of hosts coherent"),
        renames=_flag("whether a directory can be renamed"),
        clone_block_nbytes=_maybe_whole("size of the blocks that files can share"),
        free_nbytes=_maybe_whole("free space"),
        written_nbytes=_whole("bytes of the speed test"),
        write_seconds=_number("its duration, with fsync"),
        advice=_many(_text("sentence"), "which strategy a save uses there, and why"),
    ),
    "push": _answer(
        "push",
        "what was uploaded",
        path=_text("absolute path of the HuggingFace half"),
        repo=_text("repository with its owner"),
        revision=_text("branch"),
        url=_text("URL of the commit"),
        commit=_text("id of the commit"),
        files=_many(_text("name"), "files of the commit"),
        made_card=_flag("whether a model card was made, because there was none"),
        nbytes=_whole("bytes of the files, without the card"),
        seconds=_number("duration"),
    ),
    "watch": _answer(
        "watch",
        "one update, a line of its own; there is one every few seconds",
        root=_text("absolute path of the directory"),
        time=_number("seconds since 1970"),
        saves=_many(
            _fields(
                "one save in flight",
                save_id=_text("id of the save"),
                path=_text("path of the checkpoint that it makes"),
                state={
                    "enum": ["alive", "dead", "unknown"],
                    "description": "its coordinator; unknown: it runs on another host",
                },
                phase=_text("phase of the slowest rank; start before any rank told one"),
                done_nbytes=_whole("bytes written"),
                planned_nbytes=_whole("bytes that the ranks which told something will write"),
                nbytes_per_s=_maybe_number("rate of the last seconds"),
                left_s=_maybe_number("seconds until all bytes are written, at this rate"),
                seconds=_maybe_number("seconds since writing began"),
                world_size=_maybe_whole("number of ranks"),
                ranks=_many(
                    _fields(
                        "one rank that told something",
                        rank=_whole("rank"),
                        host=_text("host"),
                        pid=_whole("process id"),
                        phase=_text("what it does"),
                        done_nbytes=_whole("bytes written"),
                        planned_nbytes=_whole("bytes that it will write"),
                        silent_s=_number("seconds since it told anything"),
                        idle_s=_number("seconds since phase or bytes changed"),
                        late=_maybe_text("why it counts as late"),
                    ),
                    "ranks that told something",
                ),
                missing=_many(_whole("rank"), "ranks that have told nothing"),
            ),
            "saves in flight, the oldest first",
        ),
        ended=_many(
            _fields(
                "one save",
                save_id=_text("id of the save"),
                path=_text("path of the checkpoint"),
                outcome={
                    "enum": ["published", "failed", "dead"],
                    "description": "failed: its directory is gone and there is no checkpoint; "
                    "dead: its process is gone, or gave no news for a minute",
                },
                nbytes=_maybe_whole("bytes of the checkpoint"),
                seconds=_maybe_number("duration of the save"),
                has_export=_flag("whether the HuggingFace half is there"),
                host=_maybe_text("host of its coordinator"),
                pid=_maybe_whole("process id of its coordinator"),
            ),
            "saves that have ended since the update before",
        ),
    ),
    "import": _answer(
        "import",
        "what was written",
        source=_text("the directory that was read"),
        path=_text("absolute path of the checkpoint"),
        tensors=_whole("tensors"),
        nbytes=_whole("their size"),
        seconds=_number("duration"),
        missing=_many(_text("name"), "names that the specs expect and the directory lacks"),
    ),
    "export": _answer(
        "export",
        "what was written",
        source=_text("the checkpoint that was read"),
        path=_text("absolute path of the HuggingFace directory"),
        files=_many(_text("file name"), "files of weights"),
        tensors=_whole("tensors"),
        nbytes=_whole("bytes of the files of weights"),
        seconds=_number("duration"),
        left_out=_many(_text("entry or kind"), "what the state dict holds beside the model"),
        tied=_map(_text("kept name"), "names that were left out, and where their bytes are"),
    ),
}
"""Schema of the answer of each command, by the name of the command."""
