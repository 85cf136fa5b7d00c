"""What is true of every model of the zoo, written down: see `Expected`."""

from __future__ import annotations

from tests.zoo.expected.images import IMAGES
from tests.zoo.expected.sounds import SOUNDS
from tests.zoo.expected.videos import VIDEOS

# fmt: off
EXPECTED = {**IMAGES, **VIDEOS, **SOUNDS}

NEEDS_VALUES = {
    "GlmImageTransformer2DModel", "HiDreamImageTransformer2DModel", "Lumina2Transformer2DModel",
    "NucleusMoEImageTransformer2DModel", "OmniGenTransformer2DModel", "QwenImage21Transformer2DModel",
    "HunyuanVideo15Transformer3DModel", "HunyuanVideoFramepackTransformer3DModel",
    "MochiTransformer3DModel", "WanAnimate2Transformer3DModel",
}
"""Models whose forward looks at values, so that they are traced in a real call."""

NOT_GUESSED = {
    "BriaFiboTransformer2DModel", "GlmImageTransformer2DModel", "HiDreamImageTransformer2DModel",
    "HunyuanDiT2DModel", "Ideogram4Transformer2DModel", "Krea2Transformer2DModel",
    "Lumina2Transformer2DModel", "LuminaNextDiT2DModel", "NucleusMoEImageTransformer2DModel",
    "OmniGenTransformer2DModel", "QwenImage21Transformer2DModel", "BriaFibo2Transformer2DModel",
    "JoyImageEditPlusTransformer3DModel", "AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel",
    "ConsisIDTransformer3DModel", "Cosmos3OmniTransformer", "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel", "LTX2VideoTransformer3DModel", "MiniMaxH3Transformer3DModel",
    "MochiTransformer3DModel", "TransformerTemporalModel", "WanAnimateTransformer3DModel",
    "WanAnimate2Transformer3DModel", "MiniMaxMusic3Transformer1DModel",
}
"""Models whose call cannot be guessed from their config, or not without values."""
