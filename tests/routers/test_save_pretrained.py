"""A pipeline that carries a bundle is saved with it, and with the scheduler that it had before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import routers


def loaded(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe: Any) -> torch.Tensor:
    result: torch.Tensor = pipe(
        "a cat", negative_prompt=" ", width=64, height=64, num_inference_steps=4, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return result


@pytest.mark.parametrize("carries", [True, False])
def test_what_is_saved_is_loaded_again(qwen_folder: Path, tmp_path: Path, carries: bool) -> None:
    pipe = loaded(qwen_folder)
    elastic = routers.attach(pipe, qwen_folder / "routers" if carries else None, budget=0.5)
    expected = made(pipe)
    pipe.save_pretrained(tmp_path / "saved", safe_serialization=True)
    assert torch.equal(made(pipe), expected), "it still follows its plan"
    elastic.detach()
    assert "save_pretrained" not in vars(pipe)
    again = loaded(tmp_path / "saved")
    assert type(again.scheduler) is type(pipe.scheduler)
    assert (tmp_path / "saved" / "routers" / "bundle.json").exists() == carries
    if carries:
        routers.attach(again, tmp_path / "saved" / "routers", budget=0.5)
        assert torch.equal(made(again), expected)
