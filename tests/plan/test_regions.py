"""What of a chunk goes where: looked up by its rows, nothing is missed and little is looked at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer import LoadSpec
from dcp_hf_writer.mapping.load_spec import Piece
from dcp_hf_writer.plan.layout import PartTarget
from dcp_hf_writer.plan.regions import RowIndex, TargetTable, chunk_regions
from dcp_hf_writer.tensors.boxes import Box
from dcp_hf_writer.tensors.strided_copies import Copy, copies_of, copy_of_box

if TYPE_CHECKING:
    from dcp_hf_writer.tensors.boxes import Shape

EXPERTS = 64


def target(key: str, shape: Shape, copies: tuple[Copy, ...]) -> PartTarget:
    return PartTarget(key, 0, 0, "F32", shape, copies)


@st.composite
def targets_of(draw: st.DrawFn, shape: Shape) -> list[PartTarget]:
    """Return targets of a tensor: any elements of it, in steps, or none."""
    numel = math.prod(shape)
    found = []
    for number in range(draw(st.integers(1, 5))):
        loops, start, reached = [], draw(st.integers(0, numel - 1)), 0
        for step in sorted(draw(st.lists(st.integers(1, numel), max_size=2, unique=True))):
            if step <= reached:
                # A loop that reaches into another has elements twice, which no spec may.
                continue
            extent = draw(st.integers(0, max(1, (numel - 1 - start - reached) // step)))
            reached += max(extent - 1, 0) * step
            loops.append((extent, step, step))
        if start + reached < numel:
            copies = copies_of(loops, hf_start=start, start=start, hf_shape=(numel,), shape=shape)
            found.append(target(f"k{number}", (numel,), copies))
    return found


@st.composite
def chunks_of(draw: st.DrawFn, shape: Shape) -> Box:
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    sizes = [draw(st.integers(0, n - start)) for start, n in zip(starts, shape, strict=True)]
    return Box(tuple(starts), tuple(sizes))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_table_finds_every_region(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=3)))
    targets = data.draw(targets_of(shape))
    chunks = data.draw(st.lists(chunks_of(shape), min_size=1, max_size=4))
    table = TargetTable(targets)
    for chunk in chunks:
        assert set(table.regions(chunk)) == set(chunk_regions(chunk, targets))
    if shape:
        rows = {(c.offsets[0], c.offsets[0] + c.sizes[0]) for c in chunks if c.numel}
        near = [targets[i] for i in RowIndex(targets).near_rows(frozenset(rows))]
        assert len({one.key for one in near}) == len(near)
        needed = {r.target.key for chunk in chunks for r in chunk_regions(chunk, targets)}
        assert needed <= {one.key for one in near}


def test_block_of_one_expert_is_looked_for_in_its_own_keys_alone() -> None:
    pieces = [
        Piece(f"{e}.{name}", (2, 3), ((6, 1, 1),), start=(2 * e + half) * 6)
        for e in range(EXPERTS)
        for half, name in enumerate(("gate", "up"))
    ]
    spec = LoadSpec("gate_up", global_shape=(EXPERTS, 4, 3), pieces=pieces)
    targets = [target(part.key, part.shape, part.copies) for part in spec.parts]
    table = TargetTable(targets)
    for expert in range(EXPERTS):
        chunk = Box((expert, 0, 0), (1, 4, 3))
        assert {t.key for t in table.near(chunk)} == {f"{expert}.gate", f"{expert}.up"}
    # Every second one, as ranks hold experts that are dealt out.
    near = RowIndex(targets).near_rows(frozenset((e, e + 1) for e in range(0, EXPERTS, 2)))
    assert {targets[i].key.partition(".")[0] for i in near} == {
        str(e) for e in range(0, EXPERTS, 2)
    }


def test_scalar_goes_to_all_of_its_targets() -> None:
    copies = (copy_of_box(Box((), ())),)
    table = TargetTable([target("a", (), copies), target("b", (), copies)])
    assert [region.target.key for region in table.regions(Box((), ()))] == ["a", "b"]
