"""LoKr and LoHa through `--lora`: what they add to the weights, as whoever made them means it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.cli.test_cli_generate import pixels

SMALL = ("--steps", "2", "--width", "32", "--height", "32", "-q")
LAYER = "transformer_blocks.0.attn.to_out.0"
SIDE = 64
"""Of the layer's weights in the small model."""


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


A, B, C, D = normal(SIDE, 3), normal(3, SIDE), normal(SIDE, 2), normal(2, SIDE)
KINDS = {
    "lokr of whole factors": (
        {"lokr_w1": normal(4, 4), "lokr_w2": normal(16, 16), "alpha": torch.tensor(9.0)},
        torch.kron(normal(4, 4), normal(16, 16)),  # alpha is for factors of a lower rank
    ),
    "lokr of a low rank": (
        {
            "lokr_w1": normal(4, 2), "lokr_w2_a": normal(16, 3), "lokr_w2_b": normal(3, 32),
            "alpha": torch.tensor(1.5),
        },
        torch.kron(normal(4, 2), normal(16, 3) @ normal(3, 32)) * 1.5 / 3,
    ),
    "loha": (
        {"hada_w1_a": A, "hada_w1_b": B, "hada_w2_a": C, "hada_w2_b": D, "alpha": torch.tensor(6.0)},
        (A @ B) * (C @ D) * 6 / 3,
    ),
    "loha of a high rank": (
        {
            "hada_w1_a": normal(SIDE, 12), "hada_w1_b": normal(12, SIDE), "hada_w2_a": normal(SIDE, 9),
            "hada_w2_b": normal(9, SIDE),
        },
        (normal(SIDE, 12) @ normal(12, SIDE)) * (normal(SIDE, 9) @ normal(9, SIDE)),
    ),
}  # fmt: skip
SPELLINGS = (f"diffusion_model.{LAYER}", "lycoris_" + LAYER.replace(".", "_"), LAYER, f"transformer.{LAYER}")


@pytest.mark.parametrize("kind", KINDS)
def test_it_draws_what_the_same_change_as_a_lora_draws(kind, edit_here, qwen_folder, tmp_path):
    parts, change = KINDS[kind]
    spelling = SPELLINGS[[*KINDS].index(kind)]
    save_file({f"{spelling}.{name}": value for name, value in parts.items()}, tmp_path / "k.safetensors")
    whole = {f"transformer.{LAYER}.lora_A.weight": torch.eye(SIDE)}
    save_file({**whole, f"transformer.{LAYER}.lora_B.weight": change}, tmp_path / "same.safetensors")
    drawn = {}
    for name, lora in (
        ("plain", []),
        ("it", ["--lora", "k.safetensors:0.5"]),
        ("same", ["--lora", "same.safetensors:0.5"]),
        ("off", ["--lora", "k.safetensors:0"]),
    ):
        ran = edit_here(
            "generate", "a cat", "-m", qwen_folder, *SMALL, *lora, "-o", f"{name}.png", cwd=tmp_path
        )
        assert ran.code == 0, ran.err
        drawn[name] = pixels(tmp_path / f"{name}.png")
    assert np.abs(drawn["it"] - drawn["same"]).max() <= 1
    assert np.abs(drawn["it"] - drawn["plain"]).max() > 8, "far more than what rounding does"
    np.testing.assert_array_equal(drawn["off"], drawn["plain"])


def test_peft_keeps_the_scale_beside_the_weights(edit_here, qwen_folder, tmp_path):
    """A folder as PEFT saves it: alpha over rank, for whole factors too."""
    folder, name = tmp_path / "saved", f"base_model.model.{LAYER}"
    folder.mkdir()
    factors = {f"{name}.lokr_w1": normal(4, 4), f"{name}.lokr_w2": normal(16, 16)}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 8, "alpha": 2}))
    factors[f"{name}.lokr_w2"] = normal(16, 16) / 4
    save_file(factors, tmp_path / "quarter.safetensors")
    for lora, out in (("saved:0.4", "a.png"), ("quarter.safetensors:0.4", "b.png")):
        ran = edit_here(
            "generate", "a cat", "-m", qwen_folder, *SMALL, "--lora", lora, "-o", out, cwd=tmp_path
        )
        assert ran.code == 0, ran.err
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).max() <= 1


WHOLE = {"lokr_w1": normal(4, 4), "lokr_w2": normal(16, 16)}
REFUSED = {
    "DoRA": ({**WHOLE, "dora_scale": normal(SIDE, 1)}, LAYER, "'dora_scale', which is not read"),
    "a convolution": ({**WHOLE, "lokr_w2": normal(16, 16, 3, 3)}, LAYER, "is no linear one"),
    "half a layer": ({"lokr_w1": normal(4, 4)}, LAYER, "is not whole"),
    "another size": ({**WHOLE, "lokr_w2": normal(8, 8)}, LAYER, "does not fit"),
    "another model": (WHOLE, "double_blocks.0.img_attn.qkv", "does not fit"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(kind, edit_here, qwen_folder, tmp_path):
    parts, layer, words = REFUSED[kind]
    save_file({f"{layer}.{name}": value for name, value in parts.items()}, tmp_path / "k.safetensors")
    ran = edit_here("generate", "a cat", "-m", qwen_folder, *SMALL, "--lora", "k.safetensors", cwd=tmp_path)
    assert ran.code == 2 and len(ran.err.splitlines()) == 1, ran.err
    assert "error: --lora '" in ran.err and words in ran.err
    assert not [*tmp_path.glob("*.png")]
