"""Options of `edit profile` that other commands do not have, or word differently."""

from __future__ import annotations

from typing import Annotated

import typer

from edit_cli.options import MODEL, OUTPUT, PICTURE
from edit_cli.profile.plan import CACHE_LIMIT_MIB, DENSE_METRICS, ELASTIC_METRICS, REPEATS, SAMPLES

MEASURE = "Measurement"


def _text(panel: str, *names: str, metavar: str, help: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)
    return option


Prompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROMPT...", help="What to draw; without any, the model's calibration prompts."),
]
Images = Annotated[
    list[str] | None,
    _text(PICTURE, "--images", metavar="FILE...", help="Pictures to make meshes of (image-to-mesh models)."),
]
Seed = Annotated[
    list[str] | None,
    _text(PICTURE, "--seed", "-s", metavar="N", help="Sample i starts from seed N + i. [dim]default 0[/]"),
]
Resolution = Annotated[
    str | None,
    _text(
        PICTURE, "--octree-resolution", metavar="N", help="Grid cells per axis (image-to-mesh models)."
    ),
]  # fmt: skip
Budgets = Annotated[
    list[str] | None,
    _text(
        MODEL, "--budget", "-b", metavar="X...",
        help="One or more budgets, shown side by side. [dim]default: what the routers recommend[/]",
    ),
]  # fmt: skip
Dense = Annotated[
    bool,
    typer.Option(
        "--dense", metavar="",
        help="No routers: map how little each block adds, how alike steps are, and what a skip costs.",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
Metric = Annotated[
    str | None,
    _text(
        MEASURE, "--metric", metavar="NAME",
        help=f"What the map shows: {', '.join(ELASTIC_METRICS)}; with --dense {', '.join(DENSE_METRICS)}. "
        "[dim]default: the first with anything to show[/]",
    ),
]  # fmt: skip
Samples = Annotated[
    str | None,
    _text(
        MEASURE, "--samples", metavar="N",
        help=f"Generations per run, prompts taken in turn. [dim]default: one per prompt, else {SAMPLES}[/]",
    ),
]  # fmt: skip
Repeats = Annotated[
    str | None,
    _text(
        MEASURE, "--repeats", metavar="N",
        help=f"Timed repeats after a warm-up; medians are shown. [dim]default {REPEATS}[/]",
    ),
]  # fmt: skip
CacheLimit = Annotated[
    str | None,
    _text(
        MEASURE, "--cache-limit", metavar="MIB",
        help=f"Warn about a feature cache above this. [dim]default {CACHE_LIMIT_MIB}[/]",
    ),
]  # fmt: skip
Output = Annotated[
    str | None,
    _text(
        OUTPUT, "--output", "-o", metavar="FOLDER",
        help="Write report.html, heatmap.png and .svg, trace.json and chrome-trace.json here.",
    ),
]  # fmt: skip
Replay = Annotated[
    str | None,
    _text(
        OUTPUT, "--from", metavar="TRACE",
        help="Show a trace.json written earlier again, with another --metric or as a new report.",
    ),
]  # fmt: skip
