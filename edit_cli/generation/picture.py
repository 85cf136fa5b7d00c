"""The medium PICTURE: prompts to pictures by a diffusers pipeline. Torch-free until a pipeline is called."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from backbones import registry
from backbones.pipeline_call import known_call
from backbones.spec import Backbone, CallSize, Makes
from backbones.vocabulary import remarks
from edit_cli import options
from edit_cli.checks import NONE
from edit_cli.errors import EditError, RunError
from edit_cli.generation.inputs import (
    PICTURES,
    arguments,
    refused_inputs,
    settled_inputs,
    settled_strength,
    shown,
    steps_taken,
    stretched,
    timed_parts,
)
from edit_cli.generation.medium import Fields, Job, OnStep
from edit_cli.generation.outputs import PICTURE_SUFFIXES
from edit_cli.generation.record import encode_picture, read_record
from edit_cli.generation.seen import Seen, read_texts
from edit_cli.request import in_lines

if TYPE_CHECKING:
    from PIL import Image

    from backbones.workloads import PipelineWorkload
    from edit_cli.generation.session import Session

OVERFLOW = "try --dtype bf16 or fp32, or a smaller scale of --lora"
USUAL_SIDE = 1024
"""Where the pipeline decides on a picture's size, in px: for estimates before it runs."""
SAMPLERS = {"ab2": "AB2", "dpm++2m": "DPM++ 2M"}
"""Solver -> its name in web UIs."""


@dataclass(frozen=True, kw_only=True)
class PictureJob(Job):
    """One picture to make.

    width, height: px; None: what the pipeline makes of its inputs. image: to start from, to edit or to refer
    to. pipeline: the class that is called. alone: a number of its own where it shares a batch with no other.
    """

    prompt: str
    negative_prompt: str | None
    width: int | None
    height: int | None
    image: tuple[str, ...]
    mask: str | None
    control_image: str | None
    strength: float | None
    pipeline: str
    alone: int | None

    @property
    def denoising_steps(self) -> int:
        """Image-to-image starts part of the way (as diffusers rounds it)."""
        return steps_taken(self.steps, self.strength)


