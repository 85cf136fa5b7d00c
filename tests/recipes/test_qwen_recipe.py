"""The qwen-image-tiny recipe at micro sizes: forwards are the real classes', growing changes nothing."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Tokenizer

from backbones.tiny.recipes import (
    decoder,
    dit,
    elastic,
    export,
    fast_dit,
    frechet,
    grow,
    latents,
    parcel,
    picture_vae,
    text,
    training,
    vocabulary,
)
from tests.recipes.test_flux_recipe import CONCEPTS, wake, write_latents

ROWS = [[c, s, colour, 0] for c in range(3) for s in range(2) for colour in (None, "red")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Pictures, scenes, index, tokenizer and latents, as the steps before `dit` leave them."""
    import numpy as np

    folder = tmp_path_factory.mktemp("qwen-runs")
    rng = np.random.default_rng(0)
    (folder / "data" / "scenes").mkdir(parents=True)
    np.save(folder / "data" / "pictures.npy", rng.integers(0, 256, (len(ROWS), 128, 128, 3), np.uint8))
    index = {"concepts": CONCEPTS, "styles": ["a", "b", "c"], "rows": ROWS}
    (folder / "data" / "pictures.json").write_text(json.dumps(index))
    texts = {"128x128": [["two cats"]] * 3, "144x96": [["a cat"]] * 2}
    for key, (width, height) in {"128x128": (128, 128), "144x96": (144, 96)}.items():
        scenes = rng.integers(0, 256, (len(texts[key]), height, width, 3), np.uint8)
        np.save(folder / "data" / "scenes" / f"{key}.npy", scenes)
    (folder / "data" / "scenes.json").write_text(json.dumps({"captions": texts}))
    text.train_tokenizer(index, folder / "tokenizer")
    z = rng.standard_normal((len(ROWS), 8, 16, 16)).astype(np.float32)
    write_latents(folder / "single.npz", ROWS, z)
    picture_vae.build_vae().save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def micro(monkeypatch) -> None:
    """One head of 32 in every block, and four blocks."""
    monkeypatch.setitem(fast_dit.DIT_CONFIG, "num_attention_heads", 1)
    monkeypatch.setitem(fast_dit.DIT_CONFIG, "num_layers", 4)


