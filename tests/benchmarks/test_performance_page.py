"""`benchmarks/performance_page.py` writes what the benchmarks measured into its page."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import overhead  # noqa: E402
import performance_page as page  # noqa: E402
import scaling  # noqa: E402
from plot_timeline import Drawn  # noqa: E402

MACHINE = {"machine": "a machine", "load": 0.25}


def loop(step_s: float, *, saves: list[tuple[float, float]]) -> dict[str, Any]:
    """What one loop of ten steps did; each stall takes a tenth of a second."""
    steps = [(i * step_s, (i + 1) * step_s) for i in range(10)]
    stalls = [(begin, begin + 0.1) for begin, _ in saves]
    return {"drawn": Drawn(steps, stalls, saves, 10 * step_s).facts(), "nbytes": 2 * 10**9}


def test_a_loop_is_compared_with_the_loop_without_saves_of_its_round() -> None:
    facts = {
        "ways": {
            "none": [loop(1.0, saves=[]), loop(2.0, saves=[])],
            # The second save of the first round is half over when the loop ends.
            "ours": [loop(1.2, saves=[(0.0, 4.0), (8.0, 16.0)]), loop(2.0, saves=[(0.0, 4.0)])],
        }
    }
    _, plain, ours = overhead.rows(overhead.from_json(facts))
    assert plain[1] == "1.500"
    assert ours[1:] == [
        "1.600",
        "+10 % (+0 to +20)",
        "+10 % (+0 to +20)",
        "0.100",
        "5.00",
        "2.00",
        "1.2",
        "0.67",
    ]


def test_a_line_goes_through_points_that_lie_on_one() -> None:
    line = scaling.fit([0, 100, 1000], [0.5, 1.5, 10.5])
    assert math.isclose(line.constant_s, 0.5)
    assert math.isclose(line.slope_s, 0.01)
    assert math.isclose(line.at(50), 1.0)


def test_curves_become_rows_with_constant_and_slope() -> None:
    curve = scaling.CURVES["ranks"]
    points = [
        {"ranks": p.ranks, "tensors": p.tensors, "mib": p.mib, "ours": [p.ranks], "torch": [3.0]}
        for p in curve.points
    ]
    results = {"scaling": MACHINE | {"curves": ["ranks"], "points": points}}
    block = page.scaling_block(results, page.parts(is_small=True))
    ours, torch = block.splitlines()[4:6]
    assert ours.endswith("| 1: 1.000, 2: 2.000, 4: 4.000, 8: 8.000 | 0.000 | 1.000 s per 1 ranks |")
    assert torch.endswith("| 3.000 | 0.000 s per 1 ranks |")
    command = "python benchmarks/scaling.py --rounds 1 --only ranks --root /dev/shm"
    assert f"`{command}` on a machine, load average 0.2" in block


def saved(ranks: int) -> dict[str, Any]:
    """What `save.py` wrote."""
    times = {"stall_s_median": 0.1, "total_s_median": 2.0, "phases": []}
    contenders = dict.fromkeys(page.CONTENDERS.split(","), times)
    phases = [{"stage": 0.1, "plan": 0.2, "write dcp": w, "prepare": 0.1} for w in (0.4, 0.5, 0.9)]
    contenders["ours"] = times | {"phases": phases}
    return MACHINE | {"file_system": "tmpfs", "ranks": ranks, "contenders": contenders}


def test_the_rest_of_a_save_is_what_no_phase_counts() -> None:
    bar = page.bar_of(saved(1))
    assert bar.label == "tmpfs, 1 rank"
    assert bar.seconds["write dcp"] == 0.5
    assert math.isclose(bar.rest_s, 2.0 - 0.1 - 0.2 - 0.5)


def test_the_tables_of_saves_have_a_row_for_each_run_that_is_there() -> None:
    all_parts = page.parts(is_small=True)
    block = page.saves_block({"save-tmpfs-1": saved(1), "save-tmpfs-4": saved(4)}, all_parts)
    assert block.count("| tmpfs | 1 |") == block.count("| tmpfs | 4 |") == 2
    assert (
        "| tmpfs | 4 | 0.100 | 0.200 | 0.000 | 0.500 | 0.000 | 0.000 | 0.000 | 1.20 | 2.00 |"
        in block
    )
    assert block.count("    python benchmarks/save.py --gib 0.05 --ranks N") == 1
    assert page.saves_block({}, all_parts) == page.NOT_MEASURED


def test_a_machine_is_named_without_the_file_system() -> None:
    machine = "A CPU, 2 cores, 24 GiB; tmpfs (22 GiB free); Linux 6, torch 2"
    assert page.without_place(machine) == "A CPU, 2 cores, 24 GiB; Linux 6, torch 2"


def test_a_block_replaces_only_what_is_between_its_marks() -> None:
    end = "<!-- figures: end -->"
    text = f"a\n<!-- figures: x -->\nold\n{end}\nb\n<!-- figures: y -->\nc\n{end}\n"
    written = page.write_block(text, "x", "new \\1\n")
    assert written == text.replace("\nold\n", "\n\nnew \\1\n\n")
    assert page.write_block(written, "x", "new \\1\n") == written
    with pytest.raises(ValueError, match="figures: z"):
        page.write_block(text, "z", "new")


def test_the_page_has_a_place_for_each_block() -> None:
    text = page.PAGE.read_text()
    for name in ("saves", "overhead", "scaling"):
        assert page.write_block(text, name, "new") != text


def test_a_part_whose_output_is_there_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = page.parts(is_small=True)[0]
    (tmp_path / f"{part.name}.json").write_text("{}")
    monkeypatch.setattr(page.subprocess, "run", None)
    page.measure(part, tmp_path)
    assert page.load_results(tmp_path, [part]) == {part.name: {}}


def test_a_part_that_fails_leaves_no_output(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(3)")
    part = page.Part("broken", str(script), ())
    with pytest.raises(page.subprocess.CalledProcessError):
        page.measure(part, tmp_path)
    assert sorted(tmp_path.iterdir()) == [script, tmp_path / "broken.txt"]


@pytest.mark.slow
def test_loops_see_saves_that_go_on_all_the_time(tmp_path: Path) -> None:
    setting = overhead.Setting(str(tmp_path), steps=4, batch=2, gib=0.01)
    found = overhead.measure(list(overhead.WAYS), setting, rounds=1)
    assert {way: len(rounds) for way, rounds in found.items()} == dict.fromkeys(overhead.WAYS, 1)
    for way, (one,) in found.items():
        assert len(one.drawn.steps) == 4
        assert bool(one.drawn.saves) == (way != "none")
        nbytes = one.nbytes / 0.01 / 2**30
        expected = {"none": 0, "torch": 1, "torch_id": 1}.get(way, 2)
        assert nbytes == pytest.approx(expected, abs=0.15)
    assert list(tmp_path.iterdir()) == []
