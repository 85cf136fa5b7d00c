"""Golden cases of the Hunyuan3D networks, schedules and sampling loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from backbones.hunyuan3d import checkpoints, dit_v2, dit_v21, schedulers
from backbones.hunyuan3d.pipeline import denoise
from backbones.hunyuan3d.vecset import FourierEmbedder
from backbones.model_files import load_weights
from backbones.tiny.recipes.shapes.point_encoder import EncodingShapeVAE, Posterior

from .runner import Case, Outcome

SINUSOIDS = Path(__file__).parent / "data" / "hunyuan3d_dit_v2_guidance"
"""The case that recorded the sinusoids of times and guidance scales."""

DITS: dict[str, Any] = {"Hunyuan3DDiT": dit_v2.Hunyuan3DDiT, "HunYuanDiTPlain": dit_v21.HunYuanDiTPlain}
SCHEDULERS: dict[str, Any] = {
    "FlowMatchEulerDiscreteScheduler": schedulers.FlowMatchEulerScheduler,
    "ConsistencyFlowMatchEulerDiscreteScheduler": schedulers.ConsistencyFlowMatchEulerScheduler,
}


class Recorder:
    """Collects intermediate results with forward hooks."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def output(self, module: nn.Module, *names: str) -> None:
        """Record a module's output, or each part of the tuple it returns."""

        def hook(module: nn.Module, args: Any, result: Any) -> None:
            parts = result if isinstance(result, tuple) else (result,)
            self.seen.update(zip(names, parts, strict=True))

        module.register_forward_hook(hook)

    def input(self, module: nn.Module, name: str) -> None:
        """Record a module's first positional input."""
        module.register_forward_pre_hook(lambda module, args: self.seen.__setitem__(name, args[0]))


def _build(target: str, case: Case, name: str) -> nn.Module:
    return checkpoints.build_component(
        name, {"target": target, "params": case.config["params"]}, case.weights
    )


def _contexts(case: Case) -> dict[str, Tensor]:
    return {key.removeprefix("cond_"): value for key, value in case.inputs.items() if key.startswith("cond_")}


@cache
def recorded_frequencies() -> Tensor:
    """Frequencies `[128]` of the sinusoid on the processor that made the recordings.

    Processors differ in the last bit of the fp32 `exp` that they come from, and a guidance scale of 7.5
    multiplies it by 7500. Of ours and their two neighbours in fp32, those are taken that
    give the recorded sinusoids.
    """
    inputs, outputs = (load_file(SINUSOIDS / f"{name}.safetensors") for name in ("inputs", "outputs"))
    ours = dit_v2.frequencies(1000.0, torch.device("cpu"))
    near = torch.stack([ours.nextafter(torch.zeros(())), ours, ours.nextafter(torch.full((), 2.0))])
    error = torch.zeros_like(near)
    for scale, sinusoid in (("guidance", "mid.g_sinusoid"), ("t", "mid.t_sinusoid")):
        angles = (dit_v2.TIME_SCALE * inputs[scale])[:, None, None] * near
        for made, recorded in zip((angles.cos(), angles.sin()), outputs[sinusoid].chunk(2, -1), strict=True):
            error = torch.maximum(error, (made - recorded[:, None]).abs().amax(0))
    return near.gather(0, error.argmin(0, keepdim=True))[0]


def _as_recorded(run: Callable[[Case], Outcome]) -> Callable[[Case], Outcome]:
    """Run a case with the recording processor's frequencies, so that it is held to its own tolerance."""

    def patched(case: Case) -> Outcome:
        frequencies = recorded_frequencies()
        with mock.patch.object(dit_v2, "frequencies", return_value=frequencies):
            return run(case)

    return patched


@_as_recorded
def run_dit_v2(case: Case) -> Outcome:
    """2.0 / mini DiT, with or without guidance embedding."""
    model = _build("Hunyuan3DDiT", case, "model")
    recorder = Recorder()
    recorder.input(model.time_in, "mid.t_sinusoid")
    recorder.output(model.time_in, "mid.time_in")
    if model.guidance_embed:
        recorder.input(model.guidance_in, "mid.g_sinusoid")
        recorder.output(model.guidance_in, "mid.guidance_in")
    for i, block in enumerate(model.double_blocks):
        recorder.output(block, f"mid.double_{i}.latent", f"mid.double_{i}.cond")
    for i, block in enumerate(model.single_blocks):
        recorder.output(block, f"mid.single_{i}")
    out = model(case.inputs["x"], case.inputs["t"], _contexts(case), guidance=case.inputs.get("guidance"))
    return Outcome({**recorder.seen, "out": out})


