"""Recipes of routers and of the turbo model at micro sizes: they train what the engine will run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from transformers import Qwen2Tokenizer

from backbones import flux as flux_family
from backbones import qwen_image
from backbones.tiny.recipes import dit as qwen_dit
from backbones.tiny.recipes import fast_dit as qwen_fast
from backbones.tiny.recipes import routers as step
from backbones.tiny.recipes import routers_bundle, routers_model
from backbones.tiny.recipes import text as qwen_text
from backbones.tiny.recipes.flux import dit, export, fast_dit, turbo, turbo_export
from backbones.tiny.recipes.flux import picture_vae as flux_vae
from backbones.tiny.recipes.flux import text as flux_text
from routers.elastic import Elastic
from routers.trace import FULL, REUSE, SKIP
from routers.train.student import Decision
from routers.trained.policy import Profile, TrainedPolicy
from tests.recipes.test_flux_recipe import CONCEPTS, run_step, runs, wake, write_latents  # noqa: F401

LOAD = ("--minutes", 5, "--batch", 8)


@pytest.fixture
def micro(monkeypatch) -> None:
    """One head of 32 in every block, and few blocks."""
    for config, sizes in ((fast_dit.DIT_CONFIG, {"num_layers": 1, "num_single_layers": 2}),
                          (qwen_fast.DIT_CONFIG, {"num_layers": 3})):  # fmt: skip
        for name, value in {"num_attention_heads": 1, **sizes}.items():
            monkeypatch.setitem(config, name, value)


def flux_model(runs) -> dit.TinyFlux:  # noqa: F811
    torch.manual_seed(0)
    model = dit.TinyFlux(flux_text.Prompts.load(runs / "tokenizers"))
    wake(model)
    return model.requires_grad_(False).eval()


def save(model: torch.nn.Module, path) -> None:
    state = model.state_dict()
    torch.save({"model": state, "ema": dict(model.named_parameters())}, path)


def test_the_student_begins_as_the_teacher_at_its_scale(runs, micro):  # noqa: F811
    teacher = flux_model(runs).dit
    student = turbo.without_guidance(teacher, 3.5)
    assert student.config.guidance_embeds is False
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 64, teacher.config.in_channels, generator=generator)
    words = torch.randn(2, flux_text.CLIP_WIDTH), torch.randn(2, 5, flux_text.T5_WIDTH)
    sigma, angles = torch.tensor([0.3, 0.9]), fast_dit.rope(teacher, 5)
    told = fast_dit.dit_forward(teacher, latents, sigma, words, angles, torch.full((2,), 3.5))
    assert torch.allclose(fast_dit.dit_forward(student, latents, sigma, words, angles), told, atol=1e-4)


def test_fine_steps_of_the_teacher_are_of_second_order():
    begin, end, x = torch.ones(1), torch.full((1,), 0.5), torch.ones(1, 1, 1)
    exact = torch.exp(end - begin).view(1, 1, 1)
    errors = [
        float((turbo.substeps(lambda x, sigma, text: x, x, (), begin, end, n) - exact).abs()) for n in (1, 2)
    ]
    assert 3 < errors[0] / errors[1] < 5


def qwen(tokenizer: Qwen2Tokenizer):
    torch.manual_seed(0)
    tokens = qwen_text.PromptTokens(tokenizer)
    model = qwen_dit.TinyModel(tokenizer).requires_grad_(False).eval()
    wake(model)
    made = routers_model.Qwen.of(model, tokens)
    text = made.text(["a cat", "a red cat"], "cpu")

    def call(x, sigma):
        return made.dit(
            x.repeat(2, 1, 1), text[0], text[1], sigma.repeat(2), img_shapes=[[(1, 8, 8)]] * 4,
            return_dict=False,
        )[0]  # fmt: skip

    return made, text, call, qwen_image.TRANSFORMER


def flux(runs):  # noqa: F811
    model = flux_model(runs)
    made = routers_model.Turbo(
        turbo.without_guidance(model.dit, 3.5), model.encode, flux_text.Prompts.load(runs / "tokenizers")
    )
    text = made.text(["a cat", "a red cat"], "cpu")
    return made, text, lambda x, s: fast_dit.class_forward(made.dit, x, s, text), flux_family.TRANSFORMER


@pytest.mark.parametrize("family", ["qwen", "flux"])
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_training_computes_what_the_policy_will_decide(runs, tmp_path, micro, monkeypatch, family):  # noqa: F811
    """Blocks closed from the first evaluation on, others later, at several widths."""
    monkeypatch.setattr(routers_model, "HALF", torch.float32)
    index = {"concepts": CONCEPTS, "styles": ["a", "b", "c"], "rows": []}
    model, text, call, spec = (
        qwen(qwen_text.train_tokenizer(index, tmp_path / "t")) if family == "qwen" else flux(runs)
    )
    blocks, rng = len(model.blocks), np.random.default_rng(0)
    plan = rng.choice([REUSE, 0, 1, FULL], (4, 2, blocks)).astype(np.int8)
    assert (plan[0] == REUSE).any(), "some block is closed before it was ever computed"

    class Given(TrainedPolicy):
        reads_routers = property(lambda self: False, lambda self, value: None)

        def _actions(self, info, logits):
            codes = np.where(plan[info.step] == REUSE, SKIP, plan[info.step]).astype(np.int8)
            return np.tile(codes, (info.rows // 2, 1))

    profile = Profile(np.array([0.5, 1.0]), np.ones((2, 4)))
    states = [torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    sigmas = [torch.full((2,), 1 - i / 4) for i in range(4)]
    elastic = Elastic(model.dit, spec)
    policy = Given(profile, np.full(blocks, 0.6))
    with torch.no_grad(), elastic.scope(num_steps=4, policy=policy, budget=0.5, samples=2):
        expected = [call(x, sigma) for x, sigma in zip(states, sigmas, strict=True)]
    elastic.detach()
    passes = routers_model.Passes(blocks)
    for number, (x, sigma) in enumerate(zip(states, sigmas, strict=True)):
        gate = torch.tensor(plan[number] != REUSE).float()
        width = torch.nn.functional.one_hot(torch.tensor(plan[number]).long().clamp_min(0), 4).float()
        decision = Decision(gate, width, torch.full((blocks,), 0.6))
        now = torch.full((2,), float(number))
        with torch.no_grad():
            found, seen = routers_model.forward(model, x, sigma, text, decision, passes, now)
        assert torch.allclose(found, expected[number], atol=2e-3), number
    assert seen.pooled.shape[:2] == (blocks, 2)
    passes.forget(torch.ones(2 * model.branches, dtype=torch.bool))
    assert all((last < 0).all() for last in passes.last)


def test_spending_is_the_budget_on_average_over_budgets_alike():
    prices = SimpleNamespace(at=lambda gate, width: gate.double().mean(-1))
    budget = torch.tensor([0.25, 0.25, 0.75, 0.75])
    own = torch.logit(torch.tensor([[0.15], [0.35], [0.75], [0.75]]))  # off, but right in the mean
    alike = torch.logit(torch.tensor([[0.35], [0.35], [0.75], [0.75]]))
    width = torch.zeros(4, 1, 4)
    _, mixed = step.spending(own, width, prices, budget)
    spend, more = step.spending(alike, width, prices, budget)
    assert spend.tolist() == pytest.approx([0.35, 0.35, 0.75, 0.75])
    assert mixed < more


@pytest.mark.slow
def test_turbo_then_its_routers_then_a_folder(runs, tmp_path, micro, monkeypatch, capsys):  # noqa: F811
    from backbones import registry
    from edit_cli.main import main as edit

    model, prompts = flux_model(runs), flux_text.Prompts.load(runs / "tokenizers")
    save(model, tmp_path / "teacher.pt")
    shared = ("--data", runs / "data", "--latents", runs / "latents.npz", "--tokenizer", runs / "tokenizers",
              *LOAD)  # fmt: skip
    first = ("--teacher", tmp_path / "teacher.pt", "--check-rows", 2, "--out", tmp_path / "turbo")
    run_step(monkeypatch, turbo, *shared, *first, "--max-steps", 2)
    run_step(monkeypatch, turbo, *shared, *first, "--max-steps", 4, "--elastic-from", 0)
    out = capsys.readouterr().out
    assert "before" in out and "resumed at step 2" in out and "after" in out
    run_step(monkeypatch, step, *shared, "--family", "flux-turbo", "--model", tmp_path / "turbo" / "parcel",
             "--text", tmp_path / "teacher.pt", "--out", tmp_path / "routers", "--max-steps", 2,
             "--check-samples", 1)  # fmt: skip
    assert "budget 0.5" in capsys.readouterr().out
    vae = flux_vae.build_vae()
    export.build_pipeline(model, prompts, vae, 1.0).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "edit.json").write_text(
        '{"width": 128, "height": 128, "steps": 20, "guidance": 3.5, "max_sequence_length": 20}'
    )
    run_step(monkeypatch, turbo_export, tmp_path / "routers" / "parcel", "--base", tmp_path / "base", "--out",
             tmp_path / "flux_tiny_turbo")  # fmt: skip
    assert (
        FluxPipeline.from_pretrained(tmp_path / "flux_tiny_turbo").transformer.config.guidance_embeds is False
    )
    backbone = registry.resolve(str(tmp_path / "flux_tiny_turbo"))
    assert (backbone.defaults.steps, backbone.takes_guidance) == (4, False)
    run_step(monkeypatch, routers_bundle, tmp_path / "routers", "-m", tmp_path / "flux_tiny_turbo", "-o",
             tmp_path / "trained", "--rows", 2)  # fmt: skip
    words = ["a cat", "-m", str(tmp_path / "flux_tiny_turbo"), "--routers", str(tmp_path / "trained")]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        edit(["generate", *words, "--budget", "0.6", "-o", "cat.png", "-q"])
    assert (tmp_path / "cat.png").is_file()


def qwen_files(folder):
    """What step `routers` reads: pictures' index, latents, tokenizer, and a model, which is returned."""
    rows = [[c, s, None, 0] for c in range(3) for s in range(2)]
    index = {"concepts": CONCEPTS, "styles": ["a", "b", "c"], "rows": rows}
    (folder / "pictures.json").write_text(json.dumps(index))
    tokenizer = qwen_text.train_tokenizer(index, folder / "tokenizer")
    z = np.random.default_rng(0).standard_normal((len(rows), 8, 16, 16)).astype(np.float32)
    write_latents(folder / "z.npz", rows, z)
    torch.manual_seed(0)
    model = qwen_dit.TinyModel(tokenizer)
    wake(model)
    save(model, folder / "model.pt")
    return model, tokenizer


