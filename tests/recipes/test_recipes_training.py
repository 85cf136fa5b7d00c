"""The training loop of the recipes: it stops in time, resumes, averages, refuses what is not finite."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from backbones.tiny.recipes import training
from backbones.tiny.recipes.training import Loop, Step, optimizers_for

INPUTS = torch.arange(8.0).view(2, 4)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that only tests move."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(training, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def make(folder, **options) -> Loop:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizers = optimizers_for(model, 0.01, lambda _, p: p.dim() == 2)
    return Loop(**{
        "name": "test", "model": model, "optimizers": optimizers, "checkpoint": folder / "last.pt",
        "minutes": 1.0, "lr": 0.01, "ema": 0.9, **options,
    })  # fmt: skip


def take(loop: Loop, clock: SimpleNamespace | None = None, seconds: float = 0.0):
    def one(progress: float) -> Step:
        if clock:
            clock.now += seconds
        return Step(loop.model(INPUTS).square().mean(), len(INPUTS), {"progress": progress})

    return one


def test_a_resumed_run_is_the_run_it_continues(tmp_path, clock):
    """Weights, momenta, EMA and the clock go on as if there had been no pause."""
    whole = make(tmp_path / "whole")
    whole.run(take(whole, clock, 10.0))
    half = make(tmp_path / "parts", minutes=0.5, schedule=lambda progress, step: 1.0)
    half.run(take(half, clock, 10.0))
    assert (half.step, half.used) == (3, 30.0)
    clock.now += time.time()  # a pause of any length
    rest = make(tmp_path / "parts", schedule=lambda progress, step: 1.0)
    assert (rest.step, rest.used, rest.progress) == (3, 30.0, 0.5)
    for name, p in half.params.items():
        assert torch.equal(rest.params[name], p)
        assert torch.equal(rest.average[name], half.average[name])
    rest.run(take(rest, clock, 10.0))
    straight = make(tmp_path / "straight", schedule=lambda progress, step: 1.0)
    straight.run(take(straight, clock, 10.0))
    assert (rest.step, rest.used) == (straight.step, straight.used) == (whole.step, 60.0) == (6, 60.0)
    for name, p in straight.params.items():
        assert torch.equal(rest.params[name], p)
        assert torch.equal(rest.average[name], straight.average[name])
        assert not torch.equal(whole.params[name], p)  # another schedule


@pytest.mark.parametrize(("ema_start", "decays"), [(0, (1 / 21, 2 / 22)), (1, (2 / 21, 3 / 22))])
def test_the_average_starts_short_and_grows(tmp_path, ema_start, decays):
    loop = make(tmp_path, max_steps=2, ema_start=ema_start)
    expected, weights = loop.model.weight.detach().clone(), []
    step = take(loop)

    def watched(progress: float) -> Step:
        weights.append(loop.model.weight.detach().clone())
        return step(progress)

    loop.run(watched)
    weights.append(loop.model.weight.detach().clone())
    for decay, weight in zip(decays, weights[1:], strict=True):
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(loop.average["weight"], expected, atol=1e-6)
    with loop.averaged() as model:
        assert torch.allclose(model.weight, expected, atol=1e-6)
        assert not model.training
    assert torch.equal(loop.model.weight, weights[-1])
    assert loop.model.training
    assert torch.allclose(loop.load_average().weight, expected, atol=1e-6)


def test_time_is_up_when_it_is_and_checks_are_off_the_clock(tmp_path, clock, capsys):
    checks = []

    def check() -> None:
        checks.append(loop.step)
        clock.now += 1000.0

    loop = make(tmp_path, log_every=2)
    loop.run(take(loop, clock, 25.0), check, check_minutes=0.5)
    assert (loop.step, loop.used) == (3, 75.0)  # one step past the minute, none more
    assert checks == [2]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" loss")[0] for line in lines] == ["test: step 2 83.3%", "test: step 3 100.0%"]
    assert lines[1].endswith(" 0/s") and "progress 0.8333" in lines[1]
    loop = make(tmp_path)
    loop.run(take(loop, clock, 25.0))
    assert loop.step == 3


def test_long_runs_save_on_the_way(tmp_path, clock):
    loop = make(tmp_path, minutes=10.0)

    def interrupted(progress: float) -> Step:
        if loop.step == 4:
            raise KeyboardInterrupt
        return take(loop, clock, 50.0)(progress)

    with pytest.raises(KeyboardInterrupt):
        loop.run(interrupted)
    assert make(tmp_path).step == 3  # after 150 s
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backward_only", [False, True])
def test_numbers_that_are_not_finite_end_the_run_before_they_are_saved(tmp_path, value, backward_only):
    first = make(tmp_path, max_steps=2)
    first.run(take(first))
    loop = make(tmp_path, max_steps=4)
    start = loop.model.weight.detach().clone()

    def broken(progress: float) -> Step:
        taken = take(loop)(progress)
        if backward_only:
            taken.loss.register_hook(lambda grad: grad * value)
        else:
            taken.loss = taken.loss * value
        return taken

    with pytest.raises(SystemExit, match=r"test: step 3 has loss .* gradient norm .* --lr below 0\.01"):
        loop.run(broken)
    assert torch.equal(loop.model.weight, start)
    assert make(tmp_path).step == 2


def test_schedules_warm_up_and_end_low():
    assert training.cosine(0.0, 0) == pytest.approx(0.02)
    assert training.cosine(0.0, 49) == training.constant(0.5, 149) == 1.0
    assert training.cosine(0.5, 99, warm_up=100, floor=0.0) == pytest.approx(0.5)
    assert training.constant(0.3, 74) == 0.5
    assert training.constant(0.75, 1000, decay_from=0.5) == pytest.approx(0.51)
    assert training.cosine(1.0, 1000) == training.constant(1.0, 1000) == pytest.approx(0.02)


def test_muon_takes_what_it_is_given_and_adamw_the_other_trainable_weights():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].bias.requires_grad_(False)
    muon, adam = optimizers_for(model, 0.01, lambda name, p: name == "1.weight", {"weight_decay": 0.1})
    assert muon.param_groups[0]["params"] == [model[1].weight]
    assert [id(p) for p in adam.param_groups[0]["params"]] == [id(p) for p in model[0].parameters()]
    assert adam.param_groups[0]["weight_decay"] == 0.1
    assert adam.param_groups[0]["betas"] == (0.9, 0.95)