def run_step(monkeypatch, module, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["step", *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("grid", [(8, 8), (6, 9), (12, 8), (5, 5)])
def test_training_forward_is_the_real_class_at_every_size(micro, grid):
    model = fast_dit.build_dit().eval()
    wake(model)
    assert fast_dit.largest_difference(model, grid=grid) < 1e-4


def test_half_size_tokens_sit_at_the_centres_of_groups():
    full, half = fast_dit.rope(0), fast_dit.rope(0, (4, 4), 2)
    first = fast_dit.AXES[0] // 2
    angle = torch.atan2(full.sin, full.cos).unflatten(0, (8, 8))[4:6, 4:6, first + 1]  # a slow row frequency
    assert torch.allclose(
        torch.atan2(half.sin, half.cos).unflatten(0, (4, 4))[2, 2, first + 1], angle[:, 0].mean(), atol=1e-6
    )


@pytest.mark.parametrize(("old", "new"), [(12, 15), (4, 5), (3, 3)])
def test_added_blocks_are_spread_and_follow_their_originals(old, new):
    order = grow.spread(old, new)
    assert [step for step in order if step >= 0] == list(range(old))
    assert all(order[at - 1] == -1 - step for at, step in enumerate(order) if step < 0)
    assert len(order) == new


def test_too_many_blocks_are_refused():
    with pytest.raises(ValueError, match="3 blocks cannot grow to 7"):
        grow.spread(3, 7)


def test_a_grown_transformer_computes_the_same_until_it_is_trained(micro, monkeypatch):
    small = fast_dit.build_dit().eval()
    wake(small)
    monkeypatch.setitem(fast_dit.DIT_CONFIG, "num_layers", 6)
    large = fast_dit.build_dit().eval()
    large.load_state_dict(grow.grown_blocks(small.state_dict(), 6))
    x, sigma = torch.randn(2, 64, fast_dit.DIT_CONFIG["in_channels"]), torch.tensor([0.2, 0.9])
    states, mask = torch.randn(2, 5, text.WIDTH), torch.ones(2, 5, dtype=torch.bool)
    outputs = [fast_dit.dit_forward(m, x, sigma, states, mask, fast_dit.rope(5)) for m in (small, large)]
    assert torch.allclose(*outputs, atol=1e-5)
    outputs[1].square().mean().backward()
    number = next(at for at, step in enumerate(grow.spread(4, 6)) if step < 0)
    added = large.transformer_blocks[number]
    assert added.img_mod[1].weight.grad.abs().max() > 0  # its gates open in training


def test_known_words_keep_their_embedding_and_new_ones_get_the_mean_of_their_pieces(runs, tmp_path):
    old_tokens = text.train_tokenizer({"concepts": [CONCEPTS[1]]}, tmp_path / "old")
    new_tokens = Qwen2Tokenizer.from_pretrained(runs / "tokenizer")
    old = torch.randn(len(old_tokens), 4)
    new = grow.grown_embedding(old, old_tokens, new_tokens)
    assert new.shape == (len(new_tokens), 4)
    known, unknown = "Ġapple", "Ġkitty"
    assert unknown not in old_tokens.get_vocab()
    row = new_tokens.convert_tokens_to_ids
    assert torch.equal(new[row(known)], old[old_tokens.convert_tokens_to_ids(known)])
    assert torch.equal(new[row("<|im_end|>")], old[old_tokens.convert_tokens_to_ids("<|im_end|>")])
    assert torch.allclose(new[row(unknown)], old[old_tokens(" kitty").input_ids].mean(0))


def test_sizes_make_batches_of_equal_work_and_small_ones_come_first():
    grids = {"128x128": (8, 8), "small": (4, 4), "192x192": (12, 12)}
    data = SimpleNamespace(buckets={key: SimpleNamespace(grid=grid) for key, grid in grids.items()})
    sizes = dit.Sizes(data, torch.Generator().manual_seed(0), small_share=0.5, batch=64)
    early = [sizes.draw(0.1) for _ in range(300)]
    late = [sizes.draw(0.9) for _ in range(300)]
    assert dict(early)["128x128"] == 64
    assert dict(early)["small"] > 100
    assert dict(early)["192x192"] < 40
    assert 0.3 < sum(key == "small" for key, _ in early) / 300 < 0.55
    assert "small" not in dict(late)
    assert 0.06 < sum(key == "192x192" for key, _ in late) / 300 < 0.2


@pytest.mark.slow
def test_latents_dit_elastic_decoder(runs, tmp_path, micro, monkeypatch, capsys):
    """Every step runs from the files of the one before, and resumes."""
    run_step(monkeypatch, latents, "--data", runs / "data", "--vae", runs / "vae", "--out",
             tmp_path / "z.npz", "--coloured", 2)  # fmt: skip
    # 6 plain, 2 coloured, 3 scenes, at two sizes; and 2 of another size.
    assert "24 pictures" in capsys.readouterr().out
    shared = ("--data", runs / "data", "--latents", tmp_path / "z.npz")
    training = (*shared, "--tokenizer", runs / "tokenizer", "--no-compile", "--batch", 4)
    run_step(monkeypatch, dit, *training, "--out", tmp_path / "dit", "--max-steps", 2)
    run_step(monkeypatch, dit, *training, "--out", tmp_path / "dit", "--max-steps", 3)
    assert "resumed at step 2" in capsys.readouterr().out
    run_step(monkeypatch, elastic, *training, "--out", tmp_path / "elastic", "--max-steps", 1, "--dense",
             tmp_path / "dit" / "last.pt", "--vae", runs / "vae", "--probe-prompts", 0)  # fmt: skip
    assert "sub-network mse" in capsys.readouterr().out
    run_step(monkeypatch, decoder, *shared, "--out", tmp_path / "decoder", "--vae", runs / "vae",
             "--max-steps", 1, "--batch", 4)  # fmt: skip
    out = capsys.readouterr().out
    assert "after plain" in out
    assert "scene" in out
    assert (tmp_path / "decoder" / "model" / "config.json").exists()


@pytest.mark.parametrize(("bits", "error"), [(16, 1e-3), (8, 1e-2)])
def test_a_parcel_carries_the_average_in_small_files(runs, tmp_path, micro, bits, error):
    tokens = Qwen2Tokenizer.from_pretrained(runs / "tokenizer")
    model = dit.TinyModel(tokens)
    wake(model)
    ema = {name: value + 1 for name, value in model.dit.named_parameters(prefix="dit")}
    training.save(tmp_path / "last.pt", model=model.state_dict(), ema=ema)
    weights = {name: v for name, v in parcel.average(tmp_path / "last.pt").items() if "lm_head" not in name}
    paths = parcel.write_parts(parcel.compress(weights, bits), tmp_path / "parts", limit=700_000)
    assert len(paths) > 1
    assert max(path.stat().st_size for path in paths) <= 700_000
    other = dit.TinyModel(tokens)
    dit.begin(other, tmp_path / "parts", tokens)
    for name, value in other.dit.named_parameters(prefix="dit"):
        assert (value - ema[name]).abs().max() <= error * ema[name].abs().max(), name
    assert other.text.lm_head.weight is other.text.get_input_embeddings().weight


def test_a_parcel_of_another_model_is_refused(runs, tmp_path, micro):
    tokens = Qwen2Tokenizer.from_pretrained(runs / "tokenizer")
    parcel.write_parts({"dit.img_in.weight": torch.zeros(32, 32)}, tmp_path)
    with pytest.raises(ValueError, match="not of this model"):
        dit.begin(dit.TinyModel(tokens), tmp_path, tokens)


def test_frechet_distance_is_that_of_gaussians():
    import numpy as np

    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 4000, 3))
    assert frechet.frechet_distance(one, other) < 0.05
    # Means 2 apart in one of three directions, deviations 1 and 3 in all: 2^2 + 3 (3 - 1)^2.
    assert frechet.frechet_distance(one, 3 * other + [2, 0, 0]) == pytest.approx(16, rel=0.05)


