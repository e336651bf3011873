"""The commands of `dcp-hf` and their options. Wiring only.

Each command imports what it needs when it runs, because torch takes seconds to import.
"""

from __future__ import annotations

import sys
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Optional

import typer

from dcp_hf_writer.cli.run_command import run, run_updates

app = typer.Typer(
    name="dcp-hf",
    help="List, inspect, compare, verify, convert and clean up checkpoints.",
    epilog="Exit codes: 0 ok, 1 a check found a problem, 2 wrong use, 3 failed, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        try:
            found = version("dcp-hf-writer")
        except PackageNotFoundError:
            found = "of a source tree that is not installed"
        sys.stdout.write(f"dcp-hf-writer {found}\n")
        raise typer.Exit


_VERSION = typer.Option(
    "--version", callback=_print_version, is_eager=True, help="Print the version."
)


@app.callback()
def main(_version: Annotated[bool, _VERSION] = False) -> None:
    """List, inspect, compare, verify, convert and clean up checkpoints."""


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object (dcp-hf schema).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Prefix = Annotated[
    str, typer.Option("--prefix", help="What the names of step directories begin with.")
]
Key = Annotated[
    Optional[str], typer.Option("--key", metavar="REGEX", help="Only tensors with such names.")
]
Config = Annotated[
    Optional[str],
    typer.Option(metavar="PATH", help="config.json or its directory: gives specs and ties."),
]
Specs = Annotated[
    Optional[str],
    typer.Option(metavar="FILE.py:NAME", help="LoadSpecs of your own; runs the file."),
]
Dtype = Annotated[Optional[str], typer.Option(help="Cast weights, such as bfloat16.")]
Step = Annotated[int, typer.Argument(min=0, help="Number of the step.")]
Root = Annotated[str, typer.Argument(metavar="ROOT", help="Directory of a run.")]
Checkpoint = Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a path or a URL.")]


class Half(str, Enum):
    """A half of a checkpoint."""

    auto = "auto"
    dcp = "dcp"
    hf = "hf"


@app.command("ls")
def list_steps(
    root: Root, prefix: Prefix = "step-", json: Json = False, debug: Debug = False
) -> None:
    """List the steps of a run: state, size of both halves, age, pins."""
    from dcp_hf_writer.cli import run_listing

    run(
        "ls",
        lambda: run_listing.list_steps(root, prefix),
        run_listing.show_steps,
        as_json=json,
        debug=debug,
    )


@app.command()
def latest(root: Root, prefix: Prefix = "step-", json: Json = False, debug: Debug = False) -> None:
    """Print the path of the newest whole checkpoint; exit 1 if there is none."""
    from dcp_hf_writer.cli import run_listing

    run(
        "latest",
        lambda: run_listing.find_latest(root, prefix),
        run_listing.show_latest,
        as_json=json,
        debug=debug,
    )


@app.command()
def verify(
    path: Annotated[
        str, typer.Argument(metavar="PATH|ROOT", help="Checkpoint, or directory of a run.")
    ],
    threads: Annotated[Optional[int], typer.Option(min=1, help="Reads at the same time.")] = None,
    prefix: Prefix = "step-",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check every byte of a checkpoint, or of all steps of a run; exit 1 on damage."""
    from dcp_hf_writer.cli import verify_command

    run(
        "verify",
        lambda: verify_command.verify_all(path, prefix=prefix, threads=threads),
        verify_command.show_reports,
        as_json=json,
        debug=debug,
    )


@app.command("inspect")
def inspect_checkpoint(
    path: Checkpoint,
    key: Key = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint holds: tensors, dtypes, files, and who wrote what."""
    from dcp_hf_writer.cli import inspect_command

    run(
        "inspect",
        lambda: inspect_command.inspect_checkpoint(path, key),
        inspect_command.show_checkpoint,
        as_json=json,
        debug=debug,
    )


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="First checkpoint: a path or a URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Second checkpoint.")],
    key: Key = None,
    half: Annotated[
        Half, typer.Option(help="Half to read; auto prefers the DCP half.")
    ] = Half.auto,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the tensors of two checkpoints; exit 1 if they differ."""
    from dcp_hf_writer.cli import diff_command

    run(
        "diff",
        lambda: diff_command.diff(a, b, half=half.value, pattern=key),
        diff_command.show_diff,
        as_json=json,
        debug=debug,
    )


@app.command()
def materialize(
    path: Checkpoint,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="New checkpoint: a local path.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Rewrite a checkpoint with weights="once", so that torch alone reads it."""
    from dcp_hf_writer.cli import convert_commands

    run(
        "materialize",
        lambda: convert_commands.materialize_checkpoint(path, target, overwrite=overwrite),
        convert_commands.show_materialized,
        as_json=json,
        debug=debug,
    )


