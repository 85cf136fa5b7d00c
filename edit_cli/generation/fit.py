"""`--fit`: the fastest placement whose forecast fits the free memory. Torch-free until it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from backbones.model_files import ModelError
from backbones.quantise import check_quantise
from backbones.spec import GIB, Backbone, Placement
from edit_cli.errors import EditError, bad_input
from edit_cli.generation import forecast
from edit_cli.generation.dryrun import dry_run
from edit_cli.generation.plan import Plan

FULL = 0.95
"""Share of the free memory that may be forecast to be used: allocators round up."""
FP8_CAPABILITY = (8, 9)
"""From which compute capability on a card computes with fp8 weights as fast as with others."""


def fitted(plan: Plan) -> tuple[Plan, str]:
    """The plan on the fastest placement that fits the free memory, and a note on which. Raises EditError."""
    from backbones import loading

    with bad_input():
        device = loading.pick_device(plan.placement.device)
    free, least = forecast.free_bytes(device), None
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
        found.append(how)
    return found


def _typed(placement: Placement) -> str:
    """What would be typed for it."""
    parts = [f"--quantize {placement.quantize}"] if placement.quantize else []
    parts += [f"--offload {placement.offload}"] if placement.offload != "none" else []
    return " ".join([*parts, *(["--vae-tiling"] if placement.vae_tiling else [])])