def test_a_folder_or_transformer_that_is_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "weights").write_bytes(b"0" * 100)
    (tmp_path / "vae").write_bytes(b"0" * 50)
    assert export.check_size(tmp_path) == 150
    monkeypatch.setattr(export, "MAX_TRANSFORMER_BYTES", 100)
    with pytest.raises(ValueError, match="transformer is 100 bytes"):
        export.check_size(tmp_path)
    monkeypatch.setattr(export, "MAX_TRANSFORMER_BYTES", 101)
    monkeypatch.setattr(export, "MAX_BYTES", 150)
    with pytest.raises(ValueError, match="is 150 bytes"):
        export.check_size(tmp_path)


def test_the_vocabulary_is_the_captions_words():
    index = {"concepts": [{"name": "cat", "synonyms": ["kitty"], "keywords": ["meow"]},
                          {"name": "dog", "synonyms": [], "keywords": []}]}  # fmt: skip
    captions = {"128x128": [["a red cat", "two kitties above cats"]] * 3, "192x128": [["a dog", "rare"]]}
    found = vocabulary.vocabulary(index, captions)
    assert found["things"] == {"cat": ["kitty", "meow"], "dog": []}
    assert found["others"] == ["red", "kitties", "above"]
    assert found["sizes"] == [[128, 128], [192, 128]]
