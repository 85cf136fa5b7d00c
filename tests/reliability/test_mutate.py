"""The small version of `python -m tests.reliability.mutate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.mutate import KINDS, run


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_undamaged_files_are_read(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    kind.read(kind.make(tmp_path))


@pytest.mark.slow
def test_damaged_files_are_refused_in_one_line_or_read_right() -> None:
    outcomes, failures = run(200)
    assert failures == []
    assert all(counts["refused"] for counts in outcomes.values())
