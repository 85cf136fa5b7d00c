"""The flux-tiny recipe at micro sizes: forwards agree with the real classes; every step runs and resumes."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from backbones.flux import TRANSFORMER
from backbones.tiny.recipes import dataset, pairs, parcel
from backbones.tiny.recipes.elastic import fixed_subnetwork
from backbones.tiny.recipes.flux import (
    dit,
    export,
    fast_dit,
    grid,
    grow,
    picture_vae,
    probe,
    teacher,
    text,
    vae,
)
from backbones.tiny.recipes.flux.sampling import FluxSampler
from routers.width import MlpSlicer

FLUX_FOLDER = teacher.FOLDER.with_name("flux_tiny")
CONCEPTS = [
    {"name": "cat", "emoji": "🐱", "synonyms": ["kitty"], "keywords": ["meow"]},
    {"name": "apple", "emoji": "🍎", "synonyms": [], "keywords": []},
    {"name": "fire engine", "emoji": "🚒", "synonyms": ["fire truck"], "keywords": []},
]
ROWS = [[c, s, colour, 0] for c in range(3) for s in range(2) for colour in (None, "red")]


def write_latents(path, rows, z) -> None:
    """The file of step `latents` for single things, with z (N, C, 16, 16)."""
    captions = [[f"{colour or 'a'} {CONCEPTS[concept]['name']}"] for concept, _, colour, _ in rows]
    columns = {"kind": [int(row[2] is not None) for row in rows], "concept": [row[0] for row in rows],
               "style": [row[1] for row in rows], "row": range(len(rows))}  # fmt: skip
    z = dataset.quantise(torch.from_numpy(z))
    np.savez(
        path, z_128x128=z, z_small=z[:, :, ::2, ::2], captions_128x128=dataset.join_captions(captions),
        **{f"{name}_128x128": np.array(column) for name, column in columns.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Pictures, their index, and both tokenizers, as steps `data` and `text` leave them."""
    folder = tmp_path_factory.mktemp("flux-runs")
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    np.save(folder / "data" / "pictures.npy", rng.integers(0, 256, (len(ROWS), 128, 128, 3), np.uint8))
    index = {"concepts": CONCEPTS, "styles": ["a", "b", "c"], "rows": ROWS}
    (folder / "data" / "pictures.json").write_text(json.dumps(index))
    lines = text.captions_text(index)
    text.train_clip_tokenizer(lines, folder / "tokenizers" / "clip")
    text.train_t5_tokenizer(lines, folder / "tokenizers" / "t5")
    z = rng.standard_normal((len(ROWS), picture_vae.LATENTS, 16, 16)).astype(np.float16)
    write_latents(folder / "latents.npz", ROWS, z)
    return folder


@pytest.fixture
def prompts(runs) -> text.Prompts:
    return text.Prompts.load(runs / "tokenizers")


@pytest.fixture
def micro(monkeypatch) -> None:
    """One head of 32 in every block; the block counts stay, for the probes name blocks."""
    monkeypatch.setitem(fast_dit.DIT_CONFIG, "num_attention_heads", 1)


