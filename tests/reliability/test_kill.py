"""The small version of `python -m tests.reliability.kill`."""

from __future__ import annotations

import pytest

from tests.reliability.kill import attempts


@pytest.mark.slow
def test_a_killed_run_loses_nothing() -> None:
    assert attempts(8, seed=1) == []
