"""Write the golden checkpoints of the code as it is: `make.py <new directory>`.

Run it with `src` and `tests` on `PYTHONPATH`, once per format, by the code that defines the format.
What it wrote is then committed below a directory named after the format, and never changed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from support.golden_states import WORLD_SIZE, save_all
from support.ranks import run_ranks

if __name__ == "__main__":
    run_ranks(save_all, WORLD_SIZE, Path(sys.argv[1]))