def wake(module: torch.nn.Module, seed: int = 0) -> None:
    """Move zero-initialised weights away from zero, or every comparison would compare zeros."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


def wake_checkpoint(path) -> None:
    """Stand in for training: weights that two steps left near zero are lost in half precision."""
    state = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for weights in (state["model"], state["ema"]):
        for value in weights.values():
            if value.is_floating_point() and value.abs().mean() < 1e-3:
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.05)
    torch.save(state, path)


@pytest.fixture
def awake_dit(micro):
    model = fast_dit.build_dit().eval().requires_grad_(False)
    wake(model)
    return model


def inputs(model, size: int = 2) -> tuple:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    pooled = torch.randn(size, config.pooled_projection_dim, generator=generator)
    states = torch.randn(size, text.T5_TOKENS, config.joint_attention_dim, generator=generator)
    latents = torch.randn(size, 64, config.in_channels, generator=generator)
    return latents, torch.rand(size, generator=generator), (pooled, states)


def run_step(monkeypatch, module, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["step", *map(str, arguments)])
    module.main()


# Text


def test_tokenizers_load_with_the_pipelines_classes_and_ignore_case(prompts):
    assert type(prompts.clip).__name__ == "CLIPTokenizer"
    assert type(prompts.t5).__name__ == "T5Tokenizer"
    lower, upper = prompts.batch(["a red cat"]), prompts.batch(["A RED Cat"])
    assert torch.equal(lower[0], upper[0])
    assert torch.equal(lower[1], upper[1])
    assert lower[0].shape == (1, text.CLIP_TOKENS)
    assert lower[1].shape == (1, text.T5_TOKENS)


def test_caption_words_are_single_t5_pieces_and_unknown_words_are_spelt(prompts):
    assert prompts.t5.tokenize("a kitty, apple") == ["▁a", "▁kitty", ",", "▁apple"]
    assert prompts.t5.tokenize("catapple")[0] == "▁cat"
    assert prompts.t5.unk_token_id not in prompts.ids("zxqw blorp")
    assert prompts.t5.unk_token_id in prompts.ids("a 日本 cat")


def test_missing_tokenizers_name_the_step_that_makes_them(tmp_path):
    with pytest.raises(ValueError, match=r"recipes\.flux\.text"):
        text.Prompts.load(tmp_path / "tokenizers")


def test_long_and_empty_prompts_fill_exactly_the_sequence(prompts):
    clip, t5 = prompts.batch(["cat " * 50, ""])
    assert clip.shape == (2, text.CLIP_TOKENS)
    assert clip[0, -1] == prompts.clip.eos_token_id
    assert t5[0, -1] == prompts.t5.eos_token_id
    assert t5[1].tolist() == [prompts.t5.eos_token_id] + [prompts.t5.pad_token_id] * (text.T5_TOKENS - 1)


# Picture VAE


def test_pairs_cut_the_same_window_from_pictures_and_latents(runs):
    data = pairs.Pairs(runs / "data", runs / "latents.npz", 0)
    x, z = data.window(np.array([1, 4]), top=3, left=5, cells=8)
    pictures = np.load(runs / "data" / "pictures.npy")
    assert torch.equal(x, pairs.to_tensor(pictures[[1, 4], 24:88, 40:104]))
    assert torch.equal(z, data.z[[1, 4], :, 3:11, 5:13].float() / dataset.QUANTA)
    x, z = data.batch(5, vae.CROP)
    assert (x.shape, z.shape) == ((5, 3, 64, 64), (5, 8, 8, 8))


# Transformer


def test_training_forward_is_the_real_class(awake_dit):
    assert fast_dit.largest_difference(awake_dit) < 1e-4


def test_guidance_changes_the_output(awake_dit):
    latents, sigma, words = inputs(awake_dit)
    low, high = (
        fast_dit.dit_forward(
            awake_dit, latents, sigma, words, fast_dit.rope(awake_dit), torch.full((2,), scale)
        )
        for scale in (1.0, 6.0)
    )
    assert (low - high).abs().max() > 1e-3


def test_a_fresh_model_ignores_guidance(micro):
    model = fast_dit.build_dit()
    sigma, pooled = torch.rand(2), torch.randn(2, model.config.pooled_projection_dim)
    told = fast_dit.time_text(model, sigma, pooled, torch.tensor([1.0, 6.0]))
    assert torch.equal(told, fast_dit.time_text(model, sigma, pooled, None))


def test_half_resolution_tokens_sit_at_the_centres_of_groups(awake_dit):
    full, half = fast_dit.rope(awake_dit, 0), fast_dit.rope(awake_dit, 0, (4, 4), 2)
    angle = torch.atan2(full.sin, full.cos).unflatten(0, (8, 8))[:2, :2, 4:10]
    expected = angle[:, 0, :].mean(0)[:1]  # fastest row frequency, rows 0 and 1
    assert torch.allclose(torch.atan2(half.sin, half.cos)[0, 4:5], expected, atol=1e-6)


@pytest.mark.parametrize("index", [0, 6])
def test_skipped_blocks_are_the_identity_for_their_sample_only(awake_dit, index):
    latents, sigma, words = inputs(awake_dit)
    angles, scales = fast_dit.rope(awake_dit), torch.tensor([3.5, 3.5])
    units = awake_dit.single_transformer_blocks[0].mlp_hidden_dim
    double, single = len(awake_dit.transformer_blocks), len(awake_dit.single_transformer_blocks)
    keep, masks = torch.ones(double + single, 2, 1, 1), torch.ones(double + single, 2, 1, units)
    keep[index, 1] = 0
    mixed = fast_dit.dit_forward(awake_dit, latents, sigma, words, angles, scales, None, keep, masks)
    dense = fast_dit.dit_forward(awake_dit, latents, sigma, words, angles, scales)
    assert torch.allclose(mixed[0], dense[0], atol=1e-5)
    if index < double:
        del awake_dit.transformer_blocks[index]
    else:
        del awake_dit.single_transformer_blocks[index - double]
    without = fast_dit.dit_forward(awake_dit, latents, sigma, words, angles, scales)
    assert torch.allclose(mixed[1], without[1], atol=1e-5)
    assert (mixed[1] - dense[1]).abs().max() > 1e-3


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_width_masks_are_what_the_routers_slice(awake_dit, ratio):
    latents, sigma, words = inputs(awake_dit)
    scales = torch.tensor([2.0, 5.0])
    units = awake_dit.single_transformer_blocks[0].mlp_hidden_dim
    blocks = len(awake_dit.transformer_blocks) + len(awake_dit.single_transformer_blocks)
    keep, masks = fixed_subnetwork(f"width {ratio}", blocks, units)
    masked = fast_dit.dit_forward(
        awake_dit, latents, sigma, words, fast_dit.rope(awake_dit), scales, None, keep, masks
    )
    slicers = [
        MlpSlicer(block, spec.mlps[0])
        for spec in TRANSFORMER.blocks
        for block in awake_dit.get_submodule(spec.path)
    ]
    assert len(slicers) == blocks
    with ExitStack() as narrowed:
        for slicer in slicers:
            narrowed.enter_context(slicer.narrowed(ratio))
        sliced = fast_dit.class_forward(awake_dit, latents, sigma, words, scales)
    dense = fast_dit.class_forward(awake_dit, latents, sigma, words, scales)
    assert torch.allclose(masked, sliced, atol=1e-4)
    assert (sliced - dense).abs().max() > 1e-3


# Guidance


def test_guided_velocity_is_plain_guidance_or_keeps_the_length():
    cond, uncond = torch.randn(2, 3, 4, 8).unbind(0)
    scales = torch.tensor([1.0, 2.0, 6.0])
    plain = teacher.guided_velocity(cond, uncond, scales, keep_norm=0.0)
    assert torch.allclose(plain[0], cond[0], atol=1e-6)
    assert torch.allclose(plain[1], 2 * cond[1] - uncond[1], atol=1e-5)
    kept = teacher.guided_velocity(cond, uncond, scales)
    assert torch.allclose(kept.norm(dim=-1), cond.norm(dim=-1), rtol=1e-4)
    assert torch.allclose(torch.cosine_similarity(kept, plain, dim=-1), torch.ones(3, 4), atol=1e-5)


def test_an_anchored_velocity_has_the_guided_velocity_of_the_data_as_its_mean():
    cond, uncond, noise = torch.randn(3, 3, 4, 8).unbind(0)
    scales = torch.tensor([1.0, 2.0, 6.0])
    guided = teacher.guided_velocity(cond, uncond, scales)
    anchored = [teacher.guided_velocity(cond, uncond, scales, anchor=cond + n) for n in (noise, -noise)]
    assert torch.allclose(sum(anchored) / 2, guided, atol=1e-5)
    assert (anchored[0] - guided).norm() > 0.1 * guided.norm()
    plain = teacher.guided_velocity(cond, uncond, scales, anchor=noise)
    assert torch.allclose(plain[0], noise[0], atol=1e-5)  # at scale 1 the target is the data's own


def test_scales_cover_the_range_and_include_one():
    scales = dit.draw_scales(2000, torch.Generator().manual_seed(0))
    assert 0.05 < (scales == 1.0).float().mean() < 0.15
    assert scales.min() == 1.0
    assert 5.9 < scales.max() < 6.0


# The steps


def test_muon_takes_the_matrices_inside_blocks_and_nothing_else(prompts, micro):
    names = [name for name, p in dit.TinyFlux(prompts).named_parameters() if dit.muon_takes(name, p)]
    count = {part: sum(name.startswith(part) for name in names) for part in ("dit.", "clip.", "t5.")}
    # Double: 8 attention, 4 MLP; single: 3 attention, 2 MLP; CLIP: 4 attention, 2 MLP in 2 layers.
    config = fast_dit.DIT_CONFIG
    matrices = config["num_layers"] * 12 + config["num_single_layers"] * 5
    assert count == {"dit.": matrices, "clip.": 2 * 6, "t5.": 0}


def test_teacher_is_the_packaged_pipelines_guidance():
    """Against QwenImagePipeline's own encoder and transformer, and its norm-preserving guidance."""
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(teacher.FOLDER, torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 64, pipe.transformer.config.in_channels, generator=generator)
    sigma, scales = torch.tensor([0.3, 0.9]), torch.tensor([1.0, 4.0])
    captions = ["a cat", "a red car"]
    mine = teacher.Teacher(compile=False).velocity(latents, sigma, captions, scales, (8, 8))
    parts = []
    for prompts in (captions, [" ", " "]):
        states, mask = pipe.encode_prompt(prompts)
        parts.append(pipe.transformer(latents, states, mask, sigma, img_shapes=[[(1, 8, 8)]] * 2,
                                      return_dict=False)[0])  # fmt: skip
    cond, uncond = (part.detach() for part in parts)
    goal = uncond + scales[:, None, None] * (cond - uncond)
    goal *= cond.norm(dim=-1, keepdim=True) / goal.norm(dim=-1, keepdim=True)
    # The teacher runs in bf16.
    assert (mine - goal).norm() / goal.norm() < 0.03
    assert torch.cosine_similarity((mine - cond)[1].flatten(), (goal - cond)[1].flatten(), dim=0) > 0.95


