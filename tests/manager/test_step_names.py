"""Names of step directories: what is read back, and what is nobody's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.manager.step_names import StepNames


@given(step=st.integers(0, 10**12), prefix=st.sampled_from(["step-", "checkpoint-", "global_"]))
def test_name_gives_its_step_back(step: int, prefix: str) -> None:
    names = StepNames(prefix)
    assert names.step_of(names.name_of(step)) == step
    assert names.snapshot_step_of(names.snapshot_name_of(step)) == step
    assert names.step_of(names.snapshot_name_of(step)) is None


@pytest.mark.parametrize(
    "name", ["step-", "step-007", "step--1", "step-1.old", "xstep-1", "step-\u0661", "latest"]
)
def test_other_names_are_no_steps(name: str) -> None:
    assert StepNames().step_of(name) is None


@pytest.mark.parametrize("prefix", ["", "step", "a/b-", ".incomplete-", "snapshot-", "-"])
def test_prefix_that_would_be_ambiguous_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError):
        StepNames(prefix)
