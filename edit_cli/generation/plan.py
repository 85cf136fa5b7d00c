"""From a request to what will be done: model, routers, one job per result, output paths. Torch-free.

A value comes from, in rising order: the model's defaults, a replayed record, the command line, a line of an
input list. Everything that can be wrong with the input is found here, before anything is loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backbones import registry
from backbones.quantise import check_quantise
from backbones.spec import Backbone, Makes, Placement
from edit_cli import checks
from edit_cli.errors import EditError, bad_input
from edit_cli.generation.medium import Fields, Job, Medium
from edit_cli.generation.outputs import Output, plan_outputs
from edit_cli.generation.routers import DEFAULT_ROUTERS, NO_ROUTERS, find_routers
from edit_cli.generation.sound import SOUND
from edit_cli.generation.video import VIDEO
from edit_cli.request import Request

PROMPTED: Mapping[Makes, Medium] = {"video": VIDEO, "sound": SOUND}
"""What `edit generate` makes besides pictures."""
SHORT = 40
"""Characters of a title that leave room in a file's name for a budget."""
SAME_RESULT = (
    "replay", "output", "format", "preview", "compare", "dry_run", "json", "quiet", "force", "device",
    "dtype", "offload", "compile", "batch_size", "verbose", "gallery", "open", "overwrite", "resume",
    "engine", "workers", "fit",
)  # fmt: skip
"""Options beside which a replayed record counts as unchanged; where it runs is noted on its own."""
OTHER_WAY = (
    "steps", "budget", "time", "target", "solver", "strength", "model", "routers", "image", "prompts_file",
)  # fmt: skip
"""Options beside which a recorded plan, chosen while it ran, is not followed again."""


@dataclass(frozen=True)
class Plan:
    """Everything a run needs. routers: a bundle or a checkpoint of the paper's, or None for the dense model.

    force: accept routers that were fitted on other weights of the same architecture. compare: what with, if
    anything: "dense", or with both that and "exact".
    replayed: the record that is replayed unchanged, else None; peers: the batch that it came from.
    free: paths whose names are ours, so that a number may be added. overwrite: other paths may be replaced.
    resume: what is there already is not made again. preview: where to show a picture under way. observe: the
    bundle to make of the first result's run.
    """

    medium: Medium
    backbone: Backbone
    routers: Path | None
    placement: Placement
    jobs: tuple[Job, ...]
    batch_size: int
    force: bool = False
    compare: str = ""
    replayed: Mapping[str, Any] | None = None
    peers: tuple[Job, ...] = ()
    warnings: tuple[str, ...] = ()
    free: frozenset[Path] = frozenset()
    overwrite: bool = False
    resume: bool = False
    preview: Path | None = None
    observe: Path | None = None

    def group(self, job: Job) -> tuple[Any, ...]:
        """Jobs with equal groups may share a batch: these fields exist once per pipeline call."""
        single = ("index", "path", *self.medium.beside, *self.medium.per_row)
        return tuple(value for name, value in vars(job).items() if name not in single)

    def batches(
        self, shares: Callable[[Job], bool] = lambda _: False
    ) -> Iterator[tuple[tuple[Job, ...], Sequence[int]]]:
        """Jobs that run together, in order, and which of them are results. shares: whether a job goes with
        others of other budgets.

        A replayed result runs in the batch that it came from: rounding depends on the batch's size.
        """
        if self.peers:
            assert self.replayed is not None
            own = self.jobs[0].budget
            peers = tuple(replace(job, budget=job.budget or own) for job in self.peers)
            yield peers, [int(self.replayed["row"])]
            return
        groups: dict[Any, list[Job]] = {}
        for job in self.jobs:
            alike = replace(job, budget=None) if shares(job) else job
            groups.setdefault(self.group(alike), []).append(job)
        for jobs in groups.values():
            for start in range(0, len(jobs), self.batch_size):
                batch = tuple(jobs[start : start + self.batch_size])
                yield batch, range(len(batch))


