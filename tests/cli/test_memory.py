"""What makes a model fit: weights in fewer bits, tiles, and what is said where that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from backbones import loading, registry
from backbones.quantise import check_quantise
from backbones.spec import Placement
from edit_cli.generate.record import read_picture


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
