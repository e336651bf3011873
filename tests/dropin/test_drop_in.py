"""Programs that run with torch's writer and reader run with ours, and load the same values.

`support.drop_in_rows` has the programs, and `docs/drop-in.md` the table of what came of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from support.drop_in import WAYS, Calls, flat, outcomes_of
from support.drop_in_rows import RANK_ROWS, ROWS, Net
from support.drop_in_table import TIMEOUT_S, run_rows, table, written_table

if TYPE_CHECKING:
    from pathlib import Path

    from support.drop_in_table import Outcomes

pytestmark = [
    pytest.mark.timeout(TIMEOUT_S + 20),
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable:UserWarning"),
]

EQUAL = {"torch": "ran", "save": "equal", "async_save": "equal", "load": "equal"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_rows(tmp_path_factory.mktemp("drop-in"))


@pytest.mark.parametrize("name", [*RANK_ROWS, *ROWS])
def test_program_loads_what_it_loads_with_torch_alone(outcomes: Outcomes, name: str) -> None:
    assert outcomes[name] == EQUAL


def test_table_in_the_docs_is_what_came_of_the_programs(outcomes: Outcomes) -> None:
    assert written_table() == table(outcomes), "run tests/support/drop_in_table.py"


def test_comparison_sees_other_values_missing_values_and_errors(tmp_path: Path) -> None:
    def row(calls: Calls) -> object:
        if calls.way == "load":
            raise ValueError("not loaded")
        values = {"w": Net(1 if calls.way != "save" else 2).state_dict(), "n": 3}
        if calls.way == "async_save":
            del values["n"]
        return values

    found = outcomes_of({"row": row, "empty": lambda _: {}}, tmp_path)
    assert found["row"] == {
        "torch": "ran",
        "save": "differs: /w/count",
        "async_save": "differs: /n",
        "load": "ValueError: not loaded",
    }
    assert found["empty"] == dict.fromkeys(WAYS, "nothing was loaded")


def test_values_are_compared_to_the_last_bit() -> None:
    one, other = Net(1).state_dict(), Net(1).state_dict()
    assert flat(one) == flat(other)
    other["up.bias"].view(torch.int32).bitwise_xor_(1)
    assert [key for key in flat(one) if flat(one)[key] != flat(other)[key]] == ["/up.bias"]
