"""Bundles: round trip, one file, one line for what is damaged or does not fit, and when plans are used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import routers
from routers.attachment import architecture, fingerprint
from routers.bundle import Bundle, pack
from routers.planned.grid import OnGrid
from routers.planned.sampled import Sampled
from routers.planned.timeplan import TimePlan, moving
from routers.planned.universal import universal_plan, universal_planner
from tests.block_kinds import CASES
from tests.routers.packaged import FLUX, load, make

QWEN = CASES[0]
GRID = np.linspace(1, 0, 9)
WARPS = {"dense": (3.0, 1.0), "exact": (3.0, 1.0)}


def plans(grid: np.ndarray, *evaluations: int) -> dict[str, dict[int, TimePlan]]:
    """Plans that are not the universal ones: their weights are a little off."""
    made = {}
    for target in ("dense", "exact"):
        for n in evaluations:
            plan = universal_plan(grid, n, target)
            shifted = TimePlan(plan.times, 1.01 * plan.weights, plan.state)
            made.setdefault(target, {})[n] = shifted
    return made


def make_bundle(model: torch.nn.Module, grid: np.ndarray = GRID, **changes: Any) -> Bundle:
    fields: dict[str, Any] = {
        "spec": QWEN.spec,
        "base_model": "qwen-test",
        "architecture": architecture(model),
        "fingerprint": fingerprint(model),
        "num_steps": len(grid) - 1,
        "guidance": 4.0,
        "times": grid.tolist(),
        "plans": plans(grid, 3, 5),
        "warps": WARPS,
        "min_budget": 0.25,
        "recommended_budget": 0.7,
        "metadata": {"rows": 8},
    }
    return Bundle(**{**fields, **changes})


@pytest.fixture
def model() -> torch.nn.Module:
    return QWEN.transformer()


@pytest.fixture
def folder(model: torch.nn.Module, tmp_path: Path) -> Path:
    make_bundle(model).save(tmp_path / "b")
    return tmp_path / "b"


def same_plans(a: Bundle, b: Bundle) -> bool:
    def arrays(bundle: Bundle) -> dict[tuple[str, int, str], list]:
        return {
            (target, n, name): array.tolist()
            for target, each in bundle.plans.items()
            for n, plan in each.items()
            for name, array in plan.to_arrays().items()
        }

    return arrays(a) == arrays(b)


# -- files --------------------------------------------------------------------------------------


def test_round_trip(model: torch.nn.Module, folder: Path) -> None:
    bundle, loaded = make_bundle(model), routers.load_bundle(folder)
    for name in ("spec", "times", "warps", "fingerprint", "num_steps", "min_budget", "metadata"):
        assert getattr(loaded, name) == getattr(bundle, name)
    assert same_plans(loaded, bundle) and sorted(loaded.plans["dense"]) == [3, 5] and loaded.trained is None
    assert len(loaded.digest) == 64 and loaded.path == str(folder)
    assert json.loads((folder / "bundle.json").read_text())["format"] == 5
    assert sorted(p.name for p in folder.iterdir()) == ["bundle.json", "routers.safetensors"]
    plain = folder.parent / "plain"
    plain.touch()
    assert all(p.stat().st_mode == plain.stat().st_mode for p in folder.iterdir())


def test_one_file_is_the_same_bundle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    pack(folder, tmp_path / "hub" / "one.safetensors")
    whole = routers.load_bundle(folder)
    for place in (tmp_path / "hub" / "one.safetensors", tmp_path / "hub"):
        one = routers.load_bundle(place)
        assert same_plans(one, whole) and one.warps == whole.warps and one.times == whole.times
        assert one.path == str(tmp_path / "hub" / "one.safetensors")
    again = tmp_path / "again.safetensors"
    pack(folder, again)
    assert routers.load_bundle(again).digest == one.digest, "a digest is of what is in it"
    shutil.rmtree(tmp_path / "hub")
    assert same_plans(one, whole), "read whole"


def _text(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / "bundle.json").read_text())
        change(data)
        (folder / "bundle.json").write_text(json.dumps(data))

    return damage


def _tensors(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "routers.safetensors")
        change(tensors)
        save_file(tensors, folder / "routers.safetensors")
        _text(lambda d: d.pop("sha256"))(folder)  # as in bundles that do not know the hash of their weights

    return damage


def _weights(
    change: Callable[[torch.Tensor], torch.Tensor], name: str = "weights"
) -> Callable[[Path], object]:
    key = f"plans.dense.3.{name}"
    return _tensors(lambda t: t.update({key: change(t[key])}))


def _moved(t: dict, old: str, new: str) -> None:
    for key in [key for key in t if key.startswith(old)]:
        t[key.replace(old, new)] = t.pop(key)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda f: (f / "routers.safetensors").write_bytes(b"\x10"), "Safetensor"),
    "no tensors": (lambda f: (f / "routers.safetensors").unlink(), "routers.safetensors is missing"),
    "no text": (lambda f: (f / "bundle.json").unlink(), "bundle.json is missing"),
    "half a text": (lambda f: (f / "bundle.json").write_text("{"), "bundle.json is not complete JSON"),
    "a list": (lambda f: (f / "bundle.json").write_text("[]"), "bundle.json: expected object, got array"),
    "bytes": (lambda f: (f / "bundle.json").write_bytes(b"\xff\xfe"), "UnicodeDecodeError"),
    "later": (_text(lambda d: d.update(format=99)), "format 99, this version reads 5 and 3"),
    "earlier": (_text(lambda d: d.update(format=4)), r"format 4, .*make it again with: edit calibrate"),
    "other weights": (
        lambda f: save_file({"x": torch.zeros(1)}, f / "routers.safetensors"),
        "sha256: routers.safetensors is not the file that it was written with",
    ),
    "no fingerprint": (_text(lambda d: d.update(fingerprint=None)), "fingerprint: expected array, got null"),
    "minus one steps": (_text(lambda d: d.update(num_steps=-1)), "num_steps: expected int >= 1"),
    "a large weight": (_weights(lambda w: w * 1e6), r"the plan dense\.3: it has a weight above 10000"),
    "an escape code": (_text(lambda d: d.update(base_model="\x1b[31m")), "base_model: holds characters"),
    "10,000 deep": (
        lambda f: (f / "bundle.json").write_text('{"a":' * 10_000),
        "bundle.json is nested too deeply",
    ),
    "no spec": (_text(lambda d: d.pop("spec")), "bundle.json: missing required field spec"),
    "no times": (_text(lambda d: d.pop("times")), "bundle.json: missing required field times"),
    "odd spec": (
        _text(lambda d: d["spec"].update(colour="red")),
        r"spec: unknown keys \['colour'\]",
    ),
    "words as times": (
        _text(lambda d: d.update(times=["one", "zero"])),
        r"bundle.json: times\[0\]: expected float, got str",
    ),
    "NaN as a time": (
        _text(lambda d: d["times"].__setitem__(3, float("nan"))),
        "bundle.json is not complete JSON: .*invalid character",
    ),
    "no times at all": (_text(lambda d: d.update(times=[])), r"the plan \w+\.\d: it begins or ends at other"),
    "a warp of one number": (
        _text(lambda d: d.update(warps={"dense": [1.0]})),
        "warps.*array of length 2",
    ),
    "a warp of zero": (_text(lambda d: d.update(warps={"dense": [0, 1]})), r"warps.*expected float > 0.0"),
    "a warp of nothing": (
        _text(lambda d: d.update(warps={"sharp": [1, 1]})),
        "warps.*invalid enum value 'sharp'",
    ),
    "no state": (
        _tensors(lambda t: t.pop("plans.dense.3.state")),
        r"dense\.3: a plan in time without 'state'",
    ),
    "an infinity": (_weights(lambda w: w / 0), r"the plan dense\.3: a plan's times and weights are finite"),
    "too few weights": (_weights(lambda w: w[:-1].contiguous()), r"the plan dense\.3: .*make a plan"),
    "times that rise": (_weights(lambda t: t.flip(0), "times"), r"the plan dense\.3: .*do not decrease"),
    "another run's": (
        _weights(lambda t: t / 2, "times"),
        r"the plan dense\.3: it begins or ends at other times",
    ),
    "another number": (
        _tensors(lambda t: _moved(t, "plans.dense.3", "plans.dense.4")),
        r"the plan dense\.4: it makes 3 evaluations",
    ),
    "another target": (
        _tensors(lambda t: _moved(t, "plans.dense.3", "plans.sharp.3")),
        r"the plan sharp\.3: .*targets are",
    ),
    "a name cut short": (
        _tensors(lambda t: t.update({"plans.dense": torch.zeros(1)})),
        r"the plan dense\.: ",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_bundles_say_what_is_wrong(folder: Path, what: str) -> None:
    damage, message = DAMAGES[what]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        routers.load_bundle(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"nothing", "Safetensor"), (None, "its header has no 'edit_bundle'")]
)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "x.safetensors"
    if content is None:
        save_file({"x": torch.zeros(1)}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        routers.load_bundle(file)
    assert str(file) in str(error.value)


# -- what it fits -------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.0, 0.1, 1.5, float("nan")])
def test_budgets_outside_the_bundle_are_refused(model: torch.nn.Module, budget: float) -> None:
    with pytest.raises(ValueError, match=r"outside what this bundle serves: 0\.25 to 1"):
        routers.attach(model, make_bundle(model), budget=budget)


def test_other_models_are_refused(model: torch.nn.Module) -> None:
    bundle = make_bundle(model)
    with pytest.raises(ValueError, match="made for qwen-test"):
        routers.attach(CASES[1].transformer(), bundle, budget=0.6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(ValueError, match=r"a LoRA fused into it.*--force"):
        routers.attach(model, bundle, budget=0.6)
    routers.attach(model, bundle, budget=0.6, force=True).detach()


def test_half_precision_is_the_same_model(model: torch.nn.Module) -> None:
    bundle = make_bundle(model)
    routers.attach(model.to(torch.bfloat16), bundle, budget=0.6).detach()


def test_a_bare_transformer_has_the_bundles_steps_and_budget(model: torch.nn.Module) -> None:
    dense = QWEN.run(model)
    on_grid = routers.attach(model, make_bundle(model))
    assert isinstance(on_grid, OnGrid) and (on_grid.budget, on_grid.num_steps) == (0.7, 8)
    for t in GRID[:-1]:
        QWEN.run(model, t=float(t))
    assert on_grid.trace is not None and on_grid.trace.spent == [5 / 8]
    on_grid.detach()
    assert torch.equal(dense, QWEN.run(model))


# -- when its plans are used --------------------------------------------------------------------


def test_a_plan_is_used_for_the_times_it_was_fitted_for(model: torch.nn.Module) -> None:
    bundle = make_bundle(model)
    for target in ("dense", "exact"):
        for grid in (GRID, GRID + np.array([0.0, *([1e-3] * 7), 0.0])):
            assert bundle.planner(0.4, target)(grid) is bundle.plans[target][3]
            assert bundle.planner(0.7, target)(grid) is bundle.plans[target][5]


@pytest.mark.parametrize("target", ["dense", "exact"])
def test_elsewhere_the_universal_plan_with_the_bundles_warp_stands_in(
    model: torch.nn.Module, target: str
) -> None:
    bundle = make_bundle(model)
    longer, other, part = np.linspace(1, 0, 13), GRID**1.2, GRID[2:]
    for grid, budget in ((longer, 0.25), (other, 0.4), (part, 0.5), (GRID, 0.5)):
        stands_in = bundle.planner(budget, target)(grid)
        expected = universal_planner(budget, target, WARPS[target])(grid)
        assert np.array_equal(stands_in.times, expected.times)
        assert np.array_equal(stands_in.weights, expected.weights)
    plain = make_bundle(model, warps={}).planner(0.5, target)(longer)
    assert np.array_equal(plain.times, universal_planner(0.5, target)(longer).times)
    warped = make_bundle(model, warps={}).planner(0.5, target, (0.5, 1.0))(longer)  # as the scheduler knows
    assert not np.array_equal(plain.times, warped.times)
    assert not np.array_equal(plain.times, bundle.planner(0.5, target)(longer).times)
    assert bundle.planner(1.0, "dense")(GRID) is None


@pytest.fixture
def flux_bundle(tmp_path: Path) -> Path:
    """Of the packaged FLUX model, for eight steps."""
    pipe = load(FLUX)
    make(pipe, 8)
    grid = np.array(pipe.scheduler.sigmas.tolist())
    make_bundle(pipe.transformer, moving(grid)).save(tmp_path / "b")
    return tmp_path / "b"


def test_a_pipeline_follows_the_bundles_plan(flux_bundle: Path) -> None:
    pipe, bundle = load(FLUX), routers.load_bundle(flux_bundle)
    universal = routers.attach(pipe, budget=0.4)
    plain = {steps: make(pipe, steps) for steps in (8, 5)}
    universal.detach()
    sampled = routers.attach(pipe, flux_bundle, budget=0.4)
    try:
        assert isinstance(sampled, Sampled)
        own = make(pipe, 8)
        assert sampled.trace is not None and sampled.trace.spent == [3 / 8]
        assert sampled.scheduler.plan.weights.tolist() == bundle.plans["dense"][3].weights.tolist()
        assert not torch.equal(own, plain[8])
        make(pipe, 5)
        assert sampled.trace.spent == [2 / 5] and sampled.scheduler.plan.is_consistent()
    finally:
        sampled.detach()
    recommended = routers.attach(pipe, bundle)
    assert recommended.budget == 0.7
    recommended.detach()


def test_a_compiled_transformer_is_the_model_that_it_was(flux_bundle: Path) -> None:
    pipe = load.__wrapped__(FLUX)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    sampled = routers.attach(pipe, flux_bundle, budget=0.4)
    assert isinstance(sampled, Sampled)
    sampled.detach()
