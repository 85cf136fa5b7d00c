"""The paper's released inference mode: recorded runs, a second implementation, and the rules by hand.

Shapes: B batch, L tokens, D dim, R rows, W widths.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backbones.qwen_image import TRANSFORMER
from routers.elastic import Elastic
from routers.paper.checkpoint import ReleaseRouter, use_sigmoid_gelu
from routers.paper.policy import ReleasePolicy, ReleaseSettings
from routers.policy import CallInfo, RunInfo
from routers.trace import REUSE, SKIP
from tests.golden.runner import run_case

DATA = Path(__file__).parents[1] / "golden" / "data"
LOOSE = ReleaseSettings(reuse_high=0.6, start_step=2, max_uses=2)
"""Thresholds at which a short run of a tiny model skips, reuses and computes."""
SIGMAS = torch.linspace(1.0, 0.1, 10)
COMPUTE = 0


# -- recorded runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["edit_reference_cache", "edit_reference_skip_width"])
def test_recorded_run_is_reproduced(case: str) -> None:
    report = run_case(DATA / case)
    assert report.ok, report.details(only_failures=True)
    calls = sum(c.name.endswith(".action") for c in report.comparisons)
    assert calls == {"edit_reference_cache": 48, "edit_reference_skip_width": 16}[case]
    assert max(c.difference for c in report.comparisons) < 2e-5


# -- a second implementation -------------------------------------------------------------------


def tiny(seed: int = 0, layers: int = 4) -> tuple[Any, nn.ModuleList]:
    """A tiny transformer and routers whose gates move across the threshold during a run."""
    return copy.deepcopy(_tiny(seed, layers))


@functools.cache
def _tiny(seed: int, layers: int) -> tuple[Any, nn.ModuleList]:
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    ).eval().requires_grad_(False)  # fmt: skip
    routers = nn.ModuleList(ReleaseRouter(48, 32) for _ in range(layers)).requires_grad_(False)
    for router in routers:
        nn.init.normal_(router.out[2].weight, std=1.5)
        nn.init.normal_(router.width_head.weight, std=2.0)
        nn.init.normal_(router.img_mod[1].weight, std=0.5)
        router.out[2].bias.zero_()
    centre(model, routers)
    return model, routers


def centre(model: Any, routers: nn.ModuleList) -> None:
    """Move every router's gate to a probability of about 0.5 over a dense run, so that noise decides."""
    logits: dict[int, list[Tensor]] = {i: [] for i in range(len(routers))}

    def record(index: int) -> Any:
        def hook(_block: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            stream = torch.cat([kwargs["encoder_hidden_states"], kwargs["hidden_states"]], dim=1)
            logits[index].append(routers[index](stream, kwargs["temb"])[0])

        return hook

    handles = [
        block.register_forward_pre_hook(record(i), with_kwargs=True)
        for i, block in enumerate(model.transformer_blocks)
    ]
    run_steps(model, prompts(1))
    for handle in handles:
        handle.remove()
    for i, router in enumerate(routers):
        router.out[2].bias -= torch.cat(logits[i]).mean() - 0.1


def prompts(rows: int, lengths: tuple[int, int] = (5, 5)) -> dict[str, Tensor]:
    """Text of both branches, row i depending on i only: {"cond": [B, L, D], "uncond": ...}."""
    return {
        branch: torch.stack([torch.randn(length, 24, generator=generator(i + 50 * k)) for i in range(rows)])
        for k, (branch, length) in enumerate(zip(("cond", "uncond"), lengths, strict=True))
    }


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run_steps(
    model: Any,
    text: dict[str, Tensor],
    masks: dict[str, Tensor] | None = None,
    first: int = 0,
    oracle: Oracle | None = None,
) -> Tensor:
    """Latents after every step `[T, B, L, C]`, guided if `text` has two branches. first: seed of row 0."""
    rows = len(text["cond"])
    latents = torch.stack([torch.randn(16, 16, generator=generator(900 + first + i)) for i in range(rows)])
    after = []
    for sigma, following in zip(SIGMAS, [*SIGMAS[1:], torch.zeros(())], strict=True):
        v = {}
        for branch, states in text.items():
            if oracle is not None:
                oracle.branch = branch
            with torch.no_grad(), model.cache_context(branch):
                (v[branch],) = model(
                    hidden_states=latents,
                    encoder_hidden_states=states,
                    encoder_hidden_states_mask=None if masks is None else masks[branch],
                    timestep=sigma.expand(rows),
                    img_shapes=[[(1, 4, 4)]] * rows,
                    return_dict=False,
                )
        guided = v["cond"] if len(v) == 1 else v["uncond"] + 2 * (v["cond"] - v["uncond"])
        latents = latents + (following - sigma) * guided
        after.append(latents)
    return torch.stack(after)


class Oracle:
    """The release's rules written a second time: one function per block, its state in plain sight.

    log: action of every block call. swaps: reuses of the other guidance branch's delta. misfits:
    reuses given up because the prompt had another length.
    """

    def __init__(self, model: Any, routers: nn.ModuleList, settings: ReleaseSettings) -> None:
        self.settings, self.branch = settings, ""
        self.log: list[int] = []
        self.swaps = self.misfits = 0
        for block, router in zip(model.transformer_blocks, routers, strict=True):
            block.forward = self.wrap(block, block.forward, router.state_dict())

    def wrap(self, block: Any, dense: Any, weights: dict[str, Tensor]) -> Any:
        s = self.settings
        state: dict[str, Any] = {"step": -1, "time": None, "calls": 0, "stores": [None, None]}

        def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> Any:
            image, text = hidden_states, encoder_hidden_states
            p_B, width_B = self.route(torch.cat([text, image], dim=1), temb, weights)
            p = float(p_B.mean())
            if p < s.threshold:
                self.log.append(SKIP)
                return text, image
            if state["time"] != temb[0].mean().item():
                state["time"], state["calls"] = temb[0].mean().item(), 0
                state["step"] += 1
            slot, state["calls"] = state["calls"] % 2, state["calls"] + 1
            late, store = state["step"] >= s.start_step, state["stores"][slot]
            if late and s.reuse_low <= p <= s.reuse_high and store and store["uses"] < s.max_uses:
                if store["text"].shape == text.shape:
                    store["uses"] += 1
                    self.swaps += store["branch"] != self.branch
                    self.log.append(REUSE)
                    return text + store["text"], image + store["image"]
                self.misfits += 1
            self.log.append(COMPUTE)
            new_text, new_image = narrowed(block, width_B, dense, image, text, temb, rest)
            if late:
                delta = {"text": new_text - text, "image": new_image - image}
                state["stores"][slot] = {**delta, "uses": 0, "branch": self.branch}
            return new_text, new_image

        return forward

    @staticmethod
    def route(x: Tensor, temb: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        shift, scale, _ = F.linear(F.silu(temb), w["img_mod.1.weight"], w["img_mod.1.bias"]).chunk(3, -1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        h = F.relu(F.linear(x, w["out.0.weight"], w["out.0.bias"]))
        gate = F.linear(h, w["out.2.weight"], w["out.2.bias"]).mean(1)
        return torch.sigmoid(gate), F.linear(h, w["width_head.weight"], w["width_head.bias"]).mean(1).argmax(
            -1
        )


def narrowed(
    block: Any, width_B: Tensor, dense: Any, image: Tensor, text: Tensor, temb: Tensor, rest: Any
) -> Any:
    """The block row by row, with the columns of the MLP's unused units set to zero."""
    rows, weight = [], block.img_mlp.net[2].weight
    for i, width in enumerate(width_B.tolist()):
        saved = weight.data.clone()
        weight.data[:, weight.shape[1] * (width + 1) // 4 :] = 0
        rows.append(dense(image[i : i + 1], text[i : i + 1], temb=temb[i : i + 1], **rest))
        weight.data.copy_(saved)
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


@pytest.mark.parametrize(
    ("rows", "lengths", "branches"),
    [(1, (5, 5), 2), (2, (5, 5), 2), (1, (5, 7), 2), (1, (5, 5), 1)],
    ids=["guided", "batch of two", "prompts of two lengths", "unguided"],
)
def test_equals_a_second_implementation(rows: int, lengths: tuple[int, int], branches: int) -> None:
    """Over seeds: same actions in every block call, same latents after every step."""
    log: list[int] = []
    swaps = misfits = 0
    settings = dataclasses.replace(LOOSE, batch_mean=True)
    for seed in range(2):
        text = dict(list(prompts(rows, lengths).items())[:branches])
        model, routers = tiny(seed)
        oracle = Oracle(model, routers, settings)
        expected = run_steps(model, text, oracle=oracle)
        model, routers = tiny(seed)
        elastic = Elastic(model, TRANSFORMER, lambda: ReleasePolicy(settings), routers)
        with elastic.scope(num_steps=len(SIGMAS)) as trace:
            actual = run_steps(model, text)
        actions = np.concatenate([call.actions.clip(max=COMPUTE)[0] for call in trace.calls])
        assert actions.tolist() == oracle.log
        assert (actual - expected).abs().max() <= 1e-4
        log += oracle.log
        swaps, misfits = swaps + oracle.swaps, misfits + oracle.misfits
    assert min(log.count(action) for action in (SKIP, REUSE, COMPUTE)) >= 10, "every rule must be met"
    if branches == 2:
        assert (misfits if lengths[0] != lengths[1] else swaps) > 0, "the shared store must be met"


# -- through routers.elastic -------------------------------------------------------------------


def test_row_of_a_padded_batch_equals_the_request_alone() -> None:
    """Per sample, with prompts of different lengths: padding neither attends nor votes."""
    lengths = {"cond": (5, 7, 4), "uncond": (3, 3, 3)}
    model, routers = tiny()
    elastic = Elastic(model, TRANSFORMER, lambda: ReleasePolicy(LOOSE), routers)
    full = {"cond": prompts(3, (7, 3))["cond"], "uncond": prompts(3, (7, 3))["uncond"]}
    masks = {
        branch: torch.arange(full[branch].shape[1])[None] < torch.tensor(lengths[branch])[:, None]
        for branch in full
    }
    with elastic.scope() as together:
        batch = run_steps(model, full, masks)
    decisions = np.stack([call.actions for call in together.calls])
    assert (decisions != decisions[:, :1]).any(), "the rows must differ in what they do"
    for row in range(3):
        text = {branch: full[branch][row : row + 1, : lengths[branch][row]] for branch in full}
        with elastic.scope() as alone:
            single = run_steps(model, text, first=row)
        assert np.array_equal(np.stack([call.actions[0] for call in alone.calls]), decisions[:, row])
        assert (single[:, 0] - batch[:, row]).abs().max() <= 1e-5


def test_second_picture_equals_the_first() -> None:
    model, routers = tiny(1)
    elastic = Elastic(model, TRANSFORMER, lambda: ReleasePolicy(LOOSE), routers)
    pictures = []
    for _ in range(2):
        with elastic.scope() as trace:
            pictures.append(run_steps(model, prompts(1)))
        assert trace.decisions["reuse"]
    assert torch.equal(*pictures)


def test_cost_counts_the_routers_token_by_token() -> None:
    model, routers = tiny(1)
    elastic = Elastic(model, TRANSFORMER, lambda: ReleasePolicy(LOOSE), routers)
    with elastic.scope():
        run_steps(model, prompts(2))  # the first call of a shape also counts what it costs
    # the counter has no formula for the CPU's fused attention, so attention runs as two matmuls here
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), elastic.scope() as trace, counter:
        run_steps(model, prompts(2))
    assert trace.flops["spent"] == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_activation_of_both_mlps_is_switched_and_restored() -> None:
    model, _ = tiny()
    modules = {name: set(m.__dict__) for name, m in model.named_modules()}
    dense = run_steps(model, prompts(1))
    switched = use_sigmoid_gelu(model, TRANSFORMER)
    changed = [name for name, m in model.named_modules() if set(m.__dict__) != modules[name]]
    assert len(changed) == 2 * len(model.transformer_blocks)
    x = torch.linspace(-3, 3, 48)
    for mlp in (model.transformer_blocks[0].img_mlp, model.transformer_blocks[0].txt_mlp):
        y = mlp.net[0].proj(x)
        assert torch.equal(mlp.net[0](x), y * torch.sigmoid(1.702 * y))
    assert not torch.equal(dense, run_steps(model, prompts(1)))
    switched.close()
    assert torch.equal(dense, run_steps(model, prompts(1)))
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == modules


def test_block_without_a_tanh_gelu_is_refused_and_left_alone() -> None:
    model, _ = tiny()
    last = model.transformer_blocks[-1]
    last.img_mlp.net[0] = last.txt_mlp.net[0] = nn.Linear(48, 192)
    with pytest.raises(ValueError, match=r"transformer_blocks\.3 .* has no tanh-GELU"):
        use_sigmoid_gelu(model, TRANSFORMER)
    assert "gelu" not in model.transformer_blocks[0].img_mlp.net[0].__dict__


# -- the rules, by hand ------------------------------------------------------------------------


def call(step: int, rows: int = 1, signature: object = ()) -> CallInfo:
    zeros = np.zeros((rows, 1))
    return CallInfo(
        step=step, branch="cond", branches=("cond",), rows=rows, costs=[], outside=0.0, overhead=0.0,
        available=zeros, spent=zeros, signature=signature,
    )  # fmt: skip


def logit(*probabilities: float) -> np.ndarray:
    p = np.array(probabilities)
    return np.log(p / (1 - p)).astype(np.float32)


WIDEST = np.array([[0, 0, 0, 1]], np.float32)


def decide(
    policy: ReleasePolicy, step: int, p: float, block: int = 0, signature: object = ()
) -> tuple[int, int]:
    """(code, store) of a single row."""
    code, store = policy.decide_block(call(step, signature=signature), block, logit(p), WIDEST)
    return int(code[0]), int(store[0])


def test_threshold_and_width() -> None:
    policy = ReleasePolicy()
    gate = np.array([-0.01, 0.0, 0.01], np.float32)  # p = 0.5 is open
    widths = np.array([[9, 0, 0, 0], [0, 0, 2, 1], [1, 2, 2, 0]], np.float32)
    assert policy.decide_block(call(0, rows=3), 0, gate, widths)[0].tolist() == [SKIP, 2, 1]


def test_reuse_starts_at_step_15_and_ends_after_10_uses() -> None:
    policy, widest = ReleasePolicy(), 3
    codes = [decide(policy, step, 0.51)[0] for step in range(40)]
    assert codes == [widest] * 16 + [REUSE] * 10 + [widest] + [REUSE] * 10 + [widest] + [REUSE] * 2


@pytest.mark.parametrize(("p", "code"), [(0.4999, SKIP), (0.5, REUSE), (0.5149, REUSE), (0.5151, 3)])
def test_reuse_zone(p: float, code: int) -> None:
    policy = ReleasePolicy()
    for step in range(16):
        decide(policy, step, 0.7)
    assert decide(policy, 16, p)[0] == code


def test_only_open_steps_of_the_block_count() -> None:
    policy = ReleasePolicy(ReleaseSettings(start_step=2))
    closed, barely_open = 0.4, 0.51
    pattern = [barely_open, closed, barely_open, closed, barely_open, closed, barely_open]
    assert [decide(policy, step, p)[0] for step, p in enumerate(pattern)] == [
        3,
        SKIP,
        3,
        SKIP,
        3,
        SKIP,
        REUSE,
    ]
    assert decide(policy, 7, barely_open, block=1)[0] == 3, "each block counts for itself"


def test_stores_are_taken_in_order_of_open_calls() -> None:
    policy = ReleasePolicy(ReleaseSettings(start_step=0))
    assert [decide(policy, 0, p) for p in (0.51, 0.51)] == [(3, 0), (3, 1)]
    assert [decide(policy, 1, p) for p in (0.51, 0.51)] == [(REUSE, 0), (REUSE, 1)]
    # the first branch skips the block, so the second one finds the first one's store
    assert [decide(policy, 2, p) for p in (0.4, 0.51)] == [(SKIP, 0), (REUSE, 0)]


def test_delta_of_another_shape_is_computed_anew() -> None:
    policy = ReleasePolicy(ReleaseSettings(start_step=0))
    decide(policy, 0, 0.51, signature="short prompt")
    assert decide(policy, 1, 0.51, signature="long prompt")[0] == 3
    assert decide(policy, 2, 0.51, signature="long prompt")[0] == REUSE


def test_batch_mean_decides_for_all_and_samples_decide_alone() -> None:
    gate, widths = logit(0.3, 0.6), np.repeat(WIDEST, 2, axis=0)
    assert ReleasePolicy().decide_block(call(0, rows=2), 0, gate, widths)[0].tolist() == [SKIP, 3]
    together = ReleasePolicy(ReleaseSettings(batch_mean=True))
    assert together.decide_block(call(0, rows=2), 0, gate, widths)[0].tolist() == [SKIP, SKIP]


def test_bfloat16_rounds_probabilities_before_comparing() -> None:
    """In bf16 0.4995 becomes 0.5, which is open, and 0.5145 becomes 0.515625, above the reuse zone."""
    for p, fp32, bf16 in ((0.4995, SKIP, 3), (0.5145, REUSE, 3), (0.5100, REUSE, REUSE)):
        for dtype, expected in ((torch.float32, fp32), (torch.bfloat16, bf16)):
            policy = ReleasePolicy(ReleaseSettings(start_step=0 if p > 0.5 else 5), dtype)
            decide(policy, 0, 0.7)
            assert decide(policy, 1, p)[0] == expected, (p, dtype)


def test_start_forgets() -> None:
    policy = ReleasePolicy(ReleaseSettings(start_step=0))
    decide(policy, 0, 0.51)
    policy.start(RunInfo(1, 1.0))
    assert decide(policy, 1, 0.51)[0] == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [({"threshold": 1.5}, "threshold is 1.5"), ({"start_step": -1}, "start_step is -1")],
)
def test_bad_settings(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReleaseSettings(**data)