class Picture:
    """Pictures of prompts."""

    makes: Makes = "picture"
    things = "pictures"
    job: type[PictureJob] = PictureJob
    options = in_lines(options.PROMPTS, options.SAMPLING, options.PICTURE, options.ROUTERS, options.OUTPUT)
    subject, joined_by, list_option = "prompt", "", "prompts_file"
    missing = 'no prompt given; try: edit generate "a cat", or --prompts FILE'
    example = '{"prompt": "a cat", "seed": 1}'
    stages = {name: name for name in ("load", "text", "denoise", "decode")}  # noqa: RUF012 - never changed
    """text: prompts, and for image-to-image the input picture, to embeddings. denoise: everything between
    text and decode. decode: latents to pixels."""
    suffixes: tuple[str, ...] = PICTURE_SUFFIXES
    beside: Mapping[str, tuple[str, ...]] = {}
    placeholders: Mapping[str, str] = {}
    recorded_fields: tuple[str, ...] = (
        "prompt",
        "negative_prompt",
        "seed",
        "width",
        "height",
        "steps",
        "guidance",
    )
    per_row = recorded_rows = ("prompt", "negative_prompt", "seed")
    recorded_as: Mapping[str, str] = {}
    imports: tuple[str, ...] = ()
    libraries = ("torch", "diffusers", "transformers")
    smaller = "a smaller --width and --height or --batch-size, --dtype bf16, or on a GPU --offload model"

    def complete(self, fields: Fields, backbone: Backbone, warnings: list[str]) -> Fields:
        """The model's defaults filled in, and what depends on the model checked. Raises EditError."""
        family, base, guidance = backbone.family, backbone.defaults, fields["guidance"]
        if family.negative_prompt is None and fields.get("negative_prompt") not in (None, "", NONE):
            raise EditError(
                f"{family.name} takes no --negative-prompt: its guidance is distilled; leave it out"
            )
        given, call = settled_inputs(fields, backbone, self.options)
        settled = {"width": given.get("width", base.width), "height": given.get("height", base.height)}
        for name, side in settled.items():
            low = 0 if side is None else side - side % backbone.size_multiple
            if side is not None and low != side:
                near = " and ".join(str(n) for n in (low, low + backbone.size_multiple) if n)
                raise EditError(
                    f"--{name} {side} is not a multiple of {backbone.size_multiple}, which this model needs; "
                    f"nearest: {near}"
                )
        negative = given.get("negative_prompt")
        if family.negative_prompt is not None and guidance > 1:
            negative = negative or family.negative_prompt
        elif negative:
            warnings.append(f"the negative prompt has no effect at guidance {guidance:g}; use more than 1")
        images = given.get("image", ())
        if not given.keys().isdisjoint(PICTURES):
            warnings += stretched(given, call, **settled)
        size = (settled["width"], settled["height"])
        warnings += remarks(backbone.source, backbone.name, fields["prompt"], size)
        return {
            "prompt": fields["prompt"], "negative_prompt": negative, **settled, "image": images,
            "mask": given.get("mask"), "control_image": given.get("control_image"),
            "strength": settled_strength(given, call, fields["steps"]) if images else None,
            "pipeline": call.pipeline,
            "alone": fields["index"] if images and call.argument("image") in call.lists else None,
        }  # fmt: skip

    def check_path(self, path: Path) -> None:
        """Every format can be written."""

    def title(self, fields: Mapping[str, Any]) -> str:
        """What files are named after: the prompt."""
        return str(fields["prompt"])

    def size(self, jobs: Sequence[Any]) -> str:
        """Width and height."""
        sizes = {f"{job.width}x{job.height}" if job.width else "its own size" for job in jobs}
        return sizes.pop() if len(sizes) == 1 else "several sizes"

    def shortest(self, job: Any) -> PictureJob:
        """One step from noise."""
        shortest: PictureJob = replace(job, steps=1, strength=None if job.strength is None else 1.0)
        return shortest

    def peer(self, row: Mapping[str, Any]) -> Fields:
        """Another row of a recorded batch."""
        return {name: row.get(name) for name in self.recorded_rows}

    def pipe(self, session: Session, job: Any) -> Any:
        """The model's pipeline, or another class around the same components."""
        if job.pipeline == session.plan.backbone.family.pipeline_class:
            return session.pipe
        if job.pipeline not in session.pipes:
            from backbones import loading

            session.pipes[job.pipeline] = loading.around(session.pipe, job.pipeline)
        return session.pipes[job.pipeline]

    def call(self, session: Session, pipe: Any, jobs: Sequence[Any], on_step: OnStep) -> list[Any]:
        """One call of the diffusers pipeline."""
        call, last = known_call(jobs[0].pipeline), {}
        given = arguments(call, session.plan.backbone, jobs)

        def after_step(called: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            last.update(tensors)
            on_step()
            if session.preview is not None:
                session.preview.after_step(called, step, tensors.get("latents"))
            return {}

        if "callback_on_step_end" in call.defaults:
            given["callback_on_step_end"] = after_step
        seen = Seen(len(jobs))
        with (
            read_texts(pipe, seen),
            timed_parts(pipe, session.clock, session.device, seen),
            refused_inputs(last, pipe, session.sampler),
        ):
            output = pipe(**given)
            made = self.results(pipe, output, call.gives, len(jobs))
        seen.values(last.get("latents"))
        seen.values(getattr(output, call.gives))
        session.notes += seen.notes(
            [text or "" for job in jobs for text in (job.prompt, job.negative_prompt)]
        )
        return [
            RunError(f"{job.path}: the numbers overflowed; {OVERFLOW}") if row in seen.bad else each
            for row, (each, job) in enumerate(zip(made, jobs, strict=True))
        ]

    def results(self, _pipe: Any, output: Any, gives: str, _jobs: int) -> list[Any]:
        """One result for each job. gives: the field of the pipeline's output."""
        return list(getattr(output, gives))

    def encode(self, job: Any, made: Any, record: Mapping[str, Any]) -> dict[Path, bytes]:
        """PNG, JPEG or WebP."""
        return {job.path: encode_picture(made, job.path.suffix, record)}

    def safest(self, _path: Path) -> str:
        """The suffix of a file that can be written whatever is made: without loss or limits."""
        return ".png"

    def read_record(self, path: str) -> dict[str, Any]:
        """From the metadata of a file of any kind that `edit generate` writes."""
        return read_record(path)

    def inputs(self, job: Any) -> dict[str, Any]:
        """Of a record: the pictures it starts from."""
        files = {name: getattr(job, name) or () for name in PICTURES}
        return {
            **{name: _each(lambda file: str(Path(file).resolve()), value) for name, value in files.items()},
            **{f"{name}_hash": _each(file_hash, value) for name, value in files.items()},
            "strength": job.strength,
        }

    def record(self, job: Any, session: Session) -> dict[str, Any]:
        """Start picture and sampler."""
        sampler = session.sampler.replace("DiscreteScheduler", "")
        return {
            **self.inputs(job), "solver": job.solver, "sampler": SAMPLERS.get(job.solver or "", sampler),
        }  # fmt: skip

    def facts(self, _made: Any) -> dict[str, Any]:
        """Nothing is reported of a picture."""
        return {}

    def told(self, job: Any, _facts: Mapping[str, Any]) -> str:
        """The prompt."""
        return str(job.prompt)

    def thumbnail(self, made: Any) -> Image.Image:
        """The picture."""
        picture: Image.Image = made
        return picture

    def identity(self, job: Any) -> str:
        """The prompt, and hashes of its pictures."""
        files = (*job.image, *filter(None, (job.mask, job.control_image)))
        return "\0".join([job.prompt, *map(file_hash, files)])

    def workload(self, session: Session, jobs: Sequence[Any], rows: int) -> PipelineWorkload:
        """Prompts with their pictures, at the size and guidance of the first."""
        from backbones.workloads import PipelineWorkload

        first, prompts, call = jobs[0], [job.prompt for job in jobs], known_call(jobs[0].pipeline)
        pictures = [{**given, "strength": job.strength} for job in jobs if (given := shown(call, job))]
        more = {name: getattr(first, name) for name in ("frames", "seconds") if hasattr(first, name)}
        return PipelineWorkload(
            self.pipe(session, first), session.plan.backbone, rows, first.steps, first.guidance, prompts,
            first.width, first.height, more, pictures, seed=first.seed,
        )  # fmt: skip

    def comparison_path(self, path: Path, _compare: str) -> Path:
        """The side-by-side picture."""
        return path.with_name(f"{path.stem}-compare.png")

    def compare(self, made: Any, dense: Any) -> dict[str, float]:
        """PSNR in dB (99 for equal pictures) and SSIM."""
        from edit_cli.generation.closeness import psnr, ssim

        return {"psnr": round(min(psnr(dense, made), 99.0), 2), "ssim": round(ssim(dense, made), 4)}

    def encode_comparison(self, made: Mapping[str, Any], suffix: str) -> bytes:
        """The pictures side by side with their names, as PNG whatever the suffix."""
        from edit_cli.generation.closeness import side_by_side

        return encode_picture(side_by_side(dict(made)), ".png", {})

    def compared_seconds(self, seconds: Mapping[str, float]) -> float:
        """Of denoising."""
        return round(seconds["denoise"], 4)

    def comparison_line(self, comparison: Mapping[str, Any]) -> str:
        """Seconds, PSNR, SSIM."""
        return (
            f"denoising took {comparison['dense_seconds']:.2f} s dense, "
            f"{comparison['elastic_seconds']:.2f} s elastic: measured time ratio "
            f"{comparison['time_ratio']:.2f}; PSNR {fmean(comparison['psnr']):.1f} dB, "
            f"SSIM {fmean(comparison['ssim']):.3f}{_beside_dense(comparison)}"
        )

    def calls(self, job: Any, backbone: Backbone) -> list[CallSize]:
        """One call per branch: each has its own text."""
        tokens, limit = backbone.family.text_tokens, _longest(job, backbone)
        prompts = [job.prompt, job.negative_prompt or ""][: backbone.branches(job.guidance)]
        width, height = job.width or USUAL_SIDE, job.height or USUAL_SIDE
        return [CallSize(1, width, height, tokens(prompt, limit)) for prompt in prompts]

    def latent(self, job: Any, backbone: Backbone) -> int:
        """Values that the transformer gives, at most: of every patch, its values in every channel."""
        config = registry.component_configs(backbone)["transformer"]
        patch, channels = config.get("patch_size", 1), config.get("out_channels") or config.get("in_channels")
        values = math.prod(patch) if isinstance(patch, (list, tuple)) else patch**2
        return self._tokens(job, backbone) * int(values * (channels or 0))

    def stream(self, job: Any, backbone: Backbone) -> int:
        """Values of the residual streams between two blocks, of picture and text."""
        config = registry.component_configs(backbone)["transformer"]
        text = backbone.family.text_tokens(job.prompt, _longest(job, backbone))
        width = int(config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0))
        return (self._tokens(job, backbone) + text) * width

    def _tokens(self, job: Any, backbone: Backbone) -> int:
        """Patches of the picture."""
        side, width, height = backbone.size_multiple, job.width or USUAL_SIDE, job.height or USUAL_SIDE
        return int((width // side) * (height // side))

    def needs(self, _jobs: Sequence[Any]) -> dict[str, tuple[float, str]]:
        """No memory beside the device's."""
        return {}


PICTURE = Picture()


def _beside_dense(comparison: Mapping[str, Any]) -> str:
    """How near the dense run comes to what was compared with, where that is the exact solution."""
    if "dense_psnr" not in comparison:
        return ""
    dense = f"{fmean(comparison['dense_psnr']):.1f} dB, SSIM {fmean(comparison['dense_ssim']):.3f}"
    return f" to the exact solution, which the dense run comes near to with {dense}"


def _longest(job: Any, backbone: Backbone) -> int | None:
    """Text tokens that are read at most: as the model's folder says, else as its pipeline's call does."""
    own = backbone.defaults.max_sequence_length
    return own if own is not None else known_call(job.pipeline).default("max_sequence_length")


def file_hash(file: str) -> str:
    """Short hash of what a file holds."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _each(make: Callable[[str], str], files: str | tuple[str, ...]) -> Any:
    """Of one file, a list of several, or None."""
    made = [make(file) for file in ((files,) if isinstance(files, str) else files)]
    return made if len(made) > 1 else next(iter(made), None)
