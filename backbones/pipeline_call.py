"""What the pipelines of diffusers are called with and give, read from their source. Torch-free.

Nothing is imported and nothing is run: a class name is looked up in the installed diffusers and nowhere else,
so a plan can refuse what a pipeline does not take before anything is loaded.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbones.model_files import ModelError
from backbones.spec import Makes

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "negative_prompt": ("negative_prompt",),
    "image": ("image", "images", "video"),
    "mask": ("mask_image", "mask", "mask_video"),
    "control_image": ("control_image", "control_video"),
    "strength": ("strength",),
    "width": ("width",),
    "height": ("height",),
    "steps": ("num_inference_steps",),
    "frames": ("num_frames", "video_length"),
    "fps": ("frame_rate", "fps"),
    "seconds": ("audio_end_in_s", "audio_duration", "audio_duration_s", "duration"),
    "max_sequence_length": ("max_sequence_length",),
}
"""What `edit` can ask for, and what the calls of pipelines call it: the first that a call takes."""

GUIDANCE = ("guidance_scale", "true_cfg_scale")
"""The first whose default is a number that guides: 1 is off, and None is for distilled checkpoints."""

GIVES: Mapping[str, Makes] = {
    "images": "picture", "image": "picture", "frames": "video", "video": "video", "audios": "sound",
}  # fmt: skip
"""Fields of the results of pipelines."""

VARIANTS = ("", "Img2Img", "Inpaint")
"""What diffusers adds to a pipeline's name where another takes pictures with the same components."""


@dataclass(frozen=True)
class PipelineCall:
    """The call of one pipeline class.

    pipeline: the class. defaults: its arguments, each with its default (None also where that is not a plain
    value). required: those without one. components: what it is made of, without those that may be absent.
    gives: the field of its result, "" if `edit` does not know it. lists: arguments that it takes lists for,
    though one value is enough.
    """

    pipeline: str
    defaults: Mapping[str, Any]
    required: tuple[str, ...]
    components: tuple[str, ...]
    gives: str
    lists: frozenset[str]

    def argument(self, name: str) -> str | None:
        """What the call calls something of ARGUMENTS; None if it does not take it."""
        return next((argument for argument in ARGUMENTS[name] if argument in self.defaults), None)

    def known(self) -> dict[str, str]:
        """Those of its arguments that `edit` knows, and what they are in ARGUMENTS."""
        return {argument: name for name in ARGUMENTS if (argument := self.argument(name)) is not None}

    def default(self, name: str) -> Any:
        """The call's own default for something of ARGUMENTS."""
        argument = self.argument(name)
        return None if argument is None else self.defaults[argument]

    @property
    def guidance(self) -> str | None:
        """The argument that `--guidance` sets."""
        taken = [name for name in GUIDANCE if name in self.defaults]
        taken.sort(key=lambda name: (self.defaults[name] is None, self.defaults[name] == 1))
        return next(iter(taken), None)


@functools.cache
def pipeline_call(pipeline: str) -> PipelineCall | None:
    """The call of a pipeline class of the installed diffusers; None if it has no such class."""
    methods = {name: method for owner in reversed(list(_lineage(pipeline))) for name, method in owner.items()}
    if "__call__" not in methods:
        return None
    call, init = methods["__call__"], methods.get("__init__")
    defaults, required = _parameters(call)
    components = () if init is None else tuple(_parameters(init)[1])
    named = [word.arg for node in ast.walk(call) if isinstance(node, ast.Return) for word in _keywords(node)]
    wrapped = {
        node.elts[0].id
        for node in ast.walk(call)
        if isinstance(node, ast.List) and len(node.elts) == 1 and isinstance(node.elts[0], ast.Name)
    }
    gives = next((name for name in named if name in GIVES), None) or ""
    return PipelineCall(
        pipeline, defaults, tuple(required), components, gives, frozenset(wrapped & set(defaults))
    )


def known_call(pipeline: str) -> PipelineCall:
    """The call of a class that is known to exist. Raises ModelError if the installed diffusers lacks it."""
    call = pipeline_call(pipeline)
    if call is None:
        raise ModelError(
            f"{pipeline} is not a pipeline of the installed diffusers; try: pip install -U diffusers"
        )
    return call


def variant(pipeline: str, wanted: tuple[str, ...]) -> PipelineCall:
    """The call that takes all that is wanted: the pipeline's own, or that of another class that diffusers
    builds from the same components (image-to-image, inpainting). Else its own.
    """
    own, stem = known_call(pipeline), pipeline.removesuffix("Pipeline")
    calls = (pipeline_call(f"{stem}{suffix}Pipeline") for suffix in VARIANTS)
    for call in calls:
        fits = call is not None and set(call.components) <= set(own.components)
        if fits and call is not None and all(call.argument(name) for name in wanted):
            return call
    return own


def libraries() -> frozenset[str]:
    """Where the components of a pipeline may come from: diffusers, its pipelines, transformers."""
    return frozenset({"diffusers", "transformers", *(path.name for path in _folder().iterdir())})


def _folder() -> Path:
    found = importlib.util.find_spec("diffusers")
    if found is None or found.origin is None:
        raise ModelError("diffusers is not installed; try: pip install diffusers")
    return Path(found.origin).parent / "pipelines"


@functools.cache
def _files() -> dict[str, Path]:
    """Pipeline class -> file."""
    found = {}
    for file in sorted(_folder().rglob("pipeline*.py")):
        for name in re.findall(r"^class (\w+Pipeline)\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = file
    return found


def _lineage(pipeline: str) -> Iterator[dict[str, ast.FunctionDef]]:
    """Methods of a class and of its bases, nearest first."""
    file = _files().get(pipeline)
    if file is None:
        return
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == pipeline)
    yield {node.name: node for node in body.body if isinstance(node, ast.FunctionDef)}
    for base in body.bases:
        if isinstance(base, ast.Name):
            yield from _lineage(base.id)


def _parameters(function: ast.FunctionDef) -> tuple[dict[str, Any], list[str]]:
    """Arguments with their defaults, and those without one; `self` left out."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)][1:]
    values: list[ast.expr | None] = [None] * (len(names) - len(given.defaults))
    pairs = [*zip(names, [*values, *given.defaults], strict=True)]
    pairs += [
        (argument.arg, value) for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    defaults = {name: None if value is None else _plain(value) for name, value in pairs}
    return defaults, [name for name, value in pairs if value is None]


def _plain(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:  # an expression
        return None


def _keywords(node: ast.Return) -> list[ast.keyword]:
    return node.value.keywords if isinstance(node.value, ast.Call) else []
