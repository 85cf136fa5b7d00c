"""Bundles: round trip, and one clear line for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import routers
from routers.attachment import architecture, fingerprint
from routers.bundle import Bundle
from routers.router import Router
from tests.block_kinds import CASES
from tests.tiny_pipelines import make_moments

QWEN = CASES[0]


def make_bundle(model: torch.nn.Module) -> Bundle:
    return Bundle(
        spec=QWEN.spec,
        moments=make_moments(("cond", "uncond"), 20),
        base_model="qwen-test",
        architecture=architecture(model),
        fingerprint=fingerprint(model),
        num_steps=20,
        guidance=4.0,
        recommended_budget=0.7,
        metadata={"rows": 8},
    )


@pytest.fixture
def model() -> torch.nn.Module:
    return QWEN.transformer()


def test_round_trip(model: torch.nn.Module, tmp_path: Path) -> None:
    bundle = make_bundle(model)
    bundle.save(tmp_path / "b")
    loaded = routers.load_bundle(tmp_path / "b")
    assert loaded.spec == bundle.spec and loaded.metadata == {"rows": 8} and len(loaded.digest) == 64
    assert (loaded.moments.gram == bundle.moments.gram).all()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["bundle.json", "routers.safetensors"]
    plain = tmp_path / "plain"
    plain.touch()
    assert all(p.stat().st_mode == plain.stat().st_mode for p in (tmp_path / "b").iterdir())


def test_routers_of_an_older_plan_are_left_unread(model: torch.nn.Module, tmp_path: Path) -> None:
    """Format 2 held routers beside its plans, with a say or without."""
    make_bundle(model).save(tmp_path / "b")
    description, weights = tmp_path / "b" / "bundle.json", tmp_path / "b" / "routers.safetensors"
    description.write_text(
        json.dumps({**json.loads(description.read_text()), "format": 2, "per_sample": True})
    )
    routers_of = {f"routers.{i}.{k}": v for i in range(4) for k, v in Router(48, 48, 8).state_dict().items()}
    save_file({**load_file(weights), **routers_of}, weights)
    loaded = routers.load_bundle(tmp_path / "b")
    assert loaded.trained is None
    elastic = routers.attach(model, loaded, budget=0.6)
    assert all(block.router is None for block in elastic.blocks)
    elastic.detach()
    loaded.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "bundle.json").read_text())["format"] == 4
    assert not [name for name in load_file(tmp_path / "again" / weights.name) if name.startswith("routers")]


def test_the_three_line_api(model: torch.nn.Module, tmp_path: Path) -> None:
    make_bundle(model).save(tmp_path / "b")
    dense = QWEN.run(model)
    elastic = routers.attach(model, tmp_path / "b", budget=0.6)
    times = [1.0 - i / 20 for i in range(20)]
    for t in times:
        QWEN.run(model, t=t)
    assert "budget asked 0.6, spent 0." in elastic.summary()
    assert elastic.trace.spent == pytest.approx([0.6, 0.6], abs=0.015)
    assert elastic.trace.host_syncs <= elastic.trace.num_calls, "at most one host read per transformer call"
    elastic.detach()
    assert torch.equal(dense, QWEN.run(model))


@pytest.mark.parametrize("budget", [0.0, 0.1, 1.5, float("nan")])
def test_budgets_outside_the_bundle_are_refused(model: torch.nn.Module, budget: float) -> None:
    with pytest.raises(ValueError, match=r"outside what this bundle serves: 0\.35 to 1"):
        routers.attach(model, make_bundle(model), budget=budget)


def test_other_models_are_refused(model: torch.nn.Module) -> None:
    bundle = make_bundle(model)
    with pytest.raises(ValueError, match="made for qwen-test"):
        routers.attach(CASES[1].transformer(), bundle, budget=0.6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(ValueError, match="other weights"):
        routers.attach(model, bundle, budget=0.6)
    routers.attach(model, bundle, budget=0.6, force=True).detach()


def test_half_precision_is_the_same_model(model: torch.nn.Module) -> None:
    bundle = make_bundle(model)
    routers.attach(model.to(torch.bfloat16), bundle, budget=0.6).detach()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "routers.safetensors").write_bytes(b"\x10"),
            "not a readable bundle: Safetensor",
        ),
        (lambda f: (f / "routers.safetensors").unlink(), "routers.safetensors is missing"),
        (lambda f: (f / "bundle.json").write_text("{"), "not a readable bundle: JSONDecodeError"),
        (lambda f: (f / "bundle.json").write_text('{"format": 99}'), "format 99, this version reads 2"),
        (lambda f: _drop(f / "bundle.json", "spec"), "not a readable bundle: KeyError: 'spec'"),
    ],
)
def test_damaged_bundles_say_what_is_wrong(
    model: torch.nn.Module, tmp_path: Path, damage, message: str
) -> None:
    make_bundle(model).save(tmp_path / "b")
    damage(tmp_path / "b")
    with pytest.raises(ValueError, match=message):
        routers.load_bundle(tmp_path / "b")


def _drop(file: Path, key: str) -> None:
    data = json.loads(file.read_text())
    del data[key]
    file.write_text(json.dumps(data))
