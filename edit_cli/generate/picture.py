"""The medium PICTURE: prompts to pictures by a diffusers pipeline. Torch-free until a pipeline is called."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from backbones import registry
from backbones.spec import Backbone, CallSize, Makes
from edit_cli import checks, options
from edit_cli.errors import EditError, RunError
from edit_cli.generate.medium import Fields, Job, OnStep
from edit_cli.generate.outputs import PICTURE_SUFFIXES
from edit_cli.generate.record import encode_picture, read_picture
from edit_cli.request import in_lines

if TYPE_CHECKING:
    from PIL import Image

    from backbones.workloads import PipelineWorkload
    from edit_cli.generate.result import StageClock
    from edit_cli.generate.session import Session

DEFAULT_STRENGTH = 0.6  # diffusers' own default for image-to-image
OVERFLOW = "try --dtype bf16 or fp32, or a smaller scale of --lora"
SAMPLERS = {"ab2": "AB2", "dpm++2m": "DPM++ 2M"}
"""Solver -> its name in web UIs."""


@dataclass(frozen=True, kw_only=True)
class PictureJob(Job):
    """One picture to make. Sizes in px."""

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    image: str | None
    strength: float | None

    @property
    def denoising_steps(self) -> int:
        """Image-to-image starts part of the way (as diffusers rounds it)."""
        return steps_taken(self.steps, self.strength)


class Picture:
    """Pictures of prompts."""

    makes: Makes = "picture"
    things = "pictures"
    job = PictureJob
    options = in_lines(options.PROMPTS, options.SAMPLING, options.PICTURE, options.ROUTERS, options.OUTPUT)
    subject, joined_by, list_option = "prompt", "", "prompts_file"
    missing = 'no prompt given; try: edit generate "a cat", or --prompts FILE'
    example = '{"prompt": "a cat", "seed": 1}'
    stages = {name: name for name in ("load", "text", "denoise", "decode")}  # noqa: RUF012 - never changed
    """text: prompts, and for image-to-image the input picture, to embeddings. denoise: everything between
    text and decode. decode: latents to pixels."""
    suffixes = PICTURE_SUFFIXES
    beside: Mapping[str, tuple[str, ...]] = {}
    recorded_fields = ("prompt", "negative_prompt", "seed", "width", "height", "steps", "guidance")
    per_row = recorded_rows = ("prompt", "negative_prompt", "seed")
    recorded_as: Mapping[str, str] = {}
    imports: tuple[str, ...] = ()
    libraries = ("torch", "diffusers", "transformers")
    smaller = "a smaller --width and --height or --batch-size, --dtype bf16, or on a GPU --offload model"

    def complete(self, fields: Fields, backbone: Backbone, warnings: list[str]) -> Fields:
        """The model's defaults filled in, and what depends on the model checked. Raises EditError."""
        family, base = backbone.family, backbone.defaults
        negative, guidance = fields.get("negative_prompt"), fields["guidance"]
        image, strength = fields.get("image"), fields.get("strength")
        width, height = fields.get("width", base.width or 0), fields.get("height", base.height or 0)
        for name, side in (("--width", width), ("--height", height)):
            low = side - side % backbone.size_multiple
            if low != side:
                near = " and ".join(str(n) for n in (low, low + backbone.size_multiple) if n)
                raise EditError(
                    f"{name} {side} is not a multiple of {backbone.size_multiple}, which this model needs; "
                    f"nearest: {near}"
                )
        if family.negative_prompt is None and negative:
            raise EditError(
                f"{family.name} takes no --negative-prompt: its guidance is distilled; leave it out"
            )
        if family.negative_prompt is not None and guidance > 1:
            negative = negative or family.negative_prompt
        elif negative:
            warnings.append(f"the negative prompt has no effect at guidance {guidance:g}; use more than 1")
        if image == checks.NONE:
            image = strength = None
        if image is None and strength is not None:
            raise EditError("--strength is for image-to-image; give --image FILE too")
        if image is not None and family.image_to_image_class is None:
            raise EditError(f"{family.name} offers no image-to-image; leave --image out")
        if image is not None:
            strength = strength or DEFAULT_STRENGTH
            if steps_taken(fields["steps"], strength) < 1:
                raise EditError(
                    f"--strength {strength:g} of {fields['steps']} steps leaves no step to run; raise either"
                )
        return {
            "prompt": fields["prompt"], "negative_prompt": negative, "width": width, "height": height,
            "image": image, "strength": strength,
        }  # fmt: skip

    def title(self, fields: Mapping[str, Any]) -> str:
        """What files are named after: the prompt."""
        return str(fields["prompt"])

    def size(self, jobs: Sequence[Any]) -> str:
        """Width and height."""
        sizes = {f"{job.width}x{job.height}" for job in jobs}
        return sizes.pop() if len(sizes) == 1 else "several sizes"

    def shortest(self, job: Any) -> PictureJob:
        """One step from noise."""
        shortest: PictureJob = replace(job, steps=1, image=None, strength=None)
        return shortest

    def peer(self, row: Mapping[str, Any]) -> Fields:
        """Another row of a recorded batch."""
        return {name: row[name] for name in self.recorded_rows}

    def pipe(self, session: Session, job: Any) -> Any:
        """The family's pipeline, or the one for image-to-image around the same components."""
        if job.image is None:
            return session.pipe
        if "image" not in session.pipes:
            from backbones import loading

            session.pipes["image"] = loading.image_to_image(session.pipe, session.plan.backbone)
        return session.pipes["image"]

    def call(self, session: Session, pipe: Any, jobs: Sequence[Any], on_step: OnStep) -> list[Any]:
        """One call of the diffusers pipeline."""
        last: dict[str, Any] = {}

        def after_step(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            last.update(tensors)
            on_step()
            return {}

        with timed_parts(pipe, session.clock, session.device):
            made = pipe(**_arguments(session.plan.backbone, jobs), callback_on_step_end=after_step).images
        finite = last["latents"].flatten(1).isfinite().all(dim=1).tolist()
        return [
            picture if good else RunError(f"{job.path}: the numbers overflowed; {OVERFLOW}")
            for picture, good, job in zip(made, finite, jobs, strict=True)
        ]

    def encode(self, job: Any, made: Image.Image, record: Mapping[str, Any]) -> dict[Path, bytes]:
        """PNG, JPEG or WebP."""
        return {job.path: encode_picture(made, job.path.suffix, record)}

    def read_record(self, path: str) -> dict[str, Any]:
        """From a picture's metadata."""
        return read_picture(path)

    def record(self, job: Any, session: Session) -> dict[str, Any]:
        """Start picture and sampler."""
        sampler = type(session.pipe.scheduler).__name__.replace("DiscreteScheduler", "")
        return {
            "image": str(Path(job.image).resolve()) if job.image else None,
            "image_hash": hashlib.sha256(Path(job.image).read_bytes()).hexdigest()[:16]
            if job.image
            else None,
            "strength": job.strength,
            "solver": job.solver,
            "sampler": SAMPLERS.get(job.solver or "", sampler),
        }

    def facts(self, _made: Any) -> dict[str, Any]:
        """Nothing is reported of a picture."""
        return {}

    def told(self, job: Any, _facts: Mapping[str, Any]) -> str:
        """The prompt."""
        return str(job.prompt)

    def thumbnail(self, made: Image.Image) -> Image.Image:
        """The picture."""
        return made

    def identity(self, job: Any) -> str:
        """The prompt."""
        return str(job.prompt)

    def workload(self, session: Session, jobs: Sequence[Any], rows: int) -> PipelineWorkload:
        """Prompts, at the size and guidance of the first."""
        from backbones.workloads import PipelineWorkload

        first, prompts = jobs[0], [job.prompt for job in jobs]
        return PipelineWorkload(
            session.pipe, session.plan.backbone, rows, first.steps, first.guidance, prompts, first.width,
            first.height, seed=first.seed,
        )  # fmt: skip

    def comparison_path(self, path: Path, _compare: str) -> Path:
        """The side-by-side picture."""
        return path.with_name(f"{path.stem}-compare.png")

    def compare(self, made: Image.Image, dense: Image.Image) -> dict[str, float]:
        """PSNR in dB (99 for equal pictures) and SSIM."""
        from edit_cli.generate.closeness import psnr, ssim

        return {"psnr": round(min(psnr(dense, made), 99.0), 2), "ssim": round(ssim(dense, made), 4)}

    def encode_comparison(self, made: Mapping[str, Any], _suffix: str) -> bytes:
        """The pictures side by side with their names, as PNG."""
        from edit_cli.generate.closeness import side_by_side

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
        tokens, limit = backbone.family.text_tokens, backbone.defaults.max_sequence_length
        prompts = [job.prompt, job.negative_prompt or ""][: backbone.branches(job.guidance)]
        return [CallSize(1, job.width, job.height, tokens(prompt, limit)) for prompt in prompts]

    def stream(self, job: Any, backbone: Backbone) -> tuple[int, int]:
        """Patches of the picture and tokens of the text."""
        config = registry.component_configs(backbone)["transformer"]
        side = backbone.size_multiple
        text = backbone.family.text_tokens(job.prompt, backbone.defaults.max_sequence_length)
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return (job.width // side) * (job.height // side) + text, width

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


def steps_taken(steps: int, strength: float | None) -> int:
    """Denoising steps that are run of so many when a start picture is left this far."""
    return steps if strength is None else steps - int(max(steps - min(steps * strength, steps), 0))


def _arguments(backbone: Backbone, jobs: Sequence[Any]) -> dict[str, Any]:
    import torch

    family, first = backbone.family, jobs[0]
    arguments: dict[str, Any] = {
        "prompt": [job.prompt for job in jobs],
        family.guidance_argument: first.guidance,
        "num_inference_steps": first.steps,
        "width": first.width,
        "height": first.height,
        # one CPU generator per picture: the same noise in any batch and on any device
        "generator": [torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
    }
    if backbone.branches(first.guidance) > 1:
        arguments["negative_prompt"] = [job.negative_prompt for job in jobs]
    if backbone.defaults.max_sequence_length is not None:
        arguments["max_sequence_length"] = backbone.defaults.max_sequence_length
    if first.image is not None:
        from edit_cli.generate.cutout import open_rgb

        arguments["image"] = [open_rgb(first.image)] * len(jobs)
        arguments["strength"] = first.strength
    return arguments


@contextmanager
def timed_parts(pipe: Any, clock: StageClock, device: str) -> Iterator[None]:
    """Split one pipeline call into text, decode, and the rest: denoise. Waits for the GPU between."""
    from edit_cli.generate.result import waiter

    inner = clock.seconds["text"] + clock.seconds["decode"]
    start, wait = time.perf_counter(), waiter(device)
    parts = (
        (pipe, "encode_prompt", "text"),
        (pipe.vae, "encode", "text"),
        (pipe.vae, "decode", "decode"),
        (pipe.image_processor, "postprocess", "decode"),
    )

    def timed(function: Any, stage: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait()
            with clock.stage(stage, device):
                return function(*args, **kwargs)

        return call

    for owner, name, stage in parts:
        owner.__dict__[name] = timed(getattr(owner, name), stage)
    try:
        yield
    finally:
        for owner, name, _ in parts:
            owner.__dict__.pop(name, None)
        inner = clock.seconds["text"] + clock.seconds["decode"] - inner
        clock.seconds["denoise"] += time.perf_counter() - start - inner
