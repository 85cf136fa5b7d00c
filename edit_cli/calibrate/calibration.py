"""What `edit calibrate` does once its arguments are known: load, fit, measure, save."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import routers
from backbones import loading, registry
from backbones.spec import Backbone, Placement
from backbones.workloads import MeshWorkload, PipelineWorkload, embed, encode
from edit_cli import __version__
from edit_cli.calibrate import training as calibrate_train
from edit_cli.calibrate.inputs import Asked, read_images
from edit_cli.console import phases, print_warning
from edit_cli.errors import EditError, RunError, bad_input
from edit_cli.generate.cutout import open_rgb
from edit_cli.generate.prompts import default_prompts, read_prompts
from routers.calibrate.evaluate import Quality, as_metadata, evaluate, recommend
from routers.calibrate.fit import FitSettings, fit
from routers.calibrate.state import State
from routers.identity import architecture, fingerprint

HELD_OUT = 8
"""Samples that only measure the finished bundle."""
TRIED, TRIED_LARGE = 8, 2
"""Samples that plans are tried on, by default: of a small model, and of one whose runs take long."""
SMALL_BATCH = 4
"""Meshes of a small model that are calibrated on together."""


@dataclass
class Calibration:
    """A loaded model with its calibration and held-out requests.

    inputs: what the requests are made of, prompts or hashes of pictures. processes: of a training
    (accelerate). data [samples, L, C]: latents of the pictures it learns from.
    """

    asked: Asked
    backbone: Backbone
    pipe: Any
    train: PipelineWorkload | MeshWorkload
    judge: PipelineWorkload | MeshWorkload
    inputs: list[str]
    settings: FitSettings
    state: State | None = None
    processes: Any = None
    data: torch.Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, asked: Asked) -> Calibration:
        """Load a model and make the requests. Raises EditError or ValueError for bad input."""
        # before the model is loaded: it goes to the device of this process
        processes = None
        if asked.training is not None:
            processes = calibrate_train.open_processes(asked.training, asked.device)
        session = _open_meshes(asked) if asked.meshes else _open_pictures(asked)
        session.processes = processes
        return session

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes: of several in a training, the first."""
        return self.processes is None or bool(self.processes.is_main_process)

    def begin(self, output: Path) -> None:
        """Start the state beside the output, or go on with it. Raises EditError."""
        self.state = State(output.parent / f".{output.name}.calibrate-state")
        if not self.is_main:
            self.processes.wait_for_everyone()
            with bad_input():
                self.state.begin(self._request(), True)
            return
        unfinished = self.state.folder.is_dir()
        try:
            if output.exists() and not os.access(output, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with bad_input():  # what cannot be written is told before the work
                found = self.state.begin(self._request(), self.asked.resume)
        except OSError as error:
            raise EditError(_unwritable(output, error)) from error
        if self.asked.resume and not found:
            print_warning(f"nothing to resume beside {str(output)!r}: starting anew")
        elif unfinished and not found:
            print_warning("an unfinished calibration was discarded; --resume would have continued it")
        if self.processes is not None:
            self.processes.wait_for_everyone()

    def make(self, output: Path, bars: Any) -> routers.Bundle:
        """A new bundle by the asked method."""
        if self.asked.training is None:
            return self.fit(bars)
        start = time.perf_counter()
        bundle = calibrate_train.train(self, output, bars)
        self.seconds["train"] = time.perf_counter() - start
        return bundle

    def fit(self, bars: Any) -> routers.Bundle:
        """A new bundle for this model. Raises RunError if the state cannot be kept."""
        start = time.perf_counter()
        transformer, report = self.pipe.transformer, phases(bars)
        try:
            bundle = fit(
                transformer, self.backbone.family.transformer, self.train, self.backbone.name,
                self.train.guidance, self.settings, report, self.state,
            )  # fmt: skip
        except OSError as error:
            raise RunError(
                f"the progress of the calibration cannot be written: {error.strerror or error}; "
                "make room and continue with --resume"
            ) from error
        bundle.min_budget = self.asked.budgets[0]
        self.seconds["fit"] = time.perf_counter() - start
        return bundle

    def load(self, path: str) -> routers.Bundle:
        """An existing bundle, checked against this model."""
        bundle = routers.load_bundle(path)
        routers.attach(self.pipe.transformer, bundle, budget=1.0).detach()
        return bundle

    def measure(self, bundle: routers.Bundle, bars: Any) -> list[Quality]:
        """Quality, spend and time at the asked budgets, on requests that were not fitted."""
        start = time.perf_counter()
        served = {round(max(budget, bundle.min_budget), 3) for budget in self.asked.budgets}
        report = phases(bars)
        rows = evaluate(
            self.pipe.transformer, bundle, self.judge, sorted(served), lambda d, t: report("measure", d, t)
        )
        self.seconds["measure"] = time.perf_counter() - start
        return rows

    def save(self, bundle: routers.Bundle, rows: Sequence[Quality], folder: Path) -> None:
        """Record how the bundle was made, write it and forget the state. Raises RunError."""
        bundle.recommended_budget = recommend(rows)
        bundle.metadata |= {
            "quality": as_metadata(rows),
            **({} if self.asked.training else {"settings": asdict(self.settings)}),
            "images" if self.asked.meshes else "prompts": len(set(self.inputs)),
            "inputs_sha256": _digest(self.inputs),
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "threads": torch.get_num_threads(),
            "versions": {"edit": __version__, "torch": torch.__version__, "diffusers": version("diffusers")},
        }
        try:
            bundle.save(folder)
        except OSError as error:
            raise RunError(f"{_unwritable(folder, error)}; make room and continue with --resume") from error
        if self.state is not None:
            self.state.discard()

    def _request(self) -> dict[str, Any]:
        """What a continued run must have in common with the one that was stopped."""
        train, transformer = self.train, self.pipe.transformer
        size = {} if isinstance(train, MeshWorkload) else {"size": f"{train.width}x{train.height}"}
        return {
            "model": self.backbone.name,
            "architecture": architecture(transformer),
            "weights": fingerprint(transformer),
            "dtype": str(next(transformer.parameters()).dtype),
            "images" if self.asked.meshes else "prompts": _digest(self.inputs),
            "samples": self.asked.samples,
            "batch size": train.rows,
            "steps": train.num_steps,
            "guidance": train.guidance,
            "seed": train.seed,
            "probes": self.settings.probes,
            "plan samples": self.settings.tried,
            **size,
            **self._training_request(),
        }

    def _training_request(self) -> dict[str, Any]:
        if self.asked.training is None:
            return {"method": "fit"}
        data = None if self.data is None else hashlib.sha256(self.data.numpy().tobytes()).hexdigest()
        return {
            "method": "train",
            "data": data,
            **calibrate_train.request(self.asked.training, self.processes),
        }


def _open_pictures(asked: Asked) -> Calibration:
    backbone = registry.resolve(asked.model, makes="picture")
    pictures: list[tuple[Path, str]] = []
    if asked.data is not None:
        pictures = calibrate_train.read_data(asked.data)
        lines = [prompt for _, prompt in pictures]
    else:
        lines = [entry["prompt"] for entry in read_prompts(asked.prompts or str(default_prompts(backbone)))]
    pipe = loading.load(backbone, Placement(device=asked.device, dtype=asked.dtype))
    defaults = backbone.defaults
    rows = min(asked.batch_size or backbone.batch_size, asked.samples)
    train = PipelineWorkload(
        pipe, backbone.family, _cycle(lines, asked.samples), rows, asked.steps or defaults.steps,
        defaults.guidance if asked.guidance is None else asked.guidance,
        defaults.width, defaults.height, asked.seed, defaults.max_sequence_length,
    )  # fmt: skip
    held_out = _cycle(lines[::-1], max(HELD_OUT, rows))
    judge = replace(train, prompts=held_out, seed=asked.seed + 10_000)
    settings = _fit_settings(asked, backbone)
    session = Calibration(asked, backbone, pipe, train, judge, list(train.prompts), settings)
    if pictures:
        found = [open_rgb(str(file)) for file, _ in pictures]
        latents = encode(pipe, backbone, found, (train.width or 0, train.height or 0), asked.seed)
        session.data = latents[[i % len(latents) for i in range(asked.samples)]]
    return session


def _open_meshes(asked: Asked) -> Calibration:
    backbone = registry.resolve(asked.model, makes="mesh")
    pictures = read_images(backbone, asked.images, asked.background)
    placement = Placement(device=asked.device, dtype=asked.dtype)
    pipe = loading.load(backbone, placement)
    defaults = backbone.defaults
    rows = min(asked.batch_size or (SMALL_BATCH if backbone.small else 1), asked.samples)
    train = MeshWorkload(
        pipe, embed(pipe, list(pictures.values())), asked.samples, rows, asked.steps or defaults.steps,
        defaults.guidance if asked.guidance is None else asked.guidance, asked.seed,
    )  # fmt: skip
    backwards = {name: context.flip(0) for name, context in train.contexts.items()}
    judge = replace(train, contexts=backwards, samples=max(HELD_OUT, rows), seed=asked.seed + 10_000)
    settings = _fit_settings(asked, backbone)
    return Calibration(asked, backbone, pipe, train, judge, list(pictures), settings)


def _fit_settings(asked: Asked, backbone: Backbone) -> FitSettings:
    tried = asked.plan_samples
    if tried is None:
        tried = TRIED if backbone.small else TRIED_LARGE
    return FitSettings(
        probes=asked.probes, tried=tried, least=min(asked.budgets, default=1.0), seed=asked.seed
    )


def _cycle(lines: Sequence[str], count: int) -> list[str]:
    return [lines[i % len(lines)] for i in range(count)]


def _digest(inputs: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()


def _unwritable(folder: Path, error: OSError) -> str:
    return f"bundle folder {str(folder)!r} cannot be written: {error.strerror or error}"
