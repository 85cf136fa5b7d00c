"""Image to mesh: prepare -> denoise -> decode -> extract -> clean, each stage callable alone.

Shapes: B batch, V views, L latents, C latent channels, S condition tokens.
"""

# mypy: no-warn-return-any
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import mesh as meshes
from . import surface
from .image_processor import ImageProcessor, MultiViewImageProcessor
from .schedulers import FlowMatchEulerScheduler

if TYPE_CHECKING:
    import trimesh

    from .conditioner import SingleImageEncoder
    from .shape_vae import ShapeVAE

StepCallback = Callable[[int, int, Tensor], None]
"""Called after a step with (steps done, steps in all, latents [B, L, C])."""
Picture = Image.Image
Pictures: TypeAlias = Picture | Mapping[str, Picture] | Sequence[Picture | Mapping[str, Picture]]
"""One request or several: a picture each, or views by name for multi-view models."""
CHUNK, MAX_CHUNK = 8000, 262144
"""Points of a decoder call: the published pipeline's, and from where on a GPU gains nothing more."""
Generators = torch.Generator | Sequence[torch.Generator] | None


@torch.no_grad()
def denoise(
    model: nn.Module,
    scheduler: FlowMatchEulerScheduler,
    noise: Tensor,
    contexts: Mapping[str, Tensor],
    num_steps: int,
    guidance_scale: float,
    on_step: StepCallback | None = None,
) -> Tensor:
    """The whole loop, from noise `[B, L, C]` to latents.

    A guidance-distilled model takes the scale as an input. Any other runs on a doubled batch, the
    conditional rows first and zeros as the unconditional embedding, unless the scale is 1 or less.
    """
    batch = noise.shape[0]
    distilled = bool(model.guidance_embed)
    paired = not distilled and guidance_scale > 1
    if paired:
        contexts = {name: torch.cat([c, torch.zeros_like(c)]) for name, c in contexts.items()}
    contexts = {name: c.to(noise.dtype) for name, c in contexts.items()}
    guidance = (
        torch.full((batch,), guidance_scale, dtype=noise.dtype, device=noise.device) if distilled else None
    )
    scheduler.set_timesteps(num_steps, sigmas=np.linspace(0, 1, num_steps))
    latents = noise
    for index, timestep in enumerate(scheduler.timesteps):
        rows = torch.cat([latents, latents]) if paired else latents
        # Both operations happen in the latents' dtype, as they did when the published images were made.
        t = timestep.to(latents.device, latents.dtype).expand(rows.shape[0]) / scheduler.num_train_timesteps
        velocity = model(rows, t, contexts, guidance=guidance)
        if paired:
            cond, uncond = velocity.chunk(2)
            velocity = uncond + guidance_scale * (cond - uncond)
        latents = scheduler.step(velocity, index, latents)
        if on_step is not None:
            on_step(index + 1, len(scheduler.timesteps), latents)
    return latents


@dataclass
class ShapeOutput:
    """What a run made: one mesh per request (None where the field has no surface), and latents."""

    meshes: list[trimesh.Trimesh | None]
    latents: Tensor