@pytest.mark.slow
def test_routers_of_qwen_image_tiny_train_and_resume(tmp_path, micro, monkeypatch, capsys):
    _, tokenizer = qwen_files(tmp_path)
    common = ("--data", tmp_path, "--latents", tmp_path / "z.npz", "--tokenizer", tmp_path / "tokenizer",
              "--model", tmp_path / "model.pt", "--out", tmp_path / "routers", "--check-samples", 1,
              *LOAD)  # fmt: skip
    run_step(monkeypatch, step, *common, "--max-steps", 2)
    run_step(monkeypatch, step, *common, "--max-steps", 4)
    out = capsys.readouterr().out
    assert "resumed at step 2" in out and "20 evaluations at budget 0.5" in out
    routed = routers_bundle.read_routers(tmp_path / "routers" / "routers.safetensors")
    assert len(routed.routers.blocks) == 3 and not next(iter(routed.parameters())).requires_grad
    whole = qwen_dit.load_average(tmp_path / "routers" / "parcel", tokenizer)
    before = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
    moved = [n for n, value in whole.state_dict().items() if not torch.equal(value, before[n].half().float())]
    assert moved and all(name.startswith("dit.") for name in moved), "text encoders stay"


@pytest.mark.slow
def test_routers_learn_which_blocks_matter(tmp_path, micro, monkeypatch):
    model, _ = qwen_files(tmp_path)
    with torch.no_grad():  # the block in the middle hardly adds anything
        for mod in (model.dit.transformer_blocks[1].img_mod[1], model.dit.transformer_blocks[1].txt_mod[1]):
            for part in (2, 5):
                for tensor in (mod.weight, mod.bias):
                    tensor.chunk(6)[part].mul_(0.02)
    save(model, tmp_path / "model.pt")
    run_step(
        monkeypatch, step, "--data", tmp_path, "--latents", tmp_path / "z.npz", "--tokenizer",
        tmp_path / "tokenizer", "--model", tmp_path / "model.pt", "--out", tmp_path / "routers", "--train",
        "routers", "--check-samples", 1, "--minutes", 9, "--batch", 16, "--max-steps", 80,
    )  # fmt: skip
    routed = routers_bundle.read_routers(tmp_path / "routers" / "routers.safetensors")
    gates = [float(router.gate.bias) for router in routed.routers.blocks]
    assert gates[1] < min(gates[0], gates[2]), gates
