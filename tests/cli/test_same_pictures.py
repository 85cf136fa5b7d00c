"""Pictures, meshes and records of the packaged models stay what they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cli.same_pictures import COMMANDS, REFERENCE, VOLATILE

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "import json, sys; from pathlib import Path; from tests.cli import same_pictures as s; "
    "print(json.dumps({'machine': s.machine(), 'results': s.run_all(Path(sys.argv[1]))}))"
)


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the commands write today, made in a process with one thread from its start."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path_factory.mktemp("same"))],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_same_pictures(line: str, now: dict) -> None:
    before = json.loads(REFERENCE.read_text())
    then, result = before["results"][line], now["results"][line]
    assert result["report"] == then["report"]
    assert set(result["files"]) == set(then["files"])
    for name, file in result["files"].items():
        reference = then["files"][name]
        recorded = {key: value for key, value in reference["record"].items() if key not in VOLATILE}
        assert {key: file["record"].get(key) for key in recorded} == recorded
        if now["machine"] == before["machine"]:
            assert file["sha256"] == reference["sha256"], name
        else:  # another processor or PyTorch rounds differently
            assert np.abs(np.subtract(file["coarse"], reference["coarse"])).max() <= 3, name
