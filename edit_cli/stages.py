"""Seconds per stage of a diffusers pipeline, by wrapping its components while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STAGES = ("load", "text", "denoise", "decode")
"""text: prompts, and for image-to-image the input picture, to embeddings. denoise: everything between
text and decode. decode: latents to pixels."""


class StageClock:
    """Adds up seconds per stage over a whole command. Total is wall time since the clock was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the context's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @contextmanager
    def pipeline_call(self, pipe: Any) -> Iterator[None]:
        """Split one pipeline call into text, decode, and the rest: denoise. Waits for the GPU between."""
        inner = self.seconds["text"] + self.seconds["decode"]
        start = time.perf_counter()
        parts = (
            (pipe, "encode_prompt", "text"),
            (pipe.vae, "encode", "text"),
            (pipe.vae, "decode", "decode"),
            (pipe.image_processor, "postprocess", "decode"),
        )
        wait = _waiter(pipe.device.type)
        for owner, name, stage in parts:
            owner.__dict__[name] = self._timed(getattr(owner, name), stage, wait)
        try:
            yield
        finally:
            for owner, name, _ in parts:
                owner.__dict__.pop(name, None)
            inner = self.seconds["text"] + self.seconds["decode"] - inner
            self.seconds["denoise"] += time.perf_counter() - start - inner

    def report(self) -> dict[str, float]:
        """Rounded seconds per stage and in total."""
        total = time.perf_counter() - self.started
        return {name: round(value, 4) for name, value in {**self.seconds, "total": total}.items()}

    def _timed(
        self, function: Callable[..., Any], stage: str, wait: Callable[[], None]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait()
            with self.stage(stage):
                result = function(*args, **kwargs)
                wait()
            return result

        return call


def _waiter(device: str) -> Callable[[], None]:
    import torch

    if device == "cuda":
        return torch.cuda.synchronize
    if device == "mps":
        return torch.mps.synchronize
    return lambda: None
