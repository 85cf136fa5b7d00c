"""Caches of diffusers and cache-dit as rivals, each as its library applies it.

What each was given beyond its defaults (read in the source of diffusers 0.42.1 and cache-dit 1.5.3):

- FirstBlockCache: needs nothing.
- MagCache: needs the model's own magnitude ratios. Its calibration run prints them; they are read from there.
- TaylorSeer: hooks attention alone unless told otherwise, which leaves the MLPs to be computed. It is given
  attention and MLPs (what its paper caches), and `lite`, its own mode that predicts the model's output. Its
  default bfloat16 factors are set to float32.
- SeaCache: needs step, sigma and the number of steps in `cache_context`, and the latents as (C, T, H, W).
  Neither pipeline gives the former, so that it computes everything; both are added here.
- cache-dit: warm-up of 8 steps and 8 blocks always computed by default; 3 steps and 1 block (or 2 + 2) here.
- FasterCache and Pyramid Attention Broadcast skip attention (or the unconditional branch) by timestep
  ranges made for video models: left out.
- The mesh pipelines are this package's own classes: none of these libraries knows their blocks.

Every cache decides once for a whole batch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.bench import Attached, Bench
from routers.patching import patch_forward, restore_forward

Setting = Mapping[str, Any]
FAMILIES = ("QwenImagePipeline", "FluxPipeline")
WARM_UP = 3
"""Steps that cache-dit and TaylorSeer always compute at the start."""
TAYLOR_MODULES = [
    r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp|ff|ff_context)",
    r"single_transformer_blocks\.\d+\.proj_out",
]
"""Attention and MLPs of both families' blocks; the last linear of a single-stream block joins the two."""
TAYLOR_SKIPPED = [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"]
"""What then need not be computed, because only the predicted linear reads it."""


@contextmanager
def _enabled(bench: Bench, config: Any) -> Iterator[Attached]:
    """A diffusers cache; its state is emptied before every generation."""
    transformer = bench.transformer
    transformer.enable_cache(config)
    try:

        @contextmanager
        def generation() -> Iterator[None]:
            transformer._reset_stateful_cache()
            yield

        yield Attached(bench.num_steps, generation)
    finally:
        transformer.disable_cache()


def first_block(bench: Bench, setting: Setting) -> AbstractContextManager[Attached]:
    """The FirstBlockCache of diffusers; threshold: relative change of the first block's residual."""
    from diffusers import FirstBlockCacheConfig

    return _enabled(bench, FirstBlockCacheConfig(threshold=float(setting["threshold"])))


def mag_cache(bench: Bench, setting: Setting) -> AbstractContextManager[Attached]:
    """The MagCache of diffusers; threshold: accumulated error of the residual's magnitude."""
    from diffusers import MagCacheConfig

    if "mag_ratios" not in bench.memo:
        bench.memo["mag_ratios"] = magnitude_ratios(bench)
    config = MagCacheConfig(
        threshold=float(setting["threshold"]),
        max_skip_steps=int(setting["max_skip"]),
        num_inference_steps=bench.num_steps,
        mag_ratios=list(bench.memo["mag_ratios"]),
    )
    return _enabled(bench, config)


def magnitude_ratios(bench: Bench) -> list[float]:
    """What MagCache's own calibration prints, averaged over prompts and CFG branches; one ratio per step."""
    from diffusers import MagCacheConfig

    printed = io.StringIO()
    workload = bench.workload(1, bench.calibration)
    config = MagCacheConfig(calibrate=True, num_inference_steps=bench.num_steps)
    with _enabled(bench, config) as attached, contextlib.redirect_stdout(printed):
        for batch in range(workload.num_batches):
            with attached.generation():
                workload.run(batch)
    rows = [
        json.loads(line)
        for line in printed.getvalue().splitlines()
        if line.startswith("[") and "," in line and not line.startswith("[MagCache]")
    ]
    if not rows:
        raise RuntimeError(
            "MagCache's calibration printed no ratios; the installed diffusers differs from 0.42"
        )
    return [float(value) for value in np.mean(rows, axis=0)]


def taylor_seer(bench: Bench, setting: Setting) -> AbstractContextManager[Attached]:
    """The TaylorSeer of diffusers; interval: one step in so many is computed."""
    import torch
    from diffusers import TaylorSeerCacheConfig

    lite = bool(setting.get("lite"))
    config = TaylorSeerCacheConfig(
        cache_interval=int(setting["interval"]),
        max_order=int(setting["order"]),
        disable_cache_before_step=WARM_UP,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=lite,
        cache_identifiers=None if lite else TAYLOR_MODULES,
        skip_predict_identifiers=None if lite else TAYLOR_SKIPPED,
    )
    return _enabled(bench, config)


@contextmanager
def sea_cache(bench: Bench, setting: Setting) -> Iterator[Attached]:
    """The SeaCache of diffusers with the step and sigma that the pipelines keep to themselves."""
    from diffusers import SeaCacheConfig

    def latents(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        packed: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return unpack(packed, bench.height / bench.width)

    def context(original: Callable[..., Any], name: str, **known: Any) -> Any:
        scheduler = bench.pipe.scheduler
        step = scheduler.step_index or 0
        where = {
            "step_index": step,
            "sigma": float(scheduler.sigmas[step]),
            "num_inference_steps": bench.num_steps,
        }
        return original(name, **{**where, **known})

    config = SeaCacheConfig(
        threshold=float(setting["threshold"]),
        max_consecutive_cached=int(setting["max_skip"]),
        raw_vision_callback=latents,
    )
    patch = patch_forward(bench.transformer, context, "cache_context")
    try:
        with _enabled(bench, config) as attached:
            yield attached
    finally:
        restore_forward(bench.transformer, patch, "cache_context")


def unpack(packed_BLC: Tensor, aspect: float) -> list[Tensor]:
    """Tokens of 2 x 2 latent pixels [B, h*w, 4*C] -> one [C, 1, 2h, 2w] per row. aspect: height / width."""
    _, tokens, channels = packed_BLC.shape
    height = round(math.sqrt(tokens * aspect))
    width = tokens // height
    if height * width != tokens or abs(height - width * aspect) > 0.5 or channels % 4:
        raise ValueError(f"{tokens} tokens of {channels} channels are no {aspect:g} picture of 2 x 2 patches")
    x = packed_BLC.view(-1, height, width, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return list(x.reshape(-1, channels // 4, 1, 2 * height, 2 * width).unbind(0))


@contextmanager
def db_cache(bench: Bench, setting: Setting) -> Iterator[Attached]:
    """DBCache of cache-dit. front, back: blocks always computed; order: of TaylorSeer, 0 without it."""
    with _quiet():
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=int(setting["front"]),
            Bn_compute_blocks=int(setting["back"]),
            residual_diff_threshold=float(setting["threshold"]),
            max_warmup_steps=WARM_UP,
        )
        order = int(setting["order"])
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        cache_dit.enable_cache(bench.pipe, cache_config=config, calibrator_config=calibrator)
        try:
            yield Attached(bench.num_steps, nullcontext)
        finally:
            cache_dit.disable_cache(bench.pipe)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without cache-dit's log of every block it wraps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def needs_family(bench: Bench) -> str | None:
    """Hooks of diffusers are registered for its own block classes."""
    name = getattr(bench.backbone.family, "pipeline_class", type(bench.pipe).__name__)
    return None if name in FAMILIES else f"it does not know the blocks of {name}"


def needs_cache_dit(bench: Bench) -> str | None:
    """cache-dit is an optional install."""
    if importlib.util.find_spec("cache_dit") is None:
        return 'cache-dit is not installed: pip install -e ".[bench]"'
    return needs_family(bench)


def _grid(low: float, high: float, count: int, **fixed: Any) -> tuple[Setting, ...]:
    values = [float(f"{value:.3g}") for value in np.geomspace(low, high, count)]
    return tuple({"threshold": value, **fixed} for value in values)


_DB = ((1, 0), (2, 2))
"""Blocks always computed at the front and the back. cache-dit's own 8 and 0 suit models of 60 blocks."""
ROWS: tuple[tuple[Any, ...], ...] = (
    ("FirstBlockCache", _grid(0.06, 0.5, 9), first_block, needs_family, "diffusers"),
    (
        "MagCache",
        (*_grid(0.02, 0.6, 5, max_skip=3), *_grid(0.1, 1.0, 3, max_skip=5)),
        mag_cache,
        needs_family,
        "diffusers; ratios from its own calibration run",
    ),
    (
        "TaylorSeer",
        tuple({"interval": n, "order": order} for order in (1, 2) for n in (2, 3, 4, 5)),
        taylor_seer,
        needs_family,
        "diffusers; attention and MLPs, float32 factors",
    ),
    (
        "TaylorSeer lite",
        tuple({"interval": n, "order": order, "lite": 1} for order in (1, 2) for n in (2, 3, 4, 5)),
        taylor_seer,
        needs_family,
        "diffusers; predicts the model's output",
    ),
    (
        "SeaCache",
        (*_grid(0.02, 0.8, 6, max_skip=2), *_grid(0.2, 1.5, 3, max_skip=4)),
        sea_cache,
        needs_family,
        "diffusers; step and sigma added to cache_context",
    ),
    (
        "DBCache",
        tuple(s for f, b in _DB for s in _grid(0.06, 0.6, 7, front=f, back=b, order=0)),
        db_cache,
        needs_cache_dit,
        "cache-dit; 3 warm-up steps",
    ),
    (
        "DBCache + TaylorSeer",
        tuple(s for f, b in _DB for s in _grid(0.06, 0.6, 7, front=f, back=b, order=1)),
        db_cache,
        needs_cache_dit,
        "cache-dit; 3 warm-up steps, order 1",
    ),
)
"""Arguments of `Rival`: name, settings, apply, why_not, note."""