@pytest.mark.slow
def test_vae_step_trains_both_halves_and_writes_the_folder(runs, tmp_path, monkeypatch, capsys):
    from diffusers import AutoencoderKL

    common = ("--data", runs / "data", "--latents", runs / "latents.npz", "--out", tmp_path, "--batch", 3)
    run_step(monkeypatch, vae, *common, "--crop-share", 1, "--max-steps", 2)
    assert "dB through its own encoder" in capsys.readouterr().out
    model = AutoencoderKL.from_pretrained(tmp_path / "vae" / "model")
    assert (model.config.scaling_factor, model.config.shift_factor) == (1.0, 0.0)
    with torch.no_grad():
        posterior = model.encode(torch.rand(1, 3, 64, 64)).latent_dist
    assert torch.allclose(posterior.logvar, torch.tensor(vae.LOG_VARIANCE))
    assert posterior.mean.std() > 0


@pytest.mark.slow
def test_dit_probe_grid_export(runs, tmp_path, micro, monkeypatch, capsys):
    from diffusers import FluxPipeline

    from backbones import registry

    picture_vae.build_vae().save_pretrained(tmp_path / "vae" / "model")
    shared = ("--data", runs / "data", "--latents", runs / "latents.npz",
              "--tokenizer", runs / "tokenizers", "--out", tmp_path, "--batch", 4, "--small-batch", 4,
              "--no-compile")  # fmt: skip
    run_step(monkeypatch, dit, *shared, "--max-steps", 2, "--small-share", 0.9)
    assert "step 2" in capsys.readouterr().out
    run_step(monkeypatch, dit, *shared, "--max-steps", 4, "--elastic-from", 0, "--small-share", 0.5)
    out = capsys.readouterr().out
    assert "resumed at step 2" in out
    assert "real" in out
    assert "sub" in out
    checkpoint = tmp_path / "dit" / "last.pt"
    files = ("--checkpoint", checkpoint, "--vae", tmp_path / "vae" / "model",
             "--tokenizer", runs / "tokenizers")  # fmt: skip
    run_step(monkeypatch, grid, *files, "--steps", 1, "--out", tmp_path / "grid.png", "a cat", "an apple")
    assert (tmp_path / "grid.png").stat().st_size > 1000
    wake_checkpoint(checkpoint)
    monkeypatch.setattr(probe, "PROBES", ("width 0.5", "skip 3"))
    run_step(monkeypatch, probe, *files, "--prompts", 1)
    assert "skip 3" in capsys.readouterr().out
    run_step(monkeypatch, export, *files, "--out", tmp_path / "exported")
    pipe = FluxPipeline.from_pretrained(tmp_path / "exported")
    assert pipe.transformer.config.guidance_embeds is True
    assert type(pipe.tokenizer_2).__name__ == "T5Tokenizer"
    assert pipe.tokenizer_max_length == text.CLIP_TOKENS
    backbone = registry.resolve(str(tmp_path / "exported"))
    assert backbone.defaults.steps == 20
    assert backbone.defaults.max_sequence_length == text.T5_TOKENS
    assert backbone.size_multiple == 16


