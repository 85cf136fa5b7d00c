"""Golden cases of the paper's released inference mode, on a diffusers Qwen-Image transformer.

They run through `routers.elastic` like any other picture. Compared are the prediction of every call,
the latents after every step, and from `trace.json` every block's gate probability, action and MLP width.

Shapes: B batch, N blocks, L image tokens, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from backbones.qwen_image import PATCH, TRANSFORMER
from routers.elastic import Elastic
from routers.paper.checkpoint import load_release, use_sigmoid_gelu
from routers.paper.policy import ReleasePolicy, ReleaseSettings
from routers.trace import REUSE, SKIP, CallRecord

from .runner import Case, Outcome, Tolerance

ACTIVATION = "x*sigmoid(1.702*x)"
UPDATE = "v = uncond + 4*(cond-uncond) if cfg else cond; v = v / v.std()"
"""How the sampling rule that `run` implements begins; its 4 is the case's guidance_scale."""

EXACT = Tolerance(0.0, 0.0)
COMPUTE = 0


def run(case: Case) -> Outcome:
    """Replay a case of any size, depth, batch and seed, with or without guidance.

    Raises ValueError if the case asks for an activation or a sampling rule that is not implemented.
    """
    config = case.config
    if config["mlp_activation"] != ACTIVATION or not config["update"].startswith(UPDATE):
        raise ValueError(f"unknown mlp_activation or update rule in {case.folder / 'config.json'}")
    transformer, routers = load_release(
        case.folder / "weights.safetensors", lambda: build_transformer(config), TRANSFORMER
    )
    use_sigmoid_gelu(transformer, TRANSFORMER)
    settings = release_settings(config)
    elastic = Elastic(transformer, TRANSFORMER, lambda: ReleasePolicy(settings), routers)
    with torch.no_grad(), elastic.scope(num_steps=config["steps"]) as trace:
        outcome = Outcome(dict(_denoise(transformer, config, case.inputs)))
    recorded = json.loads((case.folder / "trace.json").read_text(encoding="utf-8"))
    for call, entry in zip(trace.calls, recorded, strict=True):
        prefix = f"step{entry['step']:02d}.{entry['branch']}"
        for name, actual, expected, tolerance in _decisions(call, entry["blocks"], case.tolerance):
            outcome.actual[f"{prefix}.{name}"] = actual
            outcome.expected[f"{prefix}.{name}"] = expected
            outcome.tolerances[f"{prefix}.{name}"] = tolerance
    return outcome


def build_transformer(config: dict[str, Any]) -> nn.Module:
    """The diffusers transformer of a case's sizes."""
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=config["in_channels"],
        out_channels=config["in_channels"] // PATCH**2,
        num_layers=config["layers"],
        attention_head_dim=config["dim"] // config["heads"],
        num_attention_heads=config["heads"],
        joint_attention_dim=config["joint_attention_dim"],
        axes_dims_rope=tuple(config["axes_dims_rope"]),
    )


def release_settings(config: dict[str, Any]) -> ReleaseSettings:
    """A case's constants; like the released code it takes one gate decision for the whole batch."""
    cache = config["cache"]
    return ReleaseSettings(
        threshold=config["gate_threshold"],
        reuse_low=cache["low"],
        reuse_high=cache["high"],
        start_step=cache["start_step"],
        max_uses=cache["max_use"],
        batch_mean=True,
    )


def _denoise(
    transformer: Any, config: dict[str, Any], inputs: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every call's prediction and every step's latents `[B, L, C]`, by the case's own update rule."""
    latents, sigmas = inputs["latents"], [*inputs["sigmas"], torch.zeros(())]
    branches = ("cond", "uncond") if config["cfg"] else ("cond",)
    for step in range(config["steps"]):
        velocity = {}
        for branch in branches:
            with transformer.cache_context(branch):
                (velocity[branch],) = transformer(
                    hidden_states=latents,
                    encoder_hidden_states=inputs[branch],
                    timestep=sigmas[step].expand(len(latents)),
                    img_shapes=[[(1, *config["grid"])]] * len(latents),
                    return_dict=False,
                )
            yield f"step{step:02d}.{branch}", velocity[branch]
        v = velocity["cond"]
        if config["cfg"]:
            v = velocity["uncond"] + config["guidance_scale"] * (v - velocity["uncond"])
        v = v / v.std()
        latents = latents + (sigmas[step + 1] - sigmas[step]) * v
        yield f"step{step:02d}.latents", latents


def _decisions(
    call: CallRecord, blocks: list[dict[str, Any]], tolerance: Tolerance
) -> Iterator[tuple[str, Tensor, Tensor, Tolerance]]:
    """(name, actual, recorded, tolerance) of a call's probabilities, actions and widths, each `[N, B]`.

    Where a block was not computed there is no width; both sides then hold -1.
    """
    if call.gate is None:
        raise ValueError("the trace has no gate logits")
    probabilities = torch.sigmoid(torch.from_numpy(call.gate.T.copy()))
    yield "p", probabilities, torch.tensor([block["p"] for block in blocks]), tolerance
    codes = {"skip": SKIP, "reuse": REUSE, "compute": COMPUTE}
    actions = torch.from_numpy(call.actions.T.astype("float32"))
    rows = actions.shape[1]
    recorded = torch.tensor([[float(codes[block["action"]])] * rows for block in blocks])
    yield "action", actions.clamp(max=COMPUTE), recorded, EXACT
    widths = torch.tensor([[float(w) for w in block["width"]] or [-1.0] * rows for block in blocks])
    yield "width", actions.clamp(min=-1), widths, EXACT
