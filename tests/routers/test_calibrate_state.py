"""Calibration that is stopped: continued to the same bundle, and the old bundle left valid."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import routers
from backbones.hunyuan3d.family import TRANSFORMER_2
from backbones.workloads import MeshWorkload
from routers import files
from routers.bundle import Bundle
from routers.calibrate.fit import FitSettings, fit
from routers.calibrate.gains import from_probes
from routers.calibrate.state import State
from routers.calibrate.workload import NotFiniteError
from routers.planned.prediction import DEAD, gains_at
from tests.cli.test_calibrate_mesh import STEPS, make_workload, picture
from tests.conftest import EDIT, edit_environment
from tests.fresh import TIMEOUT

SETTINGS = FitSettings(probes=8, tried=2)
ASKED = {"model": "m", "steps": 6, "weights": [1.0, 2.0]}


class Stopped(Exception):  # noqa: N818 - not an error
    """Stands for a kill."""


@pytest.fixture(scope="module")
def workload() -> MeshWorkload:
    return make_workload("2.0")


def run_fit(workload: MeshWorkload, state: State | None = None, stop: tuple[str, int] = ("", 0)) -> Bundle:
    def report(phase: str, done: int, total: int) -> None:
        if (phase, done) == stop:
            raise Stopped

    return fit(workload.pipe.transformer, TRANSFORMER_2, workload, "m", 5.0, SETTINGS, report, state)


class Counting(MeshWorkload):
    """Counts the batches it ran."""

    runs = 0

    def run(self, batch: int, *, num_steps: int | None = None) -> torch.Tensor:
        self.runs += 1
        return super().run(batch, num_steps=num_steps)


@pytest.fixture
def counting(workload: MeshWorkload) -> Counting:
    return Counting(**{name: getattr(workload, name) for name in workload.__dataclass_fields__})


@pytest.mark.parametrize(
    ("stop", "left"), [(("record", 1), 5), (("record", 2), 4), (("gains", 6), 1), (("plans", 3), 0)]
)
def test_a_continued_fit_gives_the_same_bundle(
    workload: MeshWorkload, counting: Counting, tmp_path: Path, stop: tuple[str, int], left: int
) -> None:
    reference = replace(counting)
    whole = run_fit(reference)
    trials = reference.runs - 6
    state = State(tmp_path / "state")
    assert state.begin(ASKED, resume=False) is False
    with pytest.raises(Stopped):
        run_fit(workload, state, stop)
    again = State(tmp_path / "state")
    assert again.begin(ASKED, resume=True) is True
    done = len(json.loads((tmp_path / "state" / "trials.json").read_text())) if stop[0] == "plans" else 0
    assert (done > 0) == (stop[0] == "plans")
    bundle = run_fit(counting, again)
    assert counting.runs == left + trials - done, "2 dense batches and 4 of probes, then trials of plans"
    for name in ("gram", "gain", "mixing", "plans"):
        assert np.array_equal(getattr(bundle.moments, name), getattr(whole.moments, name))
    assert bundle.metadata == whole.metadata and bundle.times == whole.times


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 8}, "has another steps: it was 6, now it is 8; ask for the same"),
        ({"model": "n"}, "has another model: it was 'm', now it is 'n'"),
        ({"weights": [1.0, 2.5]}, "has another weights; ask for the same, or leave out --resume"),
        ({"size": "8x8"}, "has another size: it was None, now it is '8x8'"),
    ],
)
def test_a_state_of_something_else_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    State(tmp_path / "state").begin(ASKED, resume=False)
    with pytest.raises(ValueError, match="unfinished calibration") as error:
        State(tmp_path / "state").begin({**ASKED, **change}, resume=True)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["request.json", "gains.json", "record-0000.safetensors"])
def test_a_damaged_state_is_named(workload: MeshWorkload, tmp_path: Path, name: str) -> None:
    state = State(tmp_path / "state")
    state.begin(ASKED, resume=False)
    with pytest.raises(Stopped):
        run_fit(workload, state, ("gains", 2))
    file = state.folder / name
    file.write_bytes(file.read_bytes()[:9])

    def continued() -> None:
        again = State(state.folder)
        again.begin(ASKED, resume=True)
        run_fit(workload, again)

    with pytest.raises(ValueError, match="is damaged; leave out --resume to start anew") as error:
        continued()
    assert name in str(error.value)


def test_beginning_anew_forgets_the_earlier_attempt(workload: MeshWorkload, tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    state.begin(ASKED, resume=False)
    with pytest.raises(Stopped):
        run_fit(workload, state, ("gains", 2))
    again = State(state.folder)
    again.begin(ASKED, resume=False)
    assert again.batch(0) is None and again.probes(0) is None
    again.discard()
    assert list(tmp_path.iterdir()) == []


def test_nan_names_batch_and_step(workload: MeshWorkload) -> None:
    """From one step on the model gives NaN, as fp16 does when it overflows."""
    calls = 0

    def poison(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls > STEPS + 2 else output

    handle = workload.pipe.transformer.single_blocks[-1].register_forward_hook(poison)
    try:
        with pytest.raises(
            NotFiniteError, match=rf"in batch 2 of 2, step \d of {STEPS}; nothing was written"
        ):
            run_fit(workload)
    finally:
        handle.remove()
    assert "_edit_elastic" not in workload.pipe.transformer.__dict__


def test_infinite_latents_name_the_probed_steps(
    workload: MeshWorkload, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Counting):
        def run(self, batch: int, *, num_steps: int | None = None) -> torch.Tensor:
            latents = super().run(batch, num_steps=num_steps)
            return latents / 0 if self.runs > 3 else latents

    late = Late(**{name: getattr(workload, name) for name in workload.__dataclass_fields__})
    with pytest.raises(NotFiniteError, match=r"batch 2 of 2 \(gains, predicting steps 4, 5"):
        run_fit(late)


def test_steps_without_effect_leave_the_other_gains_alone() -> None:
    found = [(s, 1.0) for s in (1, 2, 3)] + [(4, float("-inf")), (4, -30.0)]  # none, and rounding
    gain = from_probes(found, 5)
    assert gain[:4] == pytest.approx(np.full(4, np.e)) and gain[4] == pytest.approx(DEAD * np.e)
    longer = gains_at(gain, 11)  # one step without effect there too
    assert longer[:10] == pytest.approx(np.full(10, np.e)) and longer[10] == gain[4]
    assert gains_at(np.array([1.0, 2.0, 4.0]), 5) == pytest.approx(2.0 ** np.array([0, 0.5, 1, 1.5, 2]))


def test_a_full_disk_leaves_the_old_bundle(
    workload: MeshWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = run_fit(workload)
    bundle.save(tmp_path / "b")
    before = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    other = replace(bundle, moments=replace(bundle.moments, gram=2 * bundle.moments.gram))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)  # the second of the two files
        with pytest.raises(OSError, match="No space left"):
            other.save(tmp_path / "b")
    assert {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()} == before
    routers.load_bundle(tmp_path / "b")


def test_safetensors_errors_are_os_errors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def write(_path: str) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / "nowhere" / "x")

    with pytest.raises(OSError, match=r"\w"):
        files.write_whole({tmp_path / "x": write})
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_the_old_bundle_and_resume_continues(
    edit_here, mesh_folder: Path, tmp_path: Path
) -> None:
    """The command killed after its first batches, then continued."""
    (tmp_path / "pictures").mkdir()
    picture("red").save(tmp_path / "pictures" / "red.png")
    routers.load_bundle(mesh_folder / "routers").save(tmp_path / "b")
    before = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    command = [
        "calibrate", "-m", str(mesh_folder), "--images", "pictures", "-o", "b", "--samples", "4",
        "--batch-size", "1", "--budgets", "0.5:1:2", "--json", "--plan-samples", "0", "--probes",
    ]  # fmt: skip
    state = tmp_path / ".b.calibrate-state"
    with subprocess.Popen([EDIT, *command, "20000"], cwd=tmp_path, env=edit_environment()) as process:
        deadline = time.monotonic() + TIMEOUT
        while not (state / "gains.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline, "no progress was kept"
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()} == before
    assert len(list(state.glob("record-*.safetensors"))) == 4
    ran = edit_here(*command, "8", "--resume", cwd=tmp_path)
    assert ran.code == 2 and "has another probes: it was 20000, now it is 8" in ran.err
    request = json.loads((state / "request.json").read_text())
    (state / "request.json").write_text(json.dumps({**request, "probes": 8}))
    ran = edit_here(*command, "8", "--resume", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert not state.exists()
    assert (tmp_path / "b" / "bundle.json").read_bytes() != before["bundle.json"]
    assert routers.load_bundle(tmp_path / "b").moments.branches == ("cond", "uncond")