class Hunyuan3DPipeline:
    """The components of a checkpoint and the way through them.

    transformer: either DiT. conditioner may be None if contexts are passed in. `offload=True` keeps
    components on the CPU except while their stage runs. `published_scale`: see `mesh.extract_surface`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        vae: ShapeVAE,
        conditioner: SingleImageEncoder | None,
        scheduler: FlowMatchEulerScheduler,
        image_processor: ImageProcessor,
        *,
        published_scale: bool = True,
    ) -> None:
        self.transformer, self.vae, self.conditioner = transformer.eval(), vae.eval(), conditioner
        if conditioner is not None:
            conditioner.eval()
        self.scheduler, self.image_processor = scheduler, image_processor
        self.published_scale = published_scale
        self.device = torch.device("cpu")
        self.offload = False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transformer's weights."""
        return next(self.transformer.parameters()).dtype

    @property
    def components(self) -> dict[str, nn.Module]:
        """The modules with weights, under their names in a checkpoint."""
        named = {"model": self.transformer, "vae": self.vae, "conditioner": self.conditioner}
        return {name: module for name, module in named.items() if module is not None}

    def to(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> Hunyuan3DPipeline:
        """Move, cast, or only remember the device and move each component for its stage (`offload`)."""
        self.device = torch.device(device) if device is not None else self.device
        self.offload = offload
        for module in self.components.values():
            module.to(device="cpu" if offload else self.device, dtype=dtype)
        return self

    @contextmanager
    def _resident(self, module: nn.Module) -> Iterator[None]:
        if not self.offload:
            yield
            return
        module.to(self.device)
        try:
            yield
        finally:
            module.to("cpu")

    @torch.no_grad()
    def prepare(self, image: Pictures) -> dict[str, Tensor]:
        """Contexts `{"main": [B, S, D]}` of pictures without background, or of views `{"front": picture}`."""
        if self.conditioner is None:
            raise ValueError("this checkpoint comes without a conditioner: pass contexts")
        requests: list[Picture | Mapping[str, Picture]] = (
            [image] if isinstance(image, Image.Image | Mapping) else list(image)
        )
        view_idxs: list[list[int]] | None = None
        if isinstance(self.image_processor, MultiViewImageProcessor):
            named = [r if isinstance(r, Mapping) else {"front": r} for r in requests]
            views = [self.image_processor.views(r) for r in named]
            if len({len(v.indices) for v in views}) > 1:
                raise ValueError("objects of one batch must have the same number of views")
            pixels, view_idxs = torch.cat([v.image for v in views]), [v.indices for v in views]
        else:
            pictures = [r for r in requests if isinstance(r, Image.Image)]
            if len(pictures) < len(requests):
                raise ValueError(
                    "this model takes one picture per shape; views need a multi-view model (2mv)"
                )
            pixels = torch.cat([self.image_processor(picture)["image"] for picture in pictures])
        with self._resident(self.conditioner):
            return self.conditioner(pixels.to(self.device, self.dtype), view_idxs=view_idxs)

    def noise(self, batch: int, generator: Generators = None, num_latents: int | None = None) -> Tensor:
        """Standard normal `[B, L, C]` in the pipeline's dtype, drawn on the generator's device.

        One generator per row makes a row independent of its batch.
        """
        length, channels = self.vae.latent_shape
        shape = (num_latents or length, channels)
        if generator is None or isinstance(generator, torch.Generator):
            drawn = _randn((batch, *shape), generator, self.dtype)
        else:
            if len(generator) != batch:
                raise ValueError(f"{len(generator)} generators for {batch} shapes; give one, or one each")
            drawn = torch.cat([_randn((1, *shape), g, self.dtype) for g in generator])
        return drawn.to(self.device)

    def denoise(
        self,
        contexts: Mapping[str, Tensor],
        noise: Tensor,
        num_steps: int = 50,
        guidance_scale: float = 5.0,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """Latents `[B, L, C]` of contexts; the transformer may carry routers."""
        contexts = {name: c.to(self.device) for name, c in contexts.items()}
        with self._resident(self.transformer):
            return denoise(
                self.transformer, self.scheduler, noise, contexts, num_steps, guidance_scale, on_step
            )

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        octree_resolution: int = 384,
        bounds: float | Sequence[float] = 1.01,
        level: float = 0.0,
        method: str = "hierarchical",
        chunk: int | None = None,
        progress: surface.Progress | None = None,
    ) -> list[surface.Volume]:
        """One sampled field per row. method: "hierarchical" or "dense". chunk: points evaluated at a time,
        None for what the device has room for. The grid stays on the device until it is finished.
        """
        if method not in ("hierarchical", "dense"):
            raise ValueError(f"decode method {method!r} must be 'hierarchical' or 'dense'")
        volumes = []
        with self._resident(self.vae):
            weights_dtype = next(self.vae.parameters()).dtype
            decoded = self.vae(self.vae.unscale(latents.to(self.device, weights_dtype)))
            chunk = chunk or points_at_once(self.vae, self.device)
            for row in decoded:
                values = self.vae.field(row)
                if method == "dense":
                    volume = surface.decode_dense(
                        values, bounds, octree_resolution, chunk, progress, self.device
                    )
                else:
                    volume = surface.decode_hierarchical(
                        values, bounds, octree_resolution, chunk, level, progress=progress, device=self.device
                    )
                volumes.append(volume)
        return volumes

    def extract(self, volume: surface.Volume, level: float = 0.0) -> trimesh.Trimesh:
        """Triangles of the level, closed at the box. Raises NoSurfaceError."""
        return meshes.extract_surface(volume, level, self.published_scale, cap_box=True).to_trimesh()

    def clean(self, mesh: trimesh.Trimesh, faces: int | None = None) -> trimesh.Trimesh:
        """Floaters, duplicates and winding; at most `faces` triangles if given."""
        mesh = meshes.clean(mesh)
        return mesh if faces is None else meshes.simplify(mesh, faces)

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        *,
        num_steps: int = 50,
        guidance_scale: float = 5.0,
        generator: Generators = None,
        num_latents: int | None = None,
        octree_resolution: int = 384,
        bounds: float | Sequence[float] = 1.01,
        level: float = 0.0,
        method: str = "hierarchical",
        chunk: int | None = None,
        faces: int | None = None,
        on_step: StepCallback | None = None,
        on_decode: surface.Progress | None = None,
    ) -> ShapeOutput:
        """Meshes of pictures (or of views, for multi-view models). Defaults are the published pipeline's."""
        contexts = self.prepare(image)
        noise = self.noise(contexts["main"].shape[0], generator, num_latents)
        latents = self.denoise(contexts, noise, num_steps, guidance_scale, on_step)
        volumes = self.decode(latents, octree_resolution, bounds, level, method, chunk, on_decode)
        return ShapeOutput([self._mesh(volume, level, faces) for volume in volumes], latents)

    def _mesh(self, volume: surface.Volume, level: float, faces: int | None) -> trimesh.Trimesh | None:
        try:
            return self.clean(self.extract(volume, level), faces)
        except meshes.NoSurfaceError:
            return None


def points_at_once(vae: ShapeVAE, device: torch.device) -> int:
    """Points of a decoder call: on a GPU as many as a quarter of its free memory holds, within limits.

    A point takes a query, its attention and an MLP: less than 16 values for each of the decoder's width.
    """
    if device.type != "cuda":
        return CHUNK
    weight = vae.geo_decoder.query_proj.weight
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(max(free // 4 // (16 * weight.shape[0] * weight.element_size()), CHUNK), MAX_CHUNK))


def _randn(shape: tuple[int, ...], generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)
