"""The prefix by which two sets of names differ."""

from __future__ import annotations

import pytest

from dcp_hf_writer.load.name_prefixes import prefix_difference

LACKS = "its names lack the prefix {!r} of the state dict"
HAS = "its names have the prefix {!r}, which the state dict lacks"


@pytest.mark.parametrize(
    ("missing", "unexpected", "expected"),
    [
        (["net.a", "net.b.c"], ["a", "b.c"], LACKS.format("net.")),
        (["a", "b.c"], ["module.a", "module.b.c"], HAS.format("module.")),
        (["a.b.c.w"], ["w"], LACKS.format("a.b.c.")),
        (["base.a", "base.b", "head"], ["a", "b"], LACKS.format("base.")),
        (["base.a", "x", "y"], ["a", "p", "q", "r"], None),
        (["a"], ["b"], None),
        (["neta"], ["a"], None),
        (["net.a"], [], None),
        ([], ["a"], None),
    ],
)
def test_prefix_is_found_if_it_explains_half_of_the_names(
    missing: list[str], unexpected: list[str], expected: str | None
) -> None:
    assert prefix_difference(missing, unexpected) == expected
