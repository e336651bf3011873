"""Read checkpoints with torch alone: `without_package.py <results> <checkpoint>...`.

Importing the package fails here, as it does where it is not installed.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class NotInstalled(MetaPathFinder):
    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname.partition(".")[0] == "dcp_hf_writer":
            raise ModuleNotFoundError(fullname)


def text_of_error(action: Callable[[], object]) -> str | None:
    try:
        action()
    except BaseException as error:  # noqa: BLE001 - torch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    return None


def read_with_torch_alone(path: Path, target: Path) -> dict[str, Any]:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    try:
        from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader
    except ImportError:  # torch before 2.15
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    metadata = dcp.FileSystemReader(path).read_metadata()
    blank = {
        fqn: torch.full(entry.size, -1.0, dtype=entry.properties.dtype)
        for fqn, entry in metadata.state_dict_metadata.items()
        if fqn != "step"
    }
    rest: dict[str, Any] = {k: v for k, v in blank.items() if k.startswith("optim")}
    rest["step"] = -1
    dcp.load(rest, checkpoint_id=path, no_dist=True)
    weights = {k: v for k, v in blank.items() if k.startswith("model")}
    readers = {"FileSystemReader": dcp.FileSystemReader, "FsspecReader": FsspecReader}
    errors = {
        name: text_of_error(
            lambda reader=reader: dcp.load(weights, storage_reader=reader(str(path)), no_dist=True)  # type: ignore[misc]
        )
        for name, reader in readers.items()
    }
    errors["dcp_to_torch_save"] = text_of_error(lambda: dcp_to_torch_save(path, target))
    return {"rest": rest, "weights": weights, "errors": errors}


def main(results: Path, paths: list[str]) -> None:
    import torch

    found: dict[str, Any] = {}
    for number, path in enumerate(paths):
        target = results.with_name(f"{number}.torch")
        try:
            found[path] = read_with_torch_alone(Path(path), target) | {"file": str(target)}
        except ModuleNotFoundError as error:
            found[path] = {"not installed": str(error)}
    torch.save(found, results)


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled())
    main(Path(sys.argv[1]), sys.argv[2:])
