"""All models of the zoo, and which of them the default run builds."""

from __future__ import annotations

import pytest

from tests.zoo.images import IMAGES
from tests.zoo.sounds import SOUNDS
from tests.zoo.videos import VIDEOS

MODELS = [*IMAGES, *VIDEOS, *SOUNDS]

QUICK = {
    "QwenImageTransformer2DModel",  # two streams
    "Flux2Transformer2DModel",  # two lists, fused gates
    "Lumina2Transformer2DModel",  # refiners, values needed
    "WanTransformer3DModel",  # a video
}
"""Built by the default run; the others are marked slow."""

PARAMS = [
    pytest.param(model, id=model.name, marks=() if model.name in QUICK else pytest.mark.slow)
    for model in MODELS
]
