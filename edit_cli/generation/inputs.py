"""What a diffusers pipeline is called with: checked against its signature before loading, made at the call.

Torch-free until a pipeline is called.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbones.pipeline_call import ARGUMENTS, GIVES, PipelineCall, variant
from backbones.spec import Backbone
from edit_cli import checks
from edit_cli.errors import EditError
from edit_cli.generation.medium import Fields
from edit_cli.request import Options

if TYPE_CHECKING:
    from edit_cli.generation.result import StageClock
    from edit_cli.generation.seen import Seen

DEFAULT_STRENGTH = 0.6  # diffusers' own default for image-to-image
PICTURES = ("image", "mask", "control_image")
"""Inputs that are files of pictures."""
EXIF_ORIENTATION = 0x0112
PASSED = ("width", "height", "frames", "fps", "seconds", "strength", "max_sequence_length")
"""Inputs that go into the call as they are, once for all rows."""


def settled_inputs(fields: Fields, backbone: Backbone, options: Options) -> tuple[Fields, PipelineCall]:
    """What was given of ARGUMENTS, and the call that takes all of it; "none" takes out what a record holds.

    `image` is a tuple. Raises EditError naming what no call takes, or what it lacks.
    """
    given = {name: fields[name] for name in ARGUMENTS if fields.get(name) not in (None, "", checks.NONE)}
    images = given.get("image", ())
    images = tuple(images) if isinstance(images, (list, tuple)) else (images,)
    given["image"] = tuple(image for image in images if image != checks.NONE)
    if not given["image"]:
        given.pop("image")
        if fields.get("image"):  # taken out: what belonged to it goes with it
            given.pop("strength", None)
    return given, _call_for(given, backbone, options)


def _call_for(given: Fields, backbone: Backbone, options: Options) -> PipelineCall:
    wanted = tuple(name for name in given if name in options)
    if "strength" in given and "image" not in given:
        raise EditError("--strength is for image-to-image; give --image FILE too")
    call = variant(backbone.family.pipeline_class, wanted)
    for name in wanted:
        if call.argument(name) is None and not (name == "fps" and GIVES.get(call.gives) == "video"):
            # every video file has frames per second
            what = "prompt" if name == "prompt" else options[name].label
            raise EditError(f"{backbone.name} ({call.pipeline}) takes no {what}; leave it out")
    if len(given.get("image", ())) > 1 and call.argument("image") not in (*call.lists, "video"):
        raise EditError(
            f"{backbone.name} ({call.pipeline}) takes one --image and {len(given['image'])} were given"
        )
    known, needed = call.known(), list(call.required)
    if GIVES.get(call.gives) == "picture" and call.argument("image") == "image" not in call.lists:
        # signatures say None for these where only a caller with latents of its own can do without
        mask = call.argument("mask")
        needed += [name for name in ("image", mask) if name and (mask or call.argument("strength"))]
    for argument in needed:
        if argument not in known:
            raise EditError(
                f"{backbone.name} ({call.pipeline}) needs {argument!r}, which `edit generate` cannot give"
            )
        if known[argument] not in given:
            raise EditError(
                f"{backbone.name} ({call.pipeline}) needs {options[known[argument]].label}; give it too"
            )
    return call


def arguments(call: PipelineCall, backbone: Backbone, jobs: Sequence[Any]) -> dict[str, Any]:
    """The arguments of one call for jobs of one group."""
    import torch

    first = jobs[0]
    # one CPU generator per result: the same noise in any batch and on any device
    generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
    values: dict[str, Any] = {
        "prompt": _rows([job.prompt for job in jobs]),
        "steps": first.steps,
        **{name: getattr(first, name) for name in PASSED if getattr(first, name, None) is not None},
    }
    if backbone.defaults.max_sequence_length is not None:
        values["max_sequence_length"] = backbone.defaults.max_sequence_length
    if backbone.branches(first.guidance) > 1 and first.negative_prompt:
        values["negative_prompt"] = _rows([job.negative_prompt for job in jobs])
    made = {argument: value for name, value in values.items() if (argument := call.argument(name))}
    made |= shown(call, first, len(jobs))
    guidance = call.guidance
    if guidance and (call.defaults[guidance] is not None or first.guidance != backbone.defaults.guidance):
        made[guidance] = first.guidance
    if "max_area" in call.defaults and first.width and first.height:  # else the size is only its shape
        made["max_area"] = first.width * first.height
    if "generator" in call.defaults:
        made["generator"] = _rows(generators)
    return made


@contextmanager
def refused_inputs(steps_made: Mapping[str, Any], pipe: Any, sampler: str) -> Iterator[None]:
    """What a pipeline refuses before its first step is bad input, in its own words; and a scheduler that
    lacks what the pipeline asks of it is not the model's. sampler: the scheduler's class.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        misfit = sampler in str(error) or type(pipe.scheduler).__name__ in str(error) or _in_scheduler(error)
        if steps_made or not (misfit or isinstance(error, ValueError)):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if misfit:
            reason = f"the scheduler {sampler} does not fit {type(pipe).__name__}: {reason}"
        raise EditError(reason) from error


