"""Fixed generations of a diffusers pipeline: same prompts, same noise, latents out.."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbones.spec import Family


@dataclass
class PipelineWorkload:
    """Prompts cut into batches of `rows`; row i of all always starts from the same noise (seed + i).

    guidance: the scale given to the family's guidance argument. The last batch is filled up with the
    first prompts, so that every batch has `rows` rows.
    """

    pipe: Any
    family: Family
    prompts: Sequence[str]
    rows: int
    num_steps: int
    guidance: float
    width: int
    height: int
    seed: int = 0
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a workload needs at least one prompt")
        self.num_batches = -(-len(self.prompts) // self.rows)
        calls = self.family.branches(self.guidance)
        self.branches: tuple[str, ...] = ("cond", "uncond")[:calls]

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
        if self.family.branches(self.guidance) > 1:
            arguments["negative_prompt"] = [self.family.negative_prompt] * self.rows
        if self.max_sequence_length is not None:
            arguments["max_sequence_length"] = self.max_sequence_length
        images = self.pipe(**arguments).images
        return images.float() if isinstance(images, Tensor) else images
