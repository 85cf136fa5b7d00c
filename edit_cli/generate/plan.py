"""From what was asked to what will be done: model, routers, one job per picture, output paths. Torch-free.

A value comes from, in rising order: the model's defaults, a replayed picture, the command line, a line of
the prompt file. Everything that can be wrong with the input is found here, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backbones import registry
from backbones.model_files import ModelError
from backbones.spec import OFFLOADS, Backbone, Lora, Placement
from edit_cli import checks as values
from edit_cli.errors import EditError, bad_input
from edit_cli.generate import metadata
from edit_cli.generate import routers as choices
from edit_cli.generate.outputs import comparison_path, plan_outputs
from edit_cli.generate.prompts import read_prompts


@dataclass(frozen=True)
class Asked:
    """What was typed, before any check; None: not given. Names follow the options of `edit generate`."""

    prompts: tuple[str, ...] = ()
    prompts_file: str | None = None
    replay: str | None = None
    model: str | None = None
    base: str | None = None
    routers: str | None = None
    budget: str | None = None
    steps: str | None = None
    guidance: str | None = None
    negative_prompt: str | None = None
    seeds: tuple[str, ...] = ()
    num_images: str | None = None
    batch_size: str | None = None
    width: str | None = None
    height: str | None = None
    image: str | None = None
    strength: str | None = None
    solver: str | None = None
    output: str | None = None
    device: str | None = None
    dtype: str | None = None
    offload: str | None = None
    loras: tuple[str, ...] = ()
    compile: bool = False
    force: bool = False
    compare: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Job:
    """One picture to make. budget, solver None: what the routers recommend, the model's own. Sizes in px."""

    index: int
    path: Path
    prompt: str
    negative_prompt: str | None
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    budget: float | None
    image: str | None = None
    strength: float | None = None
    solver: str | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """Jobs with equal groups may share a batch: these arguments exist once per pipeline call."""
        return (
            self.width, self.height, self.steps, self.guidance, self.budget, self.image, self.strength,
            self.solver,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Everything a run needs. routers: a bundle or release file, or None for the dense model.

    force: accept routers that were fitted on other weights of the same architecture.
    replayed: the record of the picture that is replayed unchanged, else None.
    """

    backbone: Backbone
    routers: Path | None
    placement: Placement
    jobs: tuple[Job, ...]
    batch_size: int
    force: bool = False
    replayed: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def batches(self) -> Iterator[tuple[Job, ...]]:
        """Jobs that run together, in order."""
        groups: dict[Any, list[Job]] = {}
        for job in self.jobs:
            groups.setdefault(job.group, []).append(job)
        for jobs in groups.values():
            for start in range(0, len(jobs), self.batch_size):
                yield tuple(jobs[start : start + self.batch_size])


def make_plan(asked: Asked) -> Plan:
    """Check everything that was asked. Raises EditError; reads files but writes none."""
    record = metadata.read(asked.replay) if asked.replay is not None else {}
    typed = _typed_fields(asked)
    base_model = asked.base or (None if asked.model else record.get("model_base"))
    with bad_input(ModelError):
        backbone = registry.resolve(asked.model or record.get("model_source"), base_model, "picture")
    routers = choices.find_routers(
        asked.routers or record.get("routers") or choices.DEFAULT_ROUTERS, backbone
    )
    recorded = {name: record.get(name) for name in values.FIELDS if name != "output"}
    base = {**values.checked(recorded, f"--from {asked.replay}: {{}}"), **typed}
    requests = [request for entry in _entries(asked, base) for request in _repeat(asked, base, entry)]
    warnings: list[str] = []
    jobs = _jobs(requests, asked.output, backbone, warnings)
    if asked.compare:
        _check_comparisons(jobs)
    if routers is None:
        warnings += choices.check_dense([job.budget for job in jobs], backbone, asked.dry_run)
    changes = (
        typed, asked.prompts, asked.prompts_file, asked.num_images, asked.model, asked.base, asked.routers,
        asked.loras,
    )  # fmt: skip
    return Plan(
        backbone=backbone,
        routers=routers,
        placement=_placement(asked, record),
        jobs=tuple(jobs),
        batch_size=_count("--batch-size", asked.batch_size, backbone.batch_size),
        force=asked.force or bool(record.get("force")),
        replayed=None if any(changes) or not record else record,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _check_comparisons(jobs: Sequence[Job]) -> None:
    """The side-by-side pictures of --compare may replace neither each other nor a result."""
    taken = {job.path for job in jobs}
    for job in jobs:
        path = comparison_path(job.path)
        if path in taken or path.is_dir():
            raise EditError(
                f"--compare would write {str(path)!r} over another file; give other names with --output"
            )
        taken.add(path)


def _typed_fields(asked: Asked) -> dict[str, Any]:
    typed = {
        "budget": asked.budget,
        "steps": asked.steps,
        "guidance": asked.guidance,
        "negative_prompt": asked.negative_prompt,
        "seed": asked.seeds[0] if asked.seeds else None,
        "width": asked.width,
        "height": asked.height,
        "image": asked.image,
        "strength": asked.strength,
        "solver": asked.solver,
    }
    return values.checked(typed, "--{}")


def _entries(asked: Asked, base: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [{"prompt": values.prompt("PROMPT", p)} for p in asked.prompts]
    if asked.prompts_file is not None:
        entries += read_prompts(asked.prompts_file)
    if entries:
        return entries
    if "prompt" not in base:
        raise EditError('no prompt given; try: edit generate "a cat", or --prompts FILE')
    return [{}]


def _repeat(asked: Asked, base: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """One request per seed and image: each seed s gives s, s+1 ... s+n-1. A prompt line's own seed wins."""
    count = _count("--num-images", asked.num_images, 1)
    typed = [values.seed("--seed", s) for s in asked.seeds]
    starts = [entry["seed"]] if "seed" in entry else typed or [base.get("seed", 0)]
    seeds = [start + i for start in starts for i in range(count)]
    choices.distinct_seeds(seeds, ", at least -n apart")
    return [{**base, **entry, "seed": s} for s in seeds]


def _count(where: str, value: str | None, default: int) -> int:
    return default if value is None else values.integer(where, value, 1, 100_000)


def _jobs(
    requests: list[dict[str, Any]], output: str | None, backbone: Backbone, warnings: list[str]
) -> list[Job]:
    finished = [_complete(request, backbone, warnings) for request in requests]
    budgets = ("auto" if f["budget"] is None else f"{f['budget']:g}" for f in finished)
    names = [
        {
            **f,
            "index": i,
            "budget": budget,
            "model": backbone.name.replace("/", "-"),
            "output": r.get("output"),
        }
        for i, (f, r, budget) in enumerate(zip(finished, requests, budgets, strict=True))
    ]
    paths = plan_outputs(output, names)
    return [Job(index=i, path=path, **f) for i, (f, path) in enumerate(zip(finished, paths, strict=True))]


def _complete(request: Mapping[str, Any], backbone: Backbone, warnings: list[str]) -> dict[str, Any]:
    """Fill in the model's defaults and check what depends on the model."""
    family, base = backbone.family, backbone.defaults
    done = {
        "prompt": values.prompt("PROMPT", request["prompt"]),
        "negative_prompt": request.get("negative_prompt"),
        "seed": request["seed"],
        "width": request.get("width", base.width),
        "height": request.get("height", base.height),
        "steps": request.get("steps", base.steps),
        "guidance": request.get("guidance", base.guidance),
        "budget": request.get("budget"),
        "image": request.get("image"),
        "strength": request.get("strength"),
        "solver": request.get("solver"),
    }
    for name in ("width", "height"):
        values.divisible(f"--{name}", done[name], backbone.size_multiple)
    if family.negative_prompt is None and done["negative_prompt"]:
        raise EditError(f"{family.name} takes no --negative-prompt: its guidance is distilled; leave it out")
    if family.negative_prompt is not None and done["guidance"] > 1:
        done["negative_prompt"] = done["negative_prompt"] or family.negative_prompt
    elif done["negative_prompt"]:
        warnings.append(
            f"the negative prompt has no effect at guidance {done['guidance']:g}; use more than 1"
        )
    if "guidance" in request and request["guidance"] and not backbone.takes_guidance:
        warnings.append(f"{backbone.name} has no guidance embedding: --guidance has no effect")
    if done["image"] is not None:
        if family.image_to_image_class is None:
            raise EditError(f"{family.name} offers no image-to-image; leave --image out")
        done["strength"] = done["strength"] or values.DEFAULT_STRENGTH
    elif done["strength"] is not None:
        raise EditError("--strength is for image-to-image; give --image FILE too")
    return done


def _placement(asked: Asked, record: Mapping[str, Any]) -> Placement:
    return replace(
        choices.placement(asked, record, OFFLOADS),
        compile=asked.compile or bool(record.get("compile")),
        loras=tuple(_lora(text) for text in asked.loras or record.get("loras") or ()),
    )


def _lora(text: str) -> Lora:
    """PATH or PATH:SCALE; a path that itself holds a colon is tried first."""
    path, scale = Path(text).expanduser(), 1.0
    if not path.exists() and ":" in text:
        name, _, number = text.rpartition(":")
        path = Path(name).expanduser()
        scale = values.number(f"--lora {text!r}: scale", number, "write --lora FILE:0.8")
    if not path.exists():
        raise EditError(f"--lora {str(path)!r} does not exist; give a .safetensors file, or FILE:SCALE")
    if path.is_file() and path.suffix != ".safetensors":
        raise EditError(f"--lora {str(path)!r} is no .safetensors file; other formats are not loaded")
    return replace(Lora(path.resolve()), scale=scale)
