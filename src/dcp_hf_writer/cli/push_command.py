"""`push`: upload the HuggingFace half to the hub, with a model card if there is none."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.check.verify import verify
from dcp_hf_writer.cli.byte_progress import ByteProgress
from dcp_hf_writer.cli.plain_text import count, duration, rate, size
from dcp_hf_writer.cli.run_command import Outcome, line
from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.integrations.hub_upload import CARD_NAME, Hub
from dcp_hf_writer.integrations.model_card import model_card
from dcp_hf_writer.load.choose_half import find_place
from dcp_hf_writer.load.hf_directory import open_hf_directory
from dcp_hf_writer.load.read_manifest import manifest_of
from dcp_hf_writer.preflight import check_options
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.open_inputs import OpenInputs

if TYPE_CHECKING:
    from rich.console import Console

    from dcp_hf_writer.integrations.hub_upload import HubTarget
    from dcp_hf_writer.load.hf_directory import HFDirectory
    from dcp_hf_writer.plan.manifest import Manifest


def push(path: str, target: HubTarget, *, message: str | None, as_json: bool) -> Outcome:
    """Verify a checkpoint, and upload its HuggingFace half in one commit.

    Args:
        path: A checkpoint, or a HuggingFace directory; a local path.
        target: Where it goes.
        message: Title of the commit; `None` makes one.
        as_json: Show no progress.

    Raises:
        ConfigError: If huggingface_hub is missing, or an argument cannot be used as given.
        ReadError: If there is no HuggingFace half.
        CorruptCheckpointError: If the checkpoint is damaged.
        WriteError: If the hub refuses the upload.
    """
    began = time.monotonic()
    local = check_options.local_path(path)
    hub = Hub(target, shows_progress=sys.stderr.isatty() and not as_json)
    directory, model = _export_of(local)
    _verify(local, os.path.basename(local))
    manifest = manifest_of(open_directory(local))
    names = sorted(open_directory(directory).tree())
    files: dict[str, str | bytes] = {name: os.path.join(directory, name) for name in names}
    repo = hub.prepare()
    has_card = CARD_NAME in files or hub.has(repo, CARD_NAME)
    if not has_card:
        files[CARD_NAME] = _card(repo.rpartition("/")[2], model, manifest).encode()
    uploaded = hub.upload(repo, files, message=message or _message(local, manifest))
    nbytes = sum(os.path.getsize(os.path.join(directory, name)) for name in names)
    return Outcome(
        {
            "path": directory,
            "repo": uploaded.repo,
            "revision": target.revision,
            "url": uploaded.url,
            "commit": uploaded.commit,
            "files": sorted(files),
            "made_card": not has_card,
            "nbytes": nbytes,
            "seconds": round(time.monotonic() - began, 6),
        }
    )


def show_push(value: dict[str, Any], console: Console) -> None:
    """Print where the files are now."""
    line(console, value["url"], "bold")
    line(
        console,
        f"{count(len(value['files']), 'file')}, {size(value['nbytes'])}, "
        f"{duration(value['seconds'])} ({rate(value['nbytes'], value['seconds'])})",
    )
    if value["made_card"]:
        line(console, f"made {CARD_NAME} from the config; describe the model there")


def _export_of(path: str) -> tuple[str, HFDirectory]:
    """Return the path of the HuggingFace half, and what is in it; it may be the path itself."""
    place = find_place(path, "hf", None, with_manifest=False)
    with OpenInputs(place.weights) as inputs:
        return place.weights.path, open_hf_directory(inputs)


def _verify(path: str, name: str) -> None:
    with ByteProgress(f"verify {name}") as progress:
        report = verify(path, progress=progress)
    if not report.ok:
        raise CorruptCheckpointError(
            "the checkpoint is damaged, so it was not pushed",
            path=path,
            found=f"{count(len(report.problems), 'problem')}, first: {report.problems[0]}",
            hint="dcp-hf verify lists all",
        )


def _message(path: str, manifest: Manifest | None) -> str:
    step = None if manifest is None else manifest.step
    return f"Upload {os.path.basename(path)}" if step is None else f"Upload step {step}"


def _card(name: str, model: HFDirectory, manifest: Manifest | None) -> str:
    tensors = [one for header in model.headers.values() for one in header.tensors.values()]
    return model_card(
        name,
        model.config or {},
        parameters=sum(math.prod(one.shape) for one in tensors),
        dtypes=sorted({one.dtype for one in tensors}),
        step=None if manifest is None else manifest.step,
        world_size=None if manifest is None else manifest.world_size,
    )
