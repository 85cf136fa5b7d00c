"""What it takes to attach to a model of real size, without its weights."""

from __future__ import annotations

import time
from typing import Any

import pytest

import routers
from backbones import loading, registry
from backbones.spec import CallSize
from routers.derive import derive

SECONDS = 2.0
"""On an idle machine it is a tenth of that."""


@pytest.mark.slow
def test_attaching_to_qwen_image_takes_no_forward_of_it() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    row = registry.resolve("qwen-image")
    transformer = loading.meta_transformer(row)
    assert len(transformer.transformer_blocks) == 60
    pipe: Any = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip
    calls: list[Any] = []
    hook = transformer.register_forward_pre_hook(lambda *_: calls.append(None))
    for spec in (None, row.family.transformer):
        start = time.process_time()
        routers.attach(pipe, budget=0.6, spec=spec).detach()
        assert time.process_time() - start < SECONDS
    inputs = row.family.call_inputs(registry.component_configs(row), CallSize(1, 1024, 1024, 64))
    start = time.process_time()
    assert [block.path for block in derive(transformer, inputs).spec.blocks] == ["transformer_blocks"]
    assert time.process_time() - start < SECONDS
    assert not calls
    hook.remove()
