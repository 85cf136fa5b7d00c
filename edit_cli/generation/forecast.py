"""How much memory each stage will take at its peak: weights that are there, what the plan keeps, and the
largest call's tensors, traced on the meta device (routers/memory.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backbones import registry
from backbones.quantise import BYTES_PER_WEIGHT, quantised
from backbones.single_file import is_gguf
from backbones.spec import Backbone, CallSize, Placement
from edit_cli.generation.plan import Plan

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def weight_bytes(plan: Plan, dtype: str) -> dict[str, float]:
    """Bytes per component as it is loaded."""
    counts, how = registry.component_parameters(plan.backbone), plan.placement.quantize
    packed = BYTES_PER_WEIGHT.get(how, BYTES[dtype])
    file = plan.backbone.file
    if file is not None:
        packed = BYTES[dtype]
    found = {name: n * (packed if quantised(name) else BYTES[dtype]) for name, n in counts.items()}
    if file is not None and is_gguf(file.path):  # stays packed
        found["transformer"] = float(file.path.stat().st_size)
    elif file is not None and how:
        found["transformer"] = _cast_bytes(plan.backbone, dtype)
    return found


@functools.lru_cache(maxsize=8)
def _cast_bytes(backbone: Backbone, dtype: str) -> float:
    """Of a transformer whose layers are kept in fp8, but for those that diffusers leaves as they are."""
    import torch

    from backbones.loading import DTYPES
    from backbones.weights import build_transformer

    with torch.device("meta"):
        transformer = build_transformer(backbone).to(DTYPES[dtype])
    transformer.enable_layerwise_casting(compute_dtype=DTYPES[dtype])
    return float(sum(parameter.nbytes for parameter in transformer.parameters()))


def stages(plan: Plan, dtype: str, kept: float, block: float) -> dict[str, float]:
    """Peak bytes on the device by stage. kept: bytes from step to step. block: parameters of the largest.

    A stage whose call cannot be traced is left out.
    """
    weights, offload = weight_bytes(plan, dtype), plan.placement.offload
    part = block * (BYTES_PER_WEIGHT.get(plan.placement.quantize, BYTES[dtype]))

    def resident(size: float) -> float:
        """Bytes of weights that are there while a component of this size runs."""
        if offload == "none":
            return sum(weights.values())
        return size if offload == "model" else min(size, part * (2 if offload == "group" else 1))

    denoiser = {name: size for name, size in weights.items() if name in ("transformer", "model")}
    encoders = [size for name, size in weights.items() if name not in (*denoiser, "vae")]
    running = sum(denoiser.values())
    found = {
        "text": resident(max(encoders, default=0.0)),
        "denoise": resident(running) + kept + _denoising(plan, dtype),
    }
    decoder = _decoding(plan, dtype)
    if decoder is not None:
        own, tensors = decoder
        found["decode"] = resident(own) + tensors
    return found


def _denoising(plan: Plan, dtype: str) -> float:
    """Bytes of the largest transformer call's tensors, of what goes in, and of latents beside it."""
    backbone, rows = plan.backbone, min(plan.batch_size, len(plan.jobs))
    calls = {call for job in plan.jobs for call in plan.medium.calls(job, backbone)}
    largest = max(calls, key=lambda size: (size.width * size.height, size.text, size.rows))
    # latents, and with guidance the other branch's output
    beside = 2 * BYTES[dtype] * rows * max(plan.medium.latent(job, backbone) for job in plan.jobs)
    return beside + _call_bytes(backbone, replace(largest, rows=largest.rows * rows), dtype)


@functools.lru_cache(maxsize=64)
def _call_bytes(backbone: Backbone, size: CallSize, dtype: str) -> float:
    """Bytes of a transformer call's tensors and of what goes in."""
    import torch

    from backbones import loading
    from routers.memory import peak_bytes
    from routers.meta import meta_twin

    def cast(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: cast(each) for name, each in value.items()}
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(loading.DTYPES[dtype])
        return value

    twin = meta_twin(loading.meta_transformer(backbone)).to(loading.DTYPES[dtype])
    given = cast(backbone.family.call_inputs(registry.component_configs(backbone), size))
    inputs = sum(value.nbytes for value in given.values() if isinstance(value, torch.Tensor))
    return float(peak_bytes(twin, **given) + inputs)


def _decoding(plan: Plan, dtype: str) -> tuple[float, float] | None:
    """Bytes of the decoder's weights and of its tensors; None for a kind of decoder that is not known."""
    job, rows = plan.jobs[0], min(plan.batch_size, len(plan.jobs))
    width, height = getattr(job, "width", None), getattr(job, "height", None)
    if not width or not height or getattr(job, "frames", None):
        return None
    return _decoder_bytes(plan.backbone, plan.placement, (rows, width, height), dtype)


@functools.lru_cache(maxsize=64)
def _decoder_bytes(
    backbone: Backbone, placement: Placement, size: tuple[int, int, int], dtype: str
) -> tuple[float, float] | None:
    """As of `_decoding`. size: rows, and px of both sides."""
    import diffusers
    import torch

    from backbones import loading
    from routers.memory import peak_bytes

    rows, width, height = size
    config = dict(registry.component_configs(backbone).get("vae", {}))
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None:
        return None
    if "z_dim" in config:
        channels, halvings, still = config["z_dim"], len(config["temperal_downsample"]), [1]
    elif "latent_channels" in config and "block_out_channels" in config:
        channels, halvings, still = config["latent_channels"], len(config["block_out_channels"]) - 1, []
    else:
        return None
    blocks = len(config.get("block_out_channels", ()))
    if "up_block_types" in config or "z_dim" in config:
        pass
    elif kind is diffusers.AutoencoderKL:  # what the registry knows of published models
        config |= {"down_block_types": ["DownEncoderBlock2D"] * blocks, "layers_per_block": 2}
        config |= {"up_block_types": ["UpDecoderBlock2D"] * blocks, "norm_num_groups": 32}
    else:
        return None
    with torch.device("meta"):
        vae = kind.from_config(config).eval().to(loading.DTYPES[dtype])
        if placement.vae_tiling:
            vae.enable_tiling()
        latents = torch.empty(
            rows, channels, *still, height >> halvings, width >> halvings, dtype=loading.DTYPES[dtype]
        )
    device = loading.pick_device(placement.device).type
    own = sum(parameter.nbytes for parameter in vae.parameters())
    return own, latents.nbytes + peak_bytes(vae.decode, latents, return_dict=False, workspace_on=device)


def free_bytes(device: Any) -> float:
    """Of the device's memory."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available)