def make_plan(request: Request, medium: Medium, *, kept: bool = True, listed: Sequence[Fields] = ()) -> Plan:
    """Check everything that was asked. Raises EditError, ModelError; reads files but writes none.

    kept: whether results become files; otherwise jobs have no paths. listed: what is made besides, each with
    fields of its own, as lines of a list have.
    """
    record = medium.read_record(request["replay"]) if "replay" in request else {}
    base = request.get("base") or (None if "model" in request else record.get("model_base"))
    backbone = registry.resolve(request.get("model") or record.get("model_source"), base, medium.makes)
    named = NO_ROUTERS if "observe" in request else record.get("routers") or DEFAULT_ROUTERS
    routers = find_routers(request.get("routers") or named, backbone)
    medium = PROMPTED.get(backbone.family.makes, medium)
    placement = _placement(request, record, backbone)
    warnings: list[str] = []
    fields, names = _fields(_requests(request, record, medium, listed), backbone, medium, warnings)
    free = _add_paths(fields, names, request, medium) if kept else frozenset()
    jobs = []
    for each in fields:
        jobs.append(medium.job(**each))
    if "compare" in request:
        _check_comparisons(jobs, medium, request["compare"])
    if record.get("turns") and not set(request) & set(OTHER_WAY):
        turns = _turns(request["replay"], record["turns"], min(job.denoising_steps for job in jobs))
        jobs = [replace(job, turns=turns) for job in jobs]
    replayed = record if record and not set(request) - set(SAME_RESULT) else None
    rows = () if replayed is None or len(jobs) > 1 else replayed.get("batch", ())
    return Plan(
        medium=medium,
        backbone=backbone,
        routers=routers,
        placement=placement,
        jobs=tuple(jobs),
        batch_size=request.get("batch_size", backbone.batch_size),
        force="force" in request or bool(record.get("force")),
        compare=request.get("compare", ""),
        replayed=replayed,
        peers=tuple(replace(jobs[0], **medium.peer(row), budget=row.get("budget")) for row in rows)
        if len(rows) > 1
        else (),
        warnings=tuple(dict.fromkeys(warnings)),
        free=free,
        overwrite="overwrite" in request,
        resume="resume" in request,
        preview=_preview(request, medium, jobs),
        observe=_observe(request, jobs),
    )


def _turns(file: str, recorded: Any, steps: int) -> tuple[tuple[int, int], ...]:
    """How a recorded plan came about. Raises EditError for anything else."""
    try:
        turns = tuple((int(made), int(evaluations)) for made, evaluations in recorded)
        if not 0 < len(turns) <= steps or not all(0 <= i < steps and 1 <= n <= steps for i, n in turns):
            raise ValueError
    except (TypeError, ValueError):
        raise EditError(
            f"--from {file}: turns are not those of a plan; give --budget to replace them"
        ) from None
    return turns


def _observe(request: Request, jobs: Sequence[Job]) -> Path | None:
    """The bundle that a run of all steps becomes. Raises EditError for what it cannot go together with."""
    if "observe" not in request:
        return None
    if request.get("routers", NO_ROUTERS) != NO_ROUTERS:
        raise EditError("--observe makes a bundle and --routers uses one; leave one of them out")
    for name, wrong in (
        ("--time", any(job.time is not None for job in jobs)),
        ("--solver", any(job.solver for job in jobs)),
        ("--target exact", any(job.target == "exact" for job in jobs)),
        ("--engine ray", request.get("engine") == "ray"),
        ("several processes", "WORLD_SIZE" in os.environ),
    ):
        if wrong:
            raise EditError(f"--observe learns from the pipeline's own run, in one process: not with {name}")
    return Path(request["observe"]).expanduser()


PREVIEW_MARK = "preview by edit"
"""What such a picture says of itself, so that it may be replaced."""


def _preview(request: Request, medium: Medium, jobs: Sequence[Job]) -> Path | None:
    """Where a picture under way is shown; meshes have a preview beside them instead. Raises EditError."""
    if "preview" not in request or "preview" in medium.beside:
        return None
    if medium.makes != "picture":
        raise EditError(f"--preview is for pictures and this model makes {medium.things}; leave it out")
    file = Path(request["preview"]).expanduser()
    mine = not file.exists() or "overwrite" in request or PREVIEW_MARK.encode() in file.read_bytes()
    if not mine or file in [job.path for job in jobs]:
        raise EditError(f"--preview would replace {str(file)!r}, which is another file; give another name")
    return file


def _requests(
    request: Request, record: Mapping[str, Any], medium: Medium, listed: Sequence[Fields]
) -> list[Fields]:
    """Fields of every result: one for each entry and seed, a seed s giving s, s + 1 ... s + count - 1."""
    subjects = request.get(medium.subject, [])
    entries = [{medium.subject: subject} for subject in subjects]
    if subjects and medium.joined_by in request:
        entries = [{medium.subject: subjects}]
    entries += listed
    if medium.list_option in request:
        from edit_cli.generation.prompts import read_lines

        entries += read_lines(request[medium.list_option], medium)
    typed = {name: request[name] for name in medium.options if name in request}
    requests = []
    for entry in entries or [{}]:
        fields = _recorded({**typed, **entry}, record, request, medium)
        if medium.subject not in fields:
            raise EditError(medium.missing)
        starts = fields.get("seed", 0)
        starts = starts if isinstance(starts, list) else [starts]
        seeds = [start + i for start in starts for i in range(request.get("count", 1))]
        repeated = [seed for seed, count in Counter(seeds).items() if count > 1]
        if repeated:
            raise EditError(
                f"--seed {repeated[0]} would be used twice; give distinct seeds, at least -n apart"
            )
        budgets = fields.get("budget")
        budgets = budgets if isinstance(budgets, list) else [budgets]
        if len(set(budgets)) < len(budgets):
            raise EditError("--budget is given the same value twice; give distinct budgets")
        output = {"output": entry.get("output"), "sweep": len(budgets) > 1}
        requests += [
            {**fields, **output, "seed": seed, "budget": budget} for seed in seeds for budget in budgets
        ]
    return requests


