"""`--preview FILE`: what a picture is going to be, every few steps, by a linear map from latents to colours.

The map is a least-squares fit, once for each VAE: a short run's latents against the picture that the VAE
makes of them, so that no pipeline's layout of latents has to be known. What is shown is where the last step's
line leads: x - sigma dx/dsigma, the clean picture as a flow at time sigma expects it.

Shapes: B pictures, N places of latents (h x w), C values at each, S^2 preview pixels a place.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from edit_cli.errors import EditError, RunError
from edit_cli.files import write_files
from edit_cli.generation.plan import PREVIEW_MARK as MARK

if TYPE_CHECKING:
    from edit_cli.generation.medium import Job
    from edit_cli.generation.session import Session

CELL = 2
"""Preview pixels along a side of a latent's place."""
STEPS, PICTURES = 4, 4
"""Of the short run that the map is fitted to; small models make several pictures."""
RIDGE = 1e-3
"""Keeps directions that the short run did not show at zero; a share of the latents' variance."""
SHARE = 0.008
"""Of a run's time that previews may take: the next waits for so much longer than the last took. One more is
written at the end."""
WARM = 32
"""Side of the latents that the first one's time is estimated with."""
SIDE = 512
"""Px of the written picture's longer side, at most."""

Floats = NDArray[np.float32]


class Preview:
    """Writes a file now and then while a session runs; see `after_step`. seconds: spent on it so far."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.weights: Floats | None = None
        self.seconds, self.written = 0.0, 0
        self._last: tuple[Any, float] | None = None
        self._next = 0.0
        self._seen: Any = None
        self._ratio = 1.0

    def prepare(self, session: Session, job: Job) -> None:
        """Read the map of the session's VAE, or fit it. Raises EditError where latents cannot be mapped."""
        cache = _cache_file(session.pipe.vae)
        self._ratio = job.width / job.height if getattr(job, "width", None) else 1.0  # type: ignore[attr-defined]
        self.weights = _read(cache)
        if self.weights is None:
            count = PICTURES if session.plan.backbone.small else 1
            short = replace(job, steps=STEPS, solver=None, budget=None if job.budget is None else 1.0)
            with session.timed_by(type(session.clock)(session.clock.seconds)):
                results = session.run([replace(short, seed=job.seed + i) for i in range(count)]).results
            pictures = [picture for picture in results if isinstance(picture, Image.Image)]
            if self._seen is None or len(pictures) != count:
                model = session.plan.backbone.name
                raise EditError(f"--preview cannot read the latents of {model}; leave it out")
            self.weights = fit(self._seen, pictures)
            _write(cache, self.weights)
        started = time.perf_counter()  # how long one takes, before the first is due
        self._encode(np.zeros((1, WARM**2, len(self.weights) - 1), np.float32), 1.0)
        self._wait(time.perf_counter() - started)

    def after_step(self, pipe: Any, step: int, latents: Any) -> None:
        """Called by the pipeline. Costs a comparison of times unless a preview is due."""
        sigmas = getattr(pipe.scheduler, "sigmas", None)
        if latents is None or sigmas is None or step + 1 >= len(sigmas):
            return
        if self.weights is None:
            self._seen = _numbers(latents)
            return
        now = float(sigmas[step + 1])
        last, self._last = self._last, (latents, now)
        started = time.perf_counter()
        ended = step + 2 == len(sigmas)
        if last is None or step == 0 or last[1] == now or (started < self._next and not ended):
            return
        before, was = last
        clean = latents - now / (now - was) * (latents - before)
        write_files({self.file: self._encode(_numbers(clean[:1]), self._ratio)})
        self.written += 1
        self._wait(time.perf_counter() - started)

    def _wait(self, took: float) -> None:
        self.seconds += took
        self._next = time.perf_counter() + took / SHARE

    def _encode(self, latents: Floats, ratio: float) -> bytes:
        """The first picture of a batch of latents as a PNG or JPEG."""
        assert self.weights is not None
        picture = shown(places(latents, ratio)[0], self.weights)
        scale = max(SIDE // max(picture.size), 1)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        if self.file.suffix.lower() == ".png":
            chunks = PngImagePlugin.PngInfo()
            chunks.add_text("Comment", MARK)
            picture.save(buffer, "PNG", compress_level=1, pnginfo=chunks)
        else:
            picture.save(buffer, "JPEG", comment=MARK)
        return buffer.getvalue()


def fit(latents: Floats, pictures: Sequence[Image.Image]) -> Floats:
    """The map [C + 1, 3 S^2] from latents of B pictures to their colours, by least squares with a ridge."""
    grids = places(latents, pictures[0].width / pictures[0].height)
    _, height, width, values = grids.shape
    x = _with_one(grids.reshape(-1, values))
    colours = []
    for picture in pictures:
        small = picture.convert("RGB").resize((width * CELL, height * CELL), Image.Resampling.BOX)
        cells = np.asarray(small, np.float32).reshape(height, CELL, width, CELL, 3)
        colours.append(cells.transpose(0, 2, 1, 3, 4).reshape(height * width, -1))
    y = np.concatenate(colours)
    square = x.T @ x
    ridge = RIDGE * np.diag(np.append(np.full(values, square.trace() / len(square)), 0.0))
    return np.asarray(np.linalg.solve(square + ridge, x.T @ y), np.float32)


def shown(grid: Floats, weights: Floats) -> Image.Image:
    """A picture of latents [h, w, C], S px a place."""
    height, width, values = grid.shape
    cells = _with_one(grid.reshape(-1, values)) @ weights
    pixels = cells.reshape(height, width, CELL, CELL, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(pixels.reshape(height * CELL, width * CELL, 3).clip(0, 255).astype(np.uint8))


def places(latents: Floats, ratio: float) -> Floats:
    """Latents as [B, h, w, C]: given as [B, N, C] or with channels first. ratio: width by height.

    Raises EditError for any other shape.
    """
    if latents.ndim == 5 and latents.shape[2] == 1:
        latents = latents[:, :, 0]
    if latents.ndim == 4:
        return latents.transpose(0, 2, 3, 1)
    if latents.ndim == 3:
        height = max(round((latents.shape[1] / ratio) ** 0.5), 1)
        if latents.shape[1] % height == 0:
            return latents.reshape(len(latents), height, -1, latents.shape[2])
    raise EditError(f"--preview cannot read latents of shape {latents.shape}; leave it out")


def _with_one(x: Floats) -> Floats:
    return np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)


def _numbers(latents: Any) -> Floats:
    return np.asarray(latents.detach().float().cpu().numpy(), np.float32)


def _cache_file(vae: Any) -> Path:
    """Where the map of a VAE is kept: named by its configuration and some of its weights."""
    digest = hashlib.sha256(repr(sorted(dict(vae.config).items(), key=str)).encode())
    for parameter in list(vae.parameters())[-2:]:
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "edit" / "previews" / f"{digest.hexdigest()[:16]}-{CELL}.npy"


def _read(file: Path) -> Any:
    try:
        weights = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = weights.ndim == 2 and weights.shape[1] == 3 * CELL**2 and weights.dtype == np.float32
    return weights if fits and np.isfinite(weights).all() else None


def _write(file: Path, weights: Floats) -> None:
    """Keep a map; without a place for it the next run fits it again."""
    buffer = io.BytesIO()
    np.save(buffer, weights)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_files({file: buffer.getvalue()})
    except (OSError, RunError):
        return
