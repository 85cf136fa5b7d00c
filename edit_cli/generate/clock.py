"""Seconds per stage of a command, and of a diffusers pipeline by wrapping its components while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

STAGES = ("load", "text", "denoise", "decode")
"""text: prompts, and for image-to-image the input picture, to embeddings. denoise: everything between
text and decode. decode: latents to pixels."""


class StageClock:
    """Adds up seconds per stage over a whole command. Total is wall time since the clock was made."""

    def __init__(self, stages: Sequence[str] = STAGES) -> None:
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(stages, 0.0)

    @contextmanager
    def stage(self, name: str, device: str = "cpu") -> Iterator[None]:
        """Add the context's wall time to a stage; waits for the device before it stops."""
        start = time.perf_counter()
        try:
            yield
            waiter(device)()
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
        # with offloading the weights lie on the CPU between calls; where they run is what counts
        device = pipe._execution_device.type
        for owner, name, stage in parts:
            owner.__dict__[name] = self._timed(getattr(owner, name), stage, device)
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

    def _timed(self, function: Callable[..., Any], stage: str, device: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            waiter(device)()
            with self.stage(stage, device):
                return function(*args, **kwargs)

        return call


def waiter(device: str) -> Callable[[], None]:
    """A function that returns when a device's queued work is done."""
    if device == "cpu":
        return lambda: None
    import torch

    wait: Callable[[], None] = getattr(torch, device).synchronize
    return wait
