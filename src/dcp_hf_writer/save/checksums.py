"""The sha256 of each file of an export, in the form that SGLang's `--model-checksum` reads.

Source:
    SGLang, `sglang.srt.utils.model_file_verifier`: `{"files": {name: {"sha256", "size"}}}`, no
    other fields; names are relative to the model directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dcp_hf_writer.formats.names_on_disk import path_in_export
from dcp_hf_writer.plan.encode_manifest import WholeFile
from dcp_hf_writer.save.model_assets import CHECKSUMS_NAME
from dcp_hf_writer.save.tensor_bytes import digest_of
from dcp_hf_writer.storage.posix_outputs import write_file

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_PIECE_NBYTES = 1 << 20
_MAX_THREADS = 8


def add_checksums(directory: str, subdir: str, *, check: Callable[[], None]) -> WholeFile:
    """Write the checksum file of an export whose other files are complete (coordinator).

    Reads every byte of the export once more; bytes that this host wrote come from its page cache.

    Args:
        directory: Directory that the save writes into.
        subdir: Directory of the export within it.
        check: Called before each piece of a file; raises if the save was given up.

    Returns:
        The checksum file; it is durable.

    Raises:
        OSError: If a file cannot be read.
        WriteError: If the checksums cannot be written.
    """
    began = time.monotonic()
    export = os.path.join(directory, subdir)
    names = sorted(
        os.path.relpath(os.path.join(path, name), export)
        for path, _, names in os.walk(export)
        for name in names
    )
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda name: _sha256(os.path.join(export, name), check), names))
    files = {
        name: {"sha256": sha256, "size": nbytes}
        for name, (sha256, nbytes) in zip(names, found, strict=True)
    }
    data = (json.dumps({"files": files}, indent=2, sort_keys=True) + "\n").encode()
    write_file(os.path.join(export, CHECKSUMS_NAME), data)
    _log.info(
        "computing the sha256 of %d export files (%d bytes) took %.2f s",
        len(names),
        sum(nbytes for _, nbytes in found),
        time.monotonic() - began,
    )
    return WholeFile(path_in_export(subdir, CHECKSUMS_NAME), len(data), digest_of(data))


def _sha256(path: str, check: Callable[[], None]) -> tuple[str, int]:
    digest, nbytes = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_PIECE_NBYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            check()
            digest.update(buffer[:count])
            nbytes += count
    return digest.hexdigest(), nbytes
