"""Entry point of `dcp-hf`: says what to install if the extra `cli` is missing."""

from __future__ import annotations

import sys

from dcp_hf_writer.cli import exit_codes

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line, and exit with its code."""
    try:
        from dcp_hf_writer.cli.app import app  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        text = f"dcp-hf needs {error.name}: pip install 'dcp-hf-writer[cli]'\n"
        sys.stderr.write(text)
        sys.exit(exit_codes.WRONG_USE)
    app(prog_name="dcp-hf")


if __name__ == "__main__":
    main()
