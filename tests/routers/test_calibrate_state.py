"""Calibration that is stopped: continued to the same bundle, and the old bundle left valid."""

from __future__ import annotations

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
from routers.calibrate.fit import fit
from routers.calibrate.settings import FitSettings
from routers.calibrate.state import State
from routers.calibrate.workload import NotFiniteError
from tests.conftest import EDIT, edit_environment
from tests.fresh import TIMEOUT
from tests.tiny_workloads import mesh_workload, picture

SETTINGS = FitSettings(budgets=(0.2, 0.4, 0.6), targets=("dense", "exact"), tries=2)
ASKED = {"model": "m", "steps": 6, "weights": [1.0, 2.0]}


class Stopped(Exception):  # noqa: N818 - not an error
    """Stands for a kill."""


@pytest.fixture(scope="module")
def workload() -> MeshWorkload:
    return mesh_workload()


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


@pytest.fixture(scope="module")
def whole(workload: MeshWorkload) -> tuple[Bundle, int]:
    """The bundle of a fit in one go, and how many runs that takes."""
    reference = Counting(**{name: getattr(workload, name) for name in workload.__dataclass_fields__})
    return run_fit(reference), reference.runs


@pytest.mark.parametrize(
    ("stop", "made"),
    [(("record dense", 0), 0), (("plans, dense", 1), 2), (("plans, exact", 0), 5), (("plans, exact", 1), 6)],
)
def test_a_continued_fit_gives_the_same_bundle(
    workload: MeshWorkload, counting: Counting, whole, tmp_path: Path, stop: tuple[str, int], made: int
) -> None:
    """made: parts that were finished, a recording or a plan, before it stopped."""
    reference, runs = whole
    state = State(tmp_path / "state")
    assert state.begin(ASKED, resume=False) is False
    first = replace(counting)
    with pytest.raises(Stopped):
        run_fit(first, state, stop)
    kept = len(list(state.folder.glob("*.safetensors")))
    again = State(tmp_path / "state")
    assert again.begin(ASKED, resume=True) is True
    bundle = run_fit(counting, again)
    assert counting.runs == runs - first.runs, "nothing that was finished is run again"
    assert (first.runs > 0) == (made > 0) and kept == made
    assert bundle.plans.keys() == reference.plans.keys() and bundle.warps == reference.warps
    for target, plans in reference.plans.items():
        assert bundle.plans[target].keys() == plans.keys()
        for evaluations, plan in plans.items():
            for name, array in bundle.plans[target][evaluations].to_arrays().items():
                assert np.array_equal(array, plan.to_arrays()[name])
    assert bundle.metadata == reference.metadata and bundle.times == reference.times


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


NAMES = ["request.json", "record-dense.safetensors", "plan-dense-2.safetensors"]


@pytest.fixture(scope="module")
def stopped(workload: MeshWorkload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fit that was stopped after its first plan leaves."""
    state = State(tmp_path_factory.mktemp("stopped") / "state")
    state.begin(ASKED, resume=False)
    with pytest.raises(Stopped):
        run_fit(workload, state, ("plans, dense", 1))
    assert sorted(file.name for file in state.folder.iterdir()) == sorted(NAMES)
    return state.folder


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_state_is_named(workload: MeshWorkload, stopped: Path, name: str) -> None:
    file = stopped / name
    before = file.read_bytes()
    file.write_bytes(before[:9])

    def continued() -> None:
        again = State(stopped)
        again.begin(ASKED, resume=True)
        run_fit(workload, again)

    try:
        with pytest.raises(
            ValueError, match="leave out --resume and give --overwrite to start anew"
        ) as error:
            continued()
        assert name in str(error.value)
    finally:
        file.write_bytes(before)


def test_beginning_anew_forgets_the_earlier_attempt(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    state.begin(ASKED, resume=False)
    state.keep("record-dense", {"times": torch.zeros(2)})
    assert state.get("record-dense") is not None
    again = State(state.folder)
    again.begin(ASKED, resume=False)
    assert again.get("record-dense") is None
    again.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("late", [False, True], ids=["in the dense run", "in a plan's run"])
def test_nan_is_named_and_the_pipeline_left_whole(workload: MeshWorkload, tmp_path: Path, late: bool) -> None:
    """From one call on the model gives NaN, as fp16 does when it overflows."""
    state, calls, own = State(tmp_path / "state"), 0, workload.pipe.scheduler
    state.begin(ASKED, resume=False)

    def poison(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls > (6 if late else 2) else output

    handle = workload.pipe.transformer.single_blocks[-1].register_forward_hook(poison)
    try:
        with pytest.raises(NotFiniteError, match=r"NaN or infinite values in the final latents.*nothing was"):
            run_fit(workload, state)
    finally:
        handle.remove()
    kept = [file.stem for file in state.folder.glob("*.safetensors")]
    assert kept == (["record-dense"] if late else []), "what is damaged is not kept"
    assert workload.pipe.scheduler is own


def test_a_full_disk_leaves_the_old_bundle(whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = whole
    bundle.save(tmp_path / "b")
    before = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    other = replace(bundle, plans={"dense": bundle.plans["dense"]})

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


@pytest.mark.slow
def test_a_kill_leaves_the_old_bundle_and_resume_continues(mesh_folder: Path, tmp_path: Path) -> None:
    """The command killed after its first recording, then continued."""
    (tmp_path / "pictures").mkdir()
    picture("red").save(tmp_path / "pictures" / "red.png")
    routers.load_bundle(mesh_folder / "routers").save(tmp_path / "b")
    before = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    command = [
        str(EDIT), "calibrate", "-m", str(mesh_folder), "--images", "pictures", "-o", "b", "--steps", "30",
        "--target", "both", "--json", "--overwrite", "--samples",
    ]  # fmt: skip
    state = tmp_path / ".b.calibrate-state"
    arguments = {"cwd": tmp_path, "env": edit_environment(), "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "4"], stderr=subprocess.PIPE, **arguments) as process:
        deadline = time.monotonic() + TIMEOUT
        while not (state / "record-dense.safetensors").exists() and process.poll() is None:
            assert time.monotonic() < deadline, "no progress was kept"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()} == before
    assert (state / "request.json").exists(), "killed before it was done"
    ran = subprocess.run(
        [*command, "3", "--resume"], stderr=subprocess.PIPE, timeout=TIMEOUT, check=False, **arguments
    )
    assert ran.returncode == 2 and "the unfinished calibration in" in ran.stderr
    ran = subprocess.run(
        [*command, "4", "--resume"], stderr=subprocess.PIPE, timeout=TIMEOUT, check=False, **arguments
    )
    assert ran.returncode == 0, ran.stderr
    assert not state.exists()
    made = routers.load_bundle(tmp_path / "b")
    assert made.num_steps == 30 and set(made.plans) == {"dense", "exact"}