def _in_scheduler(error: BaseException) -> bool:
    """Whether an error comes out of a scheduler of diffusers."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "schedulers" in Path(trace.tb_frame.f_code.co_filename).parts


def _rows(values: list[Any]) -> Any:
    """One for each row; alone where there is one, since not every pipeline takes lists."""
    return values if len(values) > 1 else values[0]


def shown(call: PipelineCall, job: Any, rows: int = 1) -> dict[str, Any]:
    """Opened pictures by argument. A list is taken for pictures of one row where the call knows several."""
    from edit_cli.generation.cutout import open_rgb

    opened: dict[str, Any] = {}
    for name in PICTURES:
        value, argument = getattr(job, name, None), call.argument(name)
        if not value or argument is None:
            continue
        files = value if isinstance(value, tuple) else (value,)
        made = [open_rgb(file, f"--{name.replace('_', '-')}") for file in files]
        opened[argument] = made * rows if len(made) == 1 and rows > 1 else made
        if len(opened[argument]) == 1 and not argument.endswith("video"):
            opened[argument] = made[0]
    return opened


@contextmanager
def timed_parts(pipe: Any, clock: StageClock, device: str, seen: Seen) -> Iterator[None]:
    """Split one pipeline call into text, decode, and the rest: denoise. Waits for the GPU between.

    seen: looks at what goes in and out of these.
    """
    from edit_cli.generation.result import waiter

    inner = clock.seconds["text"] + clock.seconds["decode"]
    start, wait = time.perf_counter(), waiter(device)
    places = (
        (pipe, "encode_prompt", "text"),
        (getattr(pipe, "vae", None), "encode", "text"),
        (getattr(pipe, "vae", None), "decode", "decode"),
        (getattr(pipe, "image_processor", None), "postprocess", "decode"),
        (getattr(pipe, "video_processor", None), "postprocess_video", "decode"),
    )
    parts = [place for place in places if hasattr(place[0], place[1])]

    def is_tuple(made: Any) -> bool:
        return isinstance(made, tuple) and bool(made)

    def timed(function: Any, stage: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait()
            with clock.stage(stage, device):
                made = function(*args, **kwargs)
                if stage == "decode":
                    seen.values([*args[:1], getattr(made, "sample", made[0] if is_tuple(made) else None)])
                elif is_tuple(made) and getattr(made[0], "ndim", 0) == 3:
                    seen.encoded = max(seen.encoded or 0, made[0].shape[1])
                return made

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


def steps_taken(steps: int, strength: float | None) -> int:
    """Denoising steps that are run of so many when a start picture is left this far."""
    return steps if strength is None else steps - int(max(steps - min(steps * strength, steps), 0))


def settled_strength(given: Mapping[str, Any], call: PipelineCall, steps: int) -> float | None:
    """How far the start picture is left. Raises EditError where no step would be left to run."""
    if call.argument("strength") is None:
        return None
    strength = float(given.get("strength") or call.default("strength") or DEFAULT_STRENGTH)
    if steps_taken(steps, strength) < 1:
        raise EditError(f"--strength {strength:g} of {steps} steps leaves no step to run; raise either")
    return strength


STRETCH = 1.02
"""A picture whose shape is changed by more than this ratio looks stretched."""


def stretched(
    given: Mapping[str, Any], call: PipelineCall, width: int | None, height: int | None
) -> list[str]:
    """What to say of pictures that a pipeline brings to its own shape. Width, height: px of the result."""
    whole = call.argument("strength") or GIVES.get(call.gives) == "video"
    if not (width and height and whole and call.argument("width")):
        return []
    from PIL import Image

    notes = []
    for name in PICTURES:
        for file in given.get(name) or () if name == "image" else filter(None, [given.get(name)]):
            with warnings.catch_warnings():  # of large pictures, which are read all the same
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                picture = Image.open(file)
            with picture:
                turned = picture.getexif().get(EXIF_ORIENTATION, 1) > 4
                wide, high = picture.size[::-1] if turned else picture.size
            ratio = wide / high / (width / height)
            if max(ratio, 1 / ratio) > STRETCH:
                label = f"--{name.replace('_', '-')}"
                notes.append(
                    f"{label} {file!r} has {wide}x{high} px and is stretched to {width}x{height}; crop it, "
                    "or give a --width and --height of its shape"
                )
    return notes