def _recorded(given: Fields, record: Mapping[str, Any], request: Request, medium: Medium) -> Fields:
    """Fields with those of a replayed record, where nothing else was said.

    What is given wins before anything recorded is looked at: that may name files of another machine.
    """
    fields = dict(given)
    for name, option in medium.options.items() if record else ():
        value = record.get(medium.recorded_as.get(name, name))
        if name not in given and value not in (None, []):
            fields[name] = option.value(f"--from {request['replay']}: {name}", value)
    return fields


def _fields(
    requests: Sequence[Fields], backbone: Backbone, medium: Medium, warnings: list[str]
) -> tuple[list[Fields], list[Fields]]:
    """Fields of a job for every result, yet without its path; and what its path may be made of."""
    jobs: list[Fields] = []
    names: list[Fields] = []
    for index, fields in enumerate(requests):
        common = {
            "index": index,
            "path": Path(),
            "seed": fields["seed"],
            "steps": fields.get("steps", backbone.defaults.steps),
            "guidance": fields.get("guidance", backbone.defaults.guidance),
            "budget": fields.get("budget"),
            "solver": fields.get("solver"),
            "target": fields.get("target"),
            "time": fields.get("time"),
        }
        if fields.get("guidance") and not backbone.takes_guidance:
            warnings.append(f"{backbone.name} has no guidance embedding: --guidance has no effect")
        jobs.append({**common, **medium.complete({**fields, **common}, backbone, warnings)})
        budget = "auto" if common["budget"] is None else f"{common['budget']:g}"
        model, title = backbone.name.replace("/", "-"), medium.title(jobs[-1])
        name = {"prompt": title, "budget": budget, "model": model, "output": fields["output"]}
        name["sweep"] = fields["sweep"]
        names.append({**common, **medium.placeholders, **name})
    return jobs, names


def _add_paths(jobs: list[Fields], names: list[Fields], request: Request, medium: Medium) -> frozenset[Path]:
    """Where every result goes, and what is written beside it; returns paths named by us. Raises EditError."""
    first = f".{request['format']}" if "format" in request else medium.suffixes[0]
    for name in names:
        if name["sweep"] and "{" not in str(name["output"] or request.get("output")):
            name["prompt"] = f"{name['prompt'][:SHORT]} budget {100 * float(name['budget']):g}"
    outputs = plan_outputs(request.get("output"), names, tuple(dict.fromkeys((first, *medium.suffixes))))
    places: list[Output] = [*outputs]
    for job, name, (path, _) in zip(jobs, names, outputs, strict=True):
        medium.check_path(path)
        job["path"], name["prompt"], name["output"] = path, path.stem, None
        if "format" in request and path.suffix.lower() != first:
            raise EditError(
                f"--output {str(path)!r} and --format {request['format']} disagree; leave one out"
            )
    for option, suffixes in medium.beside.items():
        if option in request:
            beside = plan_outputs(request[option], names, suffixes, f"--{option}")
            places += beside
            for job, place in zip(jobs, beside, strict=True):
                job[option] = place.path
    return frozenset(place.path for place in places if place.free)


def _check_comparisons(jobs: Sequence[Job], medium: Medium, compare: str) -> None:
    """What --compare writes may replace neither each other nor a result."""
    taken = {path for job in jobs for path in (job.path, *side_files(job, medium).values())}
    for job in jobs:
        path = medium.comparison_path(job.path, compare)
        if path in taken or path.is_dir():
            raise EditError(
                f"--compare would write {str(path)!r} over another file; give other names with --output"
            )
        taken.add(path)


def side_files(job: Job, medium: Medium) -> dict[str, Path]:
    """What is written beside a result, by the option that asks for it."""
    paths = {name: getattr(job, name) for name in medium.beside}
    return {name: path for name, path in paths.items() if path is not None}


def _placement(request: Request, record: Mapping[str, Any], backbone: Backbone) -> Placement:
    """Where it runs: as typed, else as a replayed record says."""
    offload, allowed = request.get("offload", "none"), backbone.family.offloads
    if offload not in allowed:
        raise EditError(
            f"--offload {offload!r} is not for {backbone.family.name}; allowed are {', '.join(allowed)}"
        )
    loras = request.get("lora")
    if loras is None:
        where = f"--from {request.get('replay')}: lora"
        loras = [checks.lora(where, text) for text in record.get("loras") or ()]
    quantize = request.get("quantize") or record.get("quantize") or ""
    if quantize:
        with bad_input():
            check_quantise(quantize, backbone)
    return Placement(
        device=request.get("device") or record.get("device") or "auto",
        dtype=request.get("dtype") or record.get("dtype") or "auto",
        offload=offload,
        compile="compile" in request or bool(record.get("compile")),
        quantize=quantize,
        vae_tiling="vae_tiling" in request or bool(record.get("vae_tiling")),
        loras=tuple(lora for lora in loras if lora is not None),
    )
