"""Fixed generations of a pipeline: same prompts or pictures, same noise, latents out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backbones.loading import around
from backbones.model_files import ModelError
from backbones.pipeline_call import known_call, variant
from backbones.spec import Backbone

if TYPE_CHECKING:
    from PIL import Image

    from backbones.hunyuan3d.pipeline import Hunyuan3DPipeline


@dataclass
class _Workload:
    """Batches of `rows`; row i of all always starts from the same noise (seed + i).

    Samples come round again: the last batch is filled up with the first ones. branches: names of what the
    transformer sees of a sample at each step.
    """

    pipe: Any
    backbone: Backbone
    rows: int
    num_steps: int
    guidance: float
    seed: int = field(default=0, kw_only=True)

    def _count(self, samples: int, single: str) -> None:
        """single: name of the only branch where there is no guidance."""
        self.num_batches = -(-samples // self.rows)
        doubled = self.backbone.branches(self.guidance) == 2
        self.branches: tuple[str, ...] = ("cond", "uncond") if doubled else (single,)

    def _batch(self, batch: int, of: int) -> tuple[list[int], list[torch.Generator]]:
        """For each row of a batch which of so many samples it is, and its noise."""
        numbers = range(batch * self.rows, (batch + 1) * self.rows)
        return [i % of for i in numbers], [torch.Generator("cpu").manual_seed(self.seed + i) for i in numbers]


@dataclass
class PipelineWorkload(_Workload):
    """Results of prompts. width, height: px; None: the pipeline's own. more: `ARGUMENTS` of other media.

    pictures: for each prompt, arguments with what it starts from, edits or refers to; then one row a batch.
    """

    prompts: Sequence[str]
    width: int | None = None
    height: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a workload needs at least one prompt")
        if self.pictures and self.rows > 1:
            raise ValueError("pictures of their own are given to one result at a time")
        self._count(len(self.prompts), "cond")

    def run(self, batch: int, *, num_steps: int | None = None, output_type: str = "latent") -> Any:
        """Latents `[rows, ...]` float32 of a batch, or pictures with output_type "pil"."""
        family, longest = self.backbone.family, self.backbone.defaults.max_sequence_length
        indices, generators = self._batch(batch, len(self.prompts))
        call = known_call(type(self.pipe).__name__)
        prompts: Any = [self.prompts[i] for i in indices]
        arguments: dict[str, Any] = {
            "prompt": prompts[0] if self.pictures else prompts,
            str(call.guidance): self.guidance,
            "num_inference_steps": num_steps or self.num_steps,
            "width": self.width,
            "height": self.height,
            "generator": generators[0] if self.pictures else generators,
            "output_type": output_type,
            **(self.pictures[indices[0]] if self.pictures else {}),
            **{str(call.argument(name)): value for name, value in self.more.items()},
        }
        if self.width and self.height:
            arguments["max_area"] = self.width * self.height
        if len(self.branches) > 1 and family.negative_prompt:
            negative = [family.negative_prompt] * self.rows
            arguments["negative_prompt"] = negative[0] if self.pictures else negative
        if longest is not None:
            arguments["max_sequence_length"] = longest
        taken = {
            name: value for name, value in arguments.items() if name in call.defaults and value is not None
        }
        images = getattr(self.pipe(**taken), call.gives)
        return images.float() if isinstance(images, Tensor) else images


@dataclass
class MeshWorkload(_Workload):
    """Shapes of pictures, up to their latents. Guidance runs as one doubled batch, inside the pipeline.

    contexts: `{name: [N, S, D]}` of N pictures, made once by `embed`. samples: shapes in all.
    """

    contexts: Mapping[str, Tensor]
    samples: int

    def __post_init__(self) -> None:
        self._count(self.samples, "main")

    def run(self, batch: int, *, num_steps: int | None = None) -> Tensor:
        """Latents `[rows, L, C]` float32 of a batch."""
        indices, generators = self._batch(batch, len(next(iter(self.contexts.values()))))
        contexts = {name: context[indices] for name, context in self.contexts.items()}
        noise = self.pipe.noise(self.rows, generators)
        latents: Tensor = self.pipe.denoise(contexts, noise, num_steps or self.num_steps, self.guidance)
        return latents.float()


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

    call, encoded = variant(backbone.family.pipeline_class, ("image",)), []
    if call.argument("image") is None:
        raise ModelError(f"{backbone.family.name} offers no image-to-image, so pictures cannot be trained on")
    other = around(pipe, call.pipeline)
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
