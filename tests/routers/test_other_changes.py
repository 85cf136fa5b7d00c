"""What else changes a transformer is refused in one line that names it and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import hooks
from torch import nn

import routers
from tests.routers.test_runs import FLUX, QWEN, alone, attached, load, make


def call_blocks_anew(pipe: Any) -> None:
    """A wrapper as some cache libraries set one: every other block is left out."""
    for block in pipe.transformer.single_transformer_blocks[::2]:
        block.forward = lambda hidden_states, encoder_hidden_states, *_, **__: (
            encoder_hidden_states,
            hidden_states,
        )


def mark_as_cached(pipe: Any) -> None:
    pipe.transformer._is_cached = True


CACHES: dict[str, tuple[Callable[[Any], object], str]] = {
    "first block cache": (
        lambda pipe: pipe.transformer.enable_cache(hooks.FirstBlockCacheConfig(threshold=0.2)),
        r"FirstBlockCacheConfig.*transformer\.disable_cache\(\)",
    ),
    "first block cache, by its function": (
        lambda pipe: hooks.apply_first_block_cache(
            pipe.transformer, hooks.FirstBlockCacheConfig(threshold=0.2)
        ),
        "fbc_.*_hook",
    ),
    "attention broadcast, by its function": (
        lambda pipe: hooks.apply_pyramid_attention_broadcast(
            pipe.transformer,
            hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            ),
        ),
        "pyramid_attention_broadcast",
    ),
    "layers skipped": (
        lambda pipe: hooks.apply_layer_skip(
            pipe.transformer, hooks.LayerSkipConfig(indices=[1], fqn="single_transformer_blocks")
        ),
        "layer_skip_hook",
    ),
    "another library's": (mark_as_cached, "another library's cache"),
    "compiled": (lambda pipe: nn.Module.compile(pipe.transformer), r"compile_repeated_blocks\(\)"),
}


@pytest.fixture
def fresh() -> Any:
    """A pipeline of its own, to be spoilt."""
    return load.__wrapped__(FLUX)


@pytest.mark.parametrize("what", CACHES)
def test_refused_before_and_after_attach(what: str, fresh: Any) -> None:
    change, message = CACHES[what]
    elastic = routers.attach(fresh, FLUX / "routers", budget=0.6)
    if what == "compiled":
        with pytest.raises(ValueError, match=message):
            fresh.transformer.compile()
    else:
        make(fresh, 4)
        change(fresh)
        with pytest.raises(ValueError, match=message) as refused:
            make(fresh, 4)
        assert "\n" not in str(refused.value)
    elastic.detach()
    if what == "compiled":
        change(fresh)
    with pytest.raises(ValueError, match=message):
        routers.attach(fresh, FLUX / "routers", budget=0.6)


def test_a_cache_that_was_taken_off_again_leaves_the_routers_at_work() -> None:
    expected = alone(QWEN, lambda pipe: make(pipe, 6))
    with attached(QWEN) as (pipe, elastic):
        pipe.transformer.enable_cache(hooks.FirstBlockCacheConfig(threshold=0.2))
        with pytest.raises(ValueError, match="disable_cache"):
            make(pipe, 6)
        pipe.transformer.disable_cache()
        assert torch.equal(make(pipe, 6), expected)
        assert elastic.trace is not None and elastic.trace.spent == pytest.approx([0.6], abs=0.01)


def test_a_wrapper_that_leaves_blocks_out_is_refused(fresh: Any) -> None:
    routers.attach(fresh, FLUX / "routers", budget=0.6)
    make(fresh, 4)
    call_blocks_anew(fresh)
    with pytest.raises(RuntimeError, match=r"did not run as decided.*another cache"):
        make(fresh, 4)


def test_a_forward_that_goes_round_the_routers_is_refused(fresh: Any) -> None:
    """Also outside of a scope: it would be a dense picture under the last run's trace."""
    dense = type(fresh.transformer).forward
    routers.attach(fresh, FLUX / "routers", budget=0.6)
    fresh.transformer.forward = dense.__get__(fresh.transformer)
    with pytest.raises(RuntimeError, match="bypassed"):
        make(fresh, 4)


@pytest.mark.slow
def test_a_pipeline_that_has_compiled_the_transformer(fresh: Any) -> None:
    routers.attach(fresh, FLUX / "routers", budget=0.6)
    fresh.transformer = torch.compile(fresh.transformer, backend="eager")
    with pytest.raises(RuntimeError, match=r"compile_repeated_blocks\(\)"):
        make(fresh, 4)
