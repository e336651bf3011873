"""Fuzz one parser with atheris, guided by coverage: `fuzz_entry.py <parser> <options>`."""

from __future__ import annotations

import sys

import atheris
import xxhash

with atheris.instrument_imports(include=["dcp_hf_writer"]):
    from dcp_hf_writer.check.check_hf import parse_index
    from dcp_hf_writer.errors import CheckpointError
    from dcp_hf_writer.formats.parse_dcp_metadata import parse_metadata
    from dcp_hf_writer.formats.parse_safetensors_header import header_nbytes, parse_header
    from dcp_hf_writer.plan.parse_manifest import parse_manifest


def manifest(data: bytes) -> None:
    last = f'"digest_above": "{xxhash.xxh3_64_hexdigest(data)}"\n}}\n'
    parse_manifest(data + last.encode(), path="x")


def header(data: bytes) -> None:
    nbytes = header_nbytes(data, file_nbytes=len(data), path="x")
    parse_header(data[:nbytes], file_nbytes=len(data), path="x")


def index(data: bytes) -> None:
    parse_index(data, path="x")


def metadata(data: bytes) -> None:
    parse_metadata(data, path="x")


PARSERS = {"manifest": manifest, "header": header, "index": index, "metadata": metadata}


def main() -> None:
    """Run until libFuzzer is done; an error that is not ours is a crash, and ends the process."""
    parse = PARSERS[sys.argv.pop(1)]

    def run(data: bytes) -> None:
        try:
            parse(data)
        except CheckpointError as error:
            str(error)

    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