def test_sampling_takes_one_call_a_step(prompts, micro):
    model = dit.TinyFlux(prompts).eval().requires_grad_(False)
    calls: list[tuple[int, float]] = []

    def velocity(x, sigma, words, scales):
        calls.append((len(x), float(scales[0])))
        return torch.zeros_like(x)

    FluxSampler(model, prompts, None).latents(["a cat", "apple"], steps=2, guidance=3.0, velocity=velocity)
    assert calls == [(2, 3.0), (2, 3.0)]


def test_a_grown_model_draws_what_the_smaller_one_drew(tmp_path):
    folder = FLUX_FOLDER
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    words = text.Prompts(pipe.tokenizer, pipe.tokenizer_2)
    model = dit.TinyFlux(words)
    grow.grow(model, words, folder)
    assert model.blocks > len(pipe.transformer.transformer_blocks) + len(
        pipe.transformer.single_transformer_blocks
    )
    parcel.write_parts(parcel.compress(parcel.untied(model.state_dict()), 16), tmp_path)
    loaded = dit.load_model(tmp_path, words)
    latents, sigma = torch.randn(2, 64, 32), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        states = loaded.encode(*words.batch(["a cat", "two red apples"]))
        mine = fast_dit.dit_forward(loaded.dit, latents, sigma, states, fast_dit.rope(loaded.dit))
        theirs = fast_dit.dit_forward(
            pipe.transformer, latents, sigma, states, fast_dit.rope(pipe.transformer)
        )
    assert (mine - theirs).abs().max() < 0.01 * theirs.abs().max()
