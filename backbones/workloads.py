"""Fixed generations of a pipeline: same prompts or pictures, same noise, latents out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backbones.loading import image_to_image
from backbones.spec import Backbone, Family

if TYPE_CHECKING:
    from PIL import Image

    from backbones.hunyuan3d.pipeline import Hunyuan3DPipeline


@dataclass
class PipelineWorkload:
    """Prompts cut into batches of `rows`; row i of all always starts from the same noise (seed + i).

    guidance: the scale given to the family's guidance argument. width, height: px; None: the
    pipeline's own. The last batch is filled up with the first prompts, so that every batch has `rows` rows.
    """

    pipe: Any
    family: Family
    prompts: Sequence[str]
    rows: int
    num_steps: int
    guidance: float
    width: int | None
    height: int | None
    seed: int = 0
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a workload needs at least one prompt")
        self.num_batches = -(-len(self.prompts) // self.rows)
        guided = self.family.negative_prompt is not None and self.guidance > 1
        self.branches: tuple[str, ...] = ("cond", "uncond") if guided else ("cond",)

    def run(self, batch: int, *, num_steps: int | None = None, output_type: str = "latent") -> Any:
        """Latents `[rows, L, C]` float32 of a batch, or pictures with output_type "pil"."""
        indices = [batch * self.rows + i for i in range(self.rows)]
        arguments: dict[str, Any] = {
            "prompt": [self.prompts[i % len(self.prompts)] for i in indices],
            self.family.guidance_argument: self.guidance,
            "num_inference_steps": num_steps or self.num_steps,
            "width": self.width,
            "height": self.height,
            "generator": [torch.Generator("cpu").manual_seed(self.seed + i) for i in indices],
            "output_type": output_type,
        }
        if len(self.branches) > 1:
            arguments["negative_prompt"] = [self.family.negative_prompt] * self.rows
        if self.max_sequence_length is not None:
            arguments["max_sequence_length"] = self.max_sequence_length
        images = self.pipe(**arguments).images
        return images.float() if isinstance(images, Tensor) else images


@dataclass
class MeshWorkload:
    """Shapes of pictures, up to their latents; row i of all always starts from the same noise (seed + i).

    contexts: `{name: [N, S, D]}` of N pictures, made once by `embed`. samples: shapes in all; pictures come
    round again, each time with other noise. branches: ("main",) where guidance is an input of the model or
    off, else ("cond", "uncond"), which the pipeline runs as one doubled batch.
    """

    pipe: Hunyuan3DPipeline
    contexts: Mapping[str, Tensor]
    samples: int
    rows: int
    num_steps: int
    guidance: float
    seed: int = 0

    def __post_init__(self) -> None:
        self.num_batches = -(-self.samples // self.rows)
        doubled = not self.pipe.transformer.guidance_embed and self.guidance > 1
        self.branches: tuple[str, ...] = ("cond", "uncond") if doubled else ("main",)

    def run(self, batch: int, *, num_steps: int | None = None) -> Tensor:
        """Latents `[rows, L, C]` float32 of a batch."""
        indices = [batch * self.rows + i for i in range(self.rows)]
        generators = [torch.Generator("cpu").manual_seed(self.seed + i) for i in indices]
        contexts = {name: c[[i % len(c) for i in indices]] for name, c in self.contexts.items()}
        guidance = self.guidance
        if not self.pipe.transformer.guidance_embed and guidance <= 1:
            guidance = -1.0  # the pipeline's word for no unconditional rows
        noise = self.pipe.noise(self.rows, generators)
        return self.pipe.denoise(contexts, noise, num_steps or self.num_steps, guidance).float()


def embed(pipe: Hunyuan3DPipeline, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Contexts `{name: [N, S, D]}` of pictures without background, one after the other, on the host.

    Multi-view models take each for the front view of an object.
    """
    if not pictures:
        raise ValueError("a workload needs at least one picture")
    contexts = [pipe.prepare(picture) for picture in pictures]
    return {name: torch.cat([context[name].cpu() for context in contexts]) for name in contexts[0]}


@torch.no_grad()
def encode(
    pipe: Any, backbone: Backbone, pictures: Sequence[Image.Image], size: tuple[int, int], seed: int
) -> Tensor:
    """Latents `[N, L, C]` float32 on the host, as the transformer sees them, of pictures cut to `size`
    (width, height) in px.

    Raises ModelError for a family without a way from pictures to latents.
    """
    from PIL import ImageOps

    other, encoded = image_to_image(pipe, backbone), []
    device, dtype = pipe.vae.device, pipe.vae.dtype
    for i, picture in enumerate(pictures):
        fitted = ImageOps.fit(picture, size)
        pixels = other.image_processor.preprocess(fitted, *size[::-1]).to(device, dtype)
        if hasattr(pipe.vae.config, "temperal_downsample"):  # a video VAE: one frame
            pixels = pixels.unsqueeze(2)
        generator = torch.Generator("cpu").manual_seed(seed + i)
        latents = other._encode_vae_image(image=pixels, generator=generator)
        shape = latents.shape[1], latents.shape[-2], latents.shape[-1]
        encoded.append(other._pack_latents(latents, 1, *shape).float().cpu())
    return torch.cat(encoded)
