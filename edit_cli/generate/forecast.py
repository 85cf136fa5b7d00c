"""How much memory each stage will take at its peak: weights that are there, what the plan keeps, and the
largest call's tensors, traced on the meta device (routers/memory.py). And `--fit`: the fastest way that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from backbones import registry
from backbones.model_files import ModelError
from backbones.quantise import BYTES_PER_WEIGHT, PACKAGES, check_quantise, quantised
from backbones.spec import GIB, Backbone, Placement
from edit_cli.errors import EditError, bad_input
from edit_cli.generate.plan import Plan

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FULL = 0.95
"""Share of the free memory that may be forecast to be used: allocators round up."""
FP8_CAPABILITY = (8, 9)
"""From which compute capability on a card computes with fp8 weights as fast as with others."""


def weight_bytes(plan: Plan, dtype: str) -> dict[str, float]:
    """Bytes per component as it is loaded."""
    counts, how = registry.component_parameters(plan.backbone), plan.placement.quantize
    packed = BYTES_PER_WEIGHT.get(how, BYTES[dtype])
    return {name: n * (packed if quantised(name) else BYTES[dtype]) for name, n in counts.items()}


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
    import torch

    from backbones import loading
    from routers.memory import peak_bytes
    from routers.meta import meta_twin

    backbone, rows = plan.backbone, min(plan.batch_size, len(plan.jobs))
    calls = {call for job in plan.jobs for call in plan.medium.calls(job, backbone)}
    largest = max(calls, key=lambda size: (size.width * size.height, size.text, size.rows))
    size = replace(largest, rows=largest.rows * rows)
    twin = meta_twin(loading.meta_transformer(backbone)).to(loading.DTYPES[dtype])
    inputs = backbone.family.call_inputs(registry.component_configs(backbone), size)

    def cast(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: cast(each) for name, each in value.items()}
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(loading.DTYPES[dtype])
        return value

    given = cast(inputs)
    # latents, and with guidance the other branch's output
    beside = 2 * BYTES[dtype] * rows * max(plan.medium.latent(job, backbone) for job in plan.jobs)
    return (
        beside
        + peak_bytes(twin, **given)
        + sum(value.nbytes for value in given.values() if isinstance(value, torch.Tensor))
    )


def _decoding(plan: Plan, dtype: str) -> tuple[float, float] | None:
    """Bytes of the decoder's weights and of its tensors; None for a kind of decoder that is not known."""
    import diffusers
    import torch

    from backbones import loading
    from routers.memory import peak_bytes

    config = dict(registry.component_configs(plan.backbone).get("vae", {}))
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    job, rows = plan.jobs[0], min(plan.batch_size, len(plan.jobs))
    width, height = getattr(job, "width", None), getattr(job, "height", None)
    if kind is None or not width or not height or getattr(job, "frames", None):
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
        if plan.placement.vae_tiling:
            vae.enable_tiling()
        latents = torch.empty(
            rows, channels, *still, height >> halvings, width >> halvings, dtype=loading.DTYPES[dtype]
        )
    device = loading.pick_device(plan.placement.device).type
    own = sum(parameter.nbytes for parameter in vae.parameters())
    return own, latents.nbytes + peak_bytes(vae.decode, latents, return_dict=False, workspace_on=device)


def fitted(plan: Plan) -> tuple[Plan, str]:
    """The plan on the fastest placement that fits the free memory, and a note on which. Raises EditError."""
    from backbones import loading
    from edit_cli.generate.dryrun import dry_run

    with bad_input():
        device = loading.pick_device(plan.placement.device)
    free, least = free_bytes(device), None
    for placement in _ways(plan.placement, plan.backbone, device):
        tried = replace(plan, placement=placement)
        needed = dry_run(tried).report["memory_gib"]["device"] * GIB
        least = needed if least is None else min(least, needed)
        if needed <= FULL * free:
            typed = _typed(placement) or "nothing to change"
            return tried, f"--fit: {typed}; needs {needed / GIB:.2f} of {free / GIB:.2f} GiB that are free"
    raise EditError(
        f"--fit: nothing fits; the least is {(least or 0) / GIB:.2f} GiB and {free / GIB:.2f} GiB are free; "
        f"try {plan.medium.smaller}"
    )


def free_bytes(device: Any) -> float:
    """Of the device's memory."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available)


def _ways(placement: Placement, backbone: Backbone, device: Any) -> Iterator[Placement]:
    """Placements from the fastest to the slowest, with what was typed in each."""
    packed = [""] if not placement.quantize else []
    packed += [placement.quantize] if placement.quantize else _packings(backbone, device)
    offloads = [placement.offload]
    if placement.offload == "none" and device.type == "cuda":
        offloads += [way for way in ("model", "group", "sequential") if way in backbone.family.offloads]
    tiles = [placement.vae_tiling]
    if not placement.vae_tiling and backbone.makes == "picture":
        tiles.append(True)
    for offload in offloads:
        for how in packed:
            for tiled in tiles:
                yield replace(placement, offload=offload, quantize=how, vae_tiling=tiled)


def _packings(backbone: Backbone, device: Any) -> list[str]:
    """Quantisations that can be had here, the fastest and nearest first."""
    import torch

    eights = ("int8",)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        eights = ("fp8",)
    found = []
    for how in (*eights, "nf4"):
        try:
            check_quantise(how, backbone, device.type)
        except ModelError:
            continue
        if find_spec(PACKAGES[how]) is not None:
            found.append(how)
    return found


def _typed(placement: Placement) -> str:
    """What would be typed for it."""
    parts = [f"--quantize {placement.quantize}"] if placement.quantize else []
    parts += [f"--offload {placement.offload}"] if placement.offload != "none" else []
    return " ".join([*parts, *(["--vae-tiling"] if placement.vae_tiling else [])])