@app.command("export")
def export_dcp(
    path: Annotated[str, typer.Argument(metavar="DCP", help="DCP checkpoint: a path or a URL.")],
    target: Annotated[str, typer.Argument(metavar="HF", help="New directory: a local path.")],
    config: Config = None,
    specs: Specs = None,
    like: Annotated[
        Optional[str],
        typer.Option(metavar="DIR", help="Model directory with the file names to use."),
    ] = None,
    dtype: Dtype = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    entry: Annotated[
        Optional[str], typer.Option(help="Entry of the state dict that holds the model.")
    ] = None,
    workers: Annotated[Optional[int], typer.Option(min=1, help="Files written at a time.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the model of any DCP checkpoint as a HuggingFace directory."""
    from dcp_hf_writer.cli import convert_commands

    options = {"dtype": dtype, "max_shard_size": max_shard_size, "key": entry}
    run(
        "export",
        lambda: convert_commands.export(
            path,
            target,
            config=config,
            specs=specs,
            like=like,
            workers=workers,
            options=options,
        ),
        convert_commands.show_export,
        as_json=json,
        debug=debug,
    )


@app.command("import")
def import_hf(
    path: Annotated[str, typer.Argument(metavar="HF", help="HuggingFace directory: path or URL.")],
    target: Annotated[str, typer.Argument(metavar="DCP", help="New checkpoint: a local path.")],
    config: Config = None,
    specs: Specs = None,
    dtype: Dtype = None,
    entry: Annotated[str, typer.Option(help="Entry of the state dict; empty for none.")] = "model",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a HuggingFace directory as a DCP checkpoint; exit 1 if tensors are missing."""
    from dcp_hf_writer.cli import convert_commands

    run(
        "import",
        lambda: convert_commands.import_hf(
            path, target, config=config, specs=specs, dtype=dtype, entry=entry
        ),
        convert_commands.show_import,
        as_json=json,
        debug=debug,
    )


@app.command()
def gc(
    root: Root,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    keep_last: Annotated[
        Optional[int], typer.Option(min=1, help="Newest steps to keep; default: all.")
    ] = None,
    keep_every: Annotated[
        Optional[int], typer.Option(min=1, help="Also keep multiples of this number.")
    ] = None,
    export_keep_last: Annotated[
        Optional[int], typer.Option(min=1, help="Newest exports to keep; default: all.")
    ] = None,
    prefix: Prefix = "step-",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete what dead saves left, and steps that the limits give up; never pinned ones."""
    from dcp_hf_writer.cli import keep_house_command
    from dcp_hf_writer.manager.retention import Retention

    run(
        "gc",
        lambda: keep_house_command.collect_garbage(
            root, prefix, Retention(keep_last, keep_every, None, export_keep_last), is_dry=dry_run
        ),
        keep_house_command.show_garbage,
        as_json=json,
        debug=debug,
    )


@app.command()
def pin(
    root: Root, step: Step, prefix: Prefix = "step-", json: Json = False, debug: Debug = False
) -> None:
    """Keep a step, whatever the retention of the run says."""
    from dcp_hf_writer.cli import keep_house_command

    run(
        "pin",
        lambda: keep_house_command.pin(root, prefix, step, is_pinned=True),
        keep_house_command.show_pin,
        as_json=json,
        debug=debug,
    )


@app.command()
def unpin(
    root: Root, step: Step, prefix: Prefix = "step-", json: Json = False, debug: Debug = False
) -> None:
    """Undo a pin."""
    from dcp_hf_writer.cli import keep_house_command

    run(
        "unpin",
        lambda: keep_house_command.pin(root, prefix, step, is_pinned=False),
        keep_house_command.show_pin,
        as_json=json,
        debug=debug,
    )


@app.command()
def report(
    path: Checkpoint,
    plot: Annotated[Optional[str], typer.Option(metavar="PNG", help="Draw a picture.")] = None,
    html: Annotated[
        Optional[str], typer.Option("--html", metavar="HTML", help="Write a page.")
    ] = None,
    trace: Annotated[
        Optional[str], typer.Option(metavar="JSON", help="Write a Chrome trace, for Perfetto.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show where the time of a save went: phases, bytes and rate of each rank."""
    from dcp_hf_writer.cli import report_command

    run(
        "report",
        lambda: report_command.report(path, plot=plot, page=html, trace=trace),
        report_command.show_report,
        as_json=json,
        debug=debug,
    )


@app.command()
def watch(
    path: Annotated[
        str, typer.Argument(metavar="ROOT|PATH", help="Directory of a run, or one checkpoint.")
    ],
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on when no save is in flight.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates.")] = 1.0,
    late: Annotated[
        float, typer.Option(min=0.1, help="Seconds without news after which a rank is late.")
    ] = 10.0,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
    debug: Debug = False,
) -> None:
    """Show the saves in flight until they end; exit 1 if one was not published."""
    from dcp_hf_writer.cli import watch_command

    run_updates(
        "watch",
        lambda: watch_command.watch(
            path, is_following=follow, every_s=every, late_s=late, as_json=json
        ),
        as_json=json,
        debug=debug,
    )


@app.command()
def push(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a local path.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository: owner/name.")],
    revision: Annotated[str, typer.Option(help="Branch; made if it is missing.")] = "main",
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    message: Annotated[Optional[str], typer.Option(help="Title of the commit.")] = None,
    endpoint: Annotated[
        Optional[str], typer.Option(metavar="URL", help="Hub; default: HF_ENDPOINT.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Verify a checkpoint, and upload its HuggingFace half to the hub in one commit."""
    from dcp_hf_writer.cli import push_command
    from dcp_hf_writer.integrations.hub_upload import HubTarget

    target = HubTarget(repo, revision, private, endpoint)
    run(
        "push",
        lambda: push_command.push(path, target, message=message, as_json=json),
        push_command.show_push,
        as_json=json,
        debug=debug,
    )


@app.command()
def doctor(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Where a checkpoint would be made.")],
    mib: Annotated[int, typer.Option(min=1, help="Size of the speed test, in MiB.")] = 256,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Probe a place for checkpoints: rename, clone, space, speed, strategy."""
    from dcp_hf_writer.cli import doctor_command

    run(
        "doctor",
        lambda: doctor_command.doctor(path, nbytes=mib << 20),
        doctor_command.show_doctor,
        as_json=json,
        debug=debug,
    )


@app.command()
def schema(
    name: Annotated[str, typer.Argument(metavar="COMMAND", help="Command, or 'error'.")],
    debug: Debug = False,
) -> None:
    """Print the JSON schema of what a command prints with --json."""
    from dcp_hf_writer.cli import print_schema

    run("schema", lambda: print_schema.find(name), print_schema.show, as_json=False, debug=debug)
