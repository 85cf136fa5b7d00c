"""What makes a model fit: weights in fewer bits, tiles, and what is said where that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import routers
from backbones import loading, registry
from backbones.quantise import check_quantise
from backbones.spec import Placement
from edit_cli.generation.dryrun import dry_run
from edit_cli.generation.picture import PICTURE
from edit_cli.generation.plan import make_plan
from edit_cli.generation.record import read_picture
from edit_cli.request import Request


@pytest.mark.slow
def test_tiles_are_recorded(edit_here, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    ran = edit_here(
        "generate", "a cat", "--vae-tiling", "--steps", "1", "-o", str(file), "--json", cwd=tmp_path
    )
    assert ran.code == 0, ran.err
    assert read_picture(str(file))["vae_tiling"] is True


def test_quantised_weights_are_refused_in_one_line(
    edit_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backbones.quantise.find_spec", lambda name: None)
    for how, package in (("fp8", "torchao"), ("int8", "torchao"), ("nf4", "bitsandbytes")):
        ran = edit_here("generate", "a cat", "--quantize", how, cwd=tmp_path)
        assert ran.code == 2
        assert ran.err.count("\n") == 1
        assert f"--quantize {how} needs {package}, which is not installed" in ran.err
    ran = edit_here("generate", "a cat", "--quantize", "int3", cwd=tmp_path)
    assert ran.code == 2 and "fp8, int8, nf4" in ran.err


def test_what_cannot_be_quantised_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbones.quantise.find_spec", lambda name: object())
    mesh = registry.resolve("hunyuan3d-tiny")
    with pytest.raises(ValueError, match="for folders and hub ids of diffusers' pipelines"):
        check_quantise("fp8", mesh)
    with pytest.raises(ValueError, match="not on mps"):
        check_quantise("fp8", registry.resolve("qwen-image-tiny"), "mps")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_a_quantised_model_keeps_to_a_budget(how: str, edit_here, tmp_path: Path) -> None:
    pytest.importorskip("torchao.quantization")
    file = tmp_path / "cat.png"
    typed = ("generate", "a cat", "--quantize", how, "--budget", "0.5", "--steps", "4")
    ran = edit_here(*typed, "-o", str(file), "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out.splitlines()[-1])["spent"] == 0.5
    assert read_picture(str(file))["quantize"] == how
    pipe = loading.load(registry.resolve("qwen-image-tiny"), Placement(quantize=how))
    for component in (pipe.transformer, pipe.text_encoder):
        packed = {type(parameter) for parameter in component.parameters()} - {torch.nn.Parameter}
        assert packed, f"{type(component).__name__} has plain weights"


def test_a_card_by_number_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events, streams and peak memory are asked of the current device."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(loading, "_load_diffusers", lambda *_: None)
    loading.load(registry.resolve("qwen-image-tiny"), Placement(device="cuda:1"))
    assert current == [torch.device("cuda:1")]


def allocated(run, folder: Path) -> int:
    """Most bytes at once that PyTorch's CPU allocator gave out during a call."""
    from torch.profiler import ProfilerActivity, profile

    trace = folder / "trace.json"
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiled.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", ["flux-tiny", pytest.param("qwen-image-tiny", marks=pytest.mark.slow)])
def test_the_forecast_is_what_is_measured(name: str, edit_here, tmp_path: Path) -> None:
    typed = ("generate", "a cat", "-m", name, "--budget", "0.5", "--steps", "4", "--dry-run", "--json")
    forecast = edit_here(*typed, cwd=tmp_path).json["memory_gib"]["stages"]
    pipe = loading.load(registry.resolve(name), Placement())
    limit = registry.resolve(name).defaults.max_sequence_length
    weights = sum(p.nbytes for part in pipe.components.values() if hasattr(part, "parameters")
                  for p in part.parameters())  # fmt: skip
    elastic = routers.attach(pipe, budget=0.5)
    try:
        arguments = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "latent"}
        if "qwen" in name:
            arguments |= {"max_sequence_length": limit}
            arguments |= {"negative_prompt": " ", "true_cfg_scale": 4.0}
        else:  # of text encoders the weights alone are forecast
            embeds, pooled, _ = pipe.encode_prompt("a cat", None, max_sequence_length=limit)
            arguments |= {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        pipe(**arguments, width=128, height=128)  # what is made once is there
        found = {"denoise": allocated(lambda: pipe(**arguments, width=128, height=128), tmp_path)}
    finally:
        elastic.detach()
    channels = pipe.vae.config.get("z_dim") or pipe.vae.config.latent_channels
    latents = torch.randn(1, channels, *([1] if "qwen" in name else []), 16, 16)
    found["decode"] = allocated(lambda: pipe.vae.decode(latents, return_dict=False), tmp_path)
    for stage, measured in found.items():
        assert forecast[stage] * 2**30 == pytest.approx(weights + measured, rel=0.1), stage


@pytest.mark.slow
def test_fit_takes_the_fastest_way_and_says_which(edit_here, tmp_path: Path, monkeypatch) -> None:
    typed = ("generate", "a cat", "--dry-run", "--fit", "--width", "512", "--height", "512", "--json")
    whole = edit_here(*typed, cwd=tmp_path)
    assert "--fit: nothing to change" in whole.err
    needed = whole.json["memory_gib"]["device"] * 2**30
    monkeypatch.setattr("edit_cli.generation.forecast.free_bytes", lambda device: needed)
    tiled = edit_here(*typed, cwd=tmp_path)
    assert "--fit: --vae-tiling; needs" in tiled.err
    assert tiled.json["memory_gib"]["device"] < whole.json["memory_gib"]["device"]
    monkeypatch.setattr("edit_cli.generation.forecast.free_bytes", lambda device: 1000.0)
    nothing = edit_here(*typed, cwd=tmp_path)
    assert nothing.code == 2 and "--fit: nothing fits; the least is" in nothing.err


def test_fit_of_a_mesh_offloads_where_it_must(edit_here, tmp_path: Path, monkeypatch) -> None:
    picture = next((registry.resolve("hunyuan3d-tiny").folder / "calibration").glob("*.png"))
    typed = ("generate-3d", picture, "--dry-run", "--fit", "--json")
    monkeypatch.setattr("backbones.loading.pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("edit_cli.generation.forecast.free_bytes", lambda device: 2.0**40)
    whole = edit_here(*typed, cwd=tmp_path)
    assert whole.code == 0, whole.err
    assert "--fit: nothing to change" in whole.err
    needed = whole.json["memory_gib"]["device"] * 2**30
    monkeypatch.setattr("edit_cli.generation.forecast.free_bytes", lambda device: needed)
    moved = edit_here(*typed, cwd=tmp_path)
    assert "--fit: --offload model; needs" in moved.err
    assert moved.json["memory_gib"]["device"] < whole.json["memory_gib"]["device"]


@pytest.mark.slow
def test_packed_and_offloaded_models_are_forecast_smaller() -> None:
    plan = make_plan(Request(prompt=["a cat"], model="flux-dev", budget=0.5), PICTURE)
    peaks = {}
    for placement in (Placement(), Placement(quantize="int8"), Placement(offload="model")):
        peaks[placement] = dry_run(replace(plan, placement=placement)).report["memory_gib"]["device"]
    plain, packed, offloaded = peaks.values()
    assert packed < 0.6 * plain
    assert offloaded < packed + 12
