"""A `Family` for every pipeline class of diffusers that has a transformer. Torch-free.

A folder is recognised by what its `model_index.json` names, and nothing in the folder is ever run: classes
come from diffusers and transformers alone. Where a family was described by hand for the same transformer, the
pipeline is one of that family under another class name; for the rest, defaults come from the call's own
signature, and the blocks are described once the model is loaded (describe.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from backbones.model_files import ModelError
from backbones.pipeline_call import GIVES, PipelineCall, known_call, libraries, pipeline_call
from backbones.spec import DIFFUSERS, CallSize, Config, Configs, Defaults, Family, Makes, Traits
from routers.spec import TransformerSpec

STEPS = 50
"""Where neither a folder nor a signature says how many."""


def pipeline_family(index: Config, families: Iterable[Family], where: str) -> Family:
    """The family of what a `model_index.json` names. Raises ModelError."""
    name, entry = index.get("_class_name"), index.get("transformer")
    what = f"{where!r} holds {name}" if name else f"{where!r} does not say what it holds"
    transformer = entry[-1] if isinstance(entry, list) and isinstance(entry[-1], str) else None
    family = next((f for f in families if f.transformer.transformer_class == transformer), None)
    described = family is not None and family.pipeline_class == name  # its source need not be read
    call = pipeline_call(name) if isinstance(name, str) and not described else None
    if call is None and not described:
        raise ModelError(f"{what}, which `edit` cannot run: it is not a pipeline of the installed diffusers")
    if transformer is None:
        raise ModelError(f"{what}, which `edit` cannot run: it has no diffusion transformer")
    for component, value in index.items():
        if isinstance(value, list) and value[0] is not None and value[0] not in libraries():
            raise ModelError(
                f"{what}, whose {component} is of {value[0]!r}: classes are taken from diffusers and "
                "transformers only"
            )
    if family is not None:
        return family if call is None else sibling(family, call.pipeline)
    assert call is not None
    if call.gives not in GIVES:
        raise ModelError(f"{what}, which `edit` cannot run: what it gives is not known")
    return generic_family(
        call.pipeline, transformer, call.pipeline.removesuffix("Pipeline"), GIVES[call.gives]
    )


@functools.cache
def sibling(family: Family, pipeline: str) -> Family:
    """Another pipeline class around a family's transformer: Kontext, Fill, ControlNet, image-to-image."""

    def traits(configs: Configs) -> Traits:
        known = family.traits(configs)
        call = known_call(pipeline)
        longest = known.defaults.max_sequence_length if call.argument("max_sequence_length") else None
        return replace(known, defaults=replace(signature_defaults(call), max_sequence_length=longest))

    return replace(family, pipeline_class=pipeline, traits=traits, single_files=())


@functools.cache
def generic_family(pipeline: str, transformer: str, name: str, makes: Makes) -> Family:
    """A pipeline class that nothing was written for. name: for people."""

    def traits(_configs: Configs) -> Traits:
        call = known_call(pipeline)
        return Traits(
            signature_defaults(call),
            guided=any(name.startswith("negative_prompt") for name in call.defaults),
            takes_guidance=call.guidance is not None,
        )

    return Family(
        name=name,
        makes=makes,
        transformer=TransformerSpec(transformer_class=transformer, blocks=()),
        traits=traits,
        call_inputs=_guessed,
        text_tokens=lambda _prompt, limit: limit or known_call(pipeline).default("max_sequence_length") or 0,
        pipeline_class=pipeline,
        layout=DIFFUSERS,
        negative_prompt="",
    )


def signature_defaults(call: PipelineCall) -> Defaults:
    """What a call uses when it is told nothing; None where that is not a plain value."""
    plain = {name: call.default(name) for name in ("width", "height", "frames", "fps", "seconds")}
    scale = call.defaults.get(call.guidance or "")
    return Defaults(
        steps=call.default("steps") or STEPS,
        guidance=1.0 if scale is None else float(scale),
        **{name: value for name, value in plain.items() if value is not None},
    )


def _guessed(configs: Configs, size: CallSize) -> dict[str, Any]:
    from backbones.describe import guessed_call  # brings torch

    return guessed_call(configs, size)