def run_dit_v21(case: Case) -> Outcome:
    """2.1 DiT: skips, cross attention, experts."""
    model = _build("HunYuanDiTPlain", case, "model")
    recorder = Recorder()
    recorder.output(model.t_embedder, "mid.t_token")
    for i, block in enumerate(model.blocks):
        recorder.output(block.attn1, f"mid.block_{i}.attn1")
        recorder.output(block.attn2, f"mid.block_{i}.attn2")
        recorder.output(block, f"mid.block_{i}")
        if isinstance(block, dit_v21.MoEDiTBlock):
            recorder.output(block.moe.gate, f"mid.block_{i}.moe_idx", f"mid.block_{i}.moe_weight")
    out = model(case.inputs["x"], case.inputs["t"], _contexts(case))
    return Outcome({**recorder.seen, "out": out})


def run_shapevae_decode(case: Case) -> Outcome:
    """Un-scale, latent transformer, logits of query points."""
    vae = _build("ShapeVAE", case, "vae")
    recorder = Recorder()
    for i, block in enumerate(vae.transformer.resblocks):
        recorder.output(block, f"mid.resblock_{i}")
    recorder.output(vae.geo_decoder.query_proj, "mid.query_embed")
    recorder.output(vae.geo_decoder.cross_attn_decoder, "mid.cross_block")
    unscaled = vae.unscale(case.inputs["latents"])
    decoded = vae(unscaled)
    logits = vae.geo_decoder(case.inputs["queries"], decoded)
    return Outcome(
        {**recorder.seen, "latents_unscaled": unscaled, "decoded_latents": decoded, "logits": logits}
    )


def run_shapevae_encode(case: Case) -> Outcome:
    """Encoder on given query and data features; the random choice of points is not part of the case."""
    with torch.device("meta"):
        vae = EncodingShapeVAE(**case.config["params"])
    halves = nn.ModuleDict({"encoder": vae.encoder, "pre_kl": vae.pre_kl})
    wanted = {k: v for k, v in case.weights.items() if k.startswith(("encoder.", "pre_kl."))}
    load_weights(halves, wanted, "vae encoder")
    recorder = Recorder()
    recorder.output(vae.encoder.cross_attn, "mid.cross_attn")
    query, data = case.inputs["query_feats"], case.inputs["data_feats"]
    latents = vae.encoder(query, data)
    moments = vae.pre_kl(latents)
    posterior = Posterior.from_moments(moments)
    eps = case.outputs["eps"]  # the draw itself is recorded, not something to compute
    actual = {
        "encoder_latents": latents,
        "moments": moments,
        "mode": posterior.mean,
        "sample": posterior.sample(eps),
    }
    # The features of the query points must follow from their positions and raw features.
    positions = vae.embedder(case.inputs["query_pc"])
    actual["query_features"] = torch.cat([positions, query[..., positions.shape[-1] :]], dim=-1)
    return Outcome(
        {**recorder.seen, **actual},
        expected={"query_features": query},
        not_compared={"eps": "a given random draw"},
    )


def run_fourier_embedder(case: Case) -> Outcome:
    """Fourier features of points."""
    embedder = FourierEmbedder(**case.config["params"])
    return Outcome(
        {
            "embedding": embedder(case.inputs["x"]),
            "frequencies": embedder.frequencies,
            "out_dim": torch.tensor([embedder.out_dim]),
        }
    )


def run_schedulers(case: Case) -> Outcome:
    """Schedules and Euler steps; the settings of a variant like flow_nosigmas are those of its first word."""
    actual: dict[str, Tensor] = {}
    params = case.config["params"]
    for variant, steps in case.config["steps"].items():
        settings = params.get(variant, params[variant.split("_")[0]])
        kind = "ConsistencyFlowMatch" if variant.startswith("consistency") else "FlowMatch"
        scheduler = SCHEDULERS[f"{kind}EulerDiscreteScheduler"](**settings)
        scheduler.set_timesteps(
            steps, sigmas=None if variant.endswith("nosigmas") else np.linspace(0, 1, steps)
        )
        actual[f"{variant}.sigmas"], actual[f"{variant}.timesteps"] = scheduler.sigmas, scheduler.timesteps
        sample, trajectory = case.inputs["sample"], []
        for i in range(steps):
            velocity = case.inputs["model_outputs"][i]
            actual[f"{variant}.pred_original_sample_step{i}"] = scheduler.pred_original(velocity, i, sample)
            sample = scheduler.step(velocity, i, sample)
            trajectory.append(sample)
        actual[f"{variant}.trajectory"] = torch.stack(trajectory)
    return Outcome(actual)


@_as_recorded
def run_sampling_loop(case: Case) -> Outcome:
    """The whole denoising loop from given noise and condition."""
    config = case.config
    model = _build(config["model"], case, "model")
    scheduler = SCHEDULERS[config["scheduler"]](**config["scheduler_params"])
    trajectory: list[Tensor] = []
    latents = denoise(
        model,
        scheduler,
        case.inputs["noise"],
        _contexts(case),
        config["num_inference_steps"],
        config["guidance_scale"],
        on_step=lambda done, total, x: trajectory.append(x),
    )
    return Outcome(
        {"latents": latents, "trajectory": torch.stack(trajectory), "timesteps": scheduler.timesteps}
    )
