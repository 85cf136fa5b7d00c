"""Options of `edit generate-3d` that `edit generate` does not have, or words differently."""

from __future__ import annotations

from typing import Annotated

import typer

from backbones.registry import DEFAULT_MODELS
from edit_cli.generate.mesh_files import MESH_SUFFIXES
from edit_cli.generate.mesh_plan import BACKGROUNDS, DECODES, OFFLOADS, VIEWS
from edit_cli.options import MACHINE, MODEL, OUTPUT

MESH = "Mesh"

Images = Annotated[
    list[str] | None,
    typer.Argument(metavar="IMAGE...", help="Pictures of one object each; several give several meshes."),
]


def _text(panel: str, *names: str, metavar: str, help: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)
    return option


Seed = Annotated[
    list[str] | None, _text(MESH, "--seed", "-s", metavar="N...", help="One or more seeds. [dim]default 0[/]")
]
Steps = Annotated[
    str | None, _text(MESH, "--steps", "--num-inference-steps", metavar="N", help="Denoising steps.")
]
Guidance = Annotated[
    str | None, _text(MESH, "--guidance", "--guidance-scale", metavar="X", help="Guidance scale.")
]
Resolution = Annotated[
    str | None, _text(MESH, "--octree-resolution", metavar="N", help="Grid cells per axis, 8 to 1024.")
]
Decode = Annotated[
    str | None,
    _text(
        MESH, "--decode", metavar="HOW",
        help=f"{', '.join(DECODES)}: everywhere, or only near the surface with the same mesh. "
        "[dim]default auto[/]",
    ),
]  # fmt: skip
Faces = Annotated[str | None, _text(MESH, "--faces", metavar="N", help="Simplify to at most N triangles.")]
RemoveBackground = Annotated[
    str | None,
    _text(
        MESH, "--remove-background", metavar="HOW",
        help=f"{', '.join(BACKGROUNDS)}: alpha if there is any, plain colours by flood fill, the rest by "
        "rembg if installed. [dim]default auto[/]",
    ),
]  # fmt: skip
Views = Annotated[
    list[str] | None,
    _text(
        MESH, "--views", metavar="NAME...",
        help=f"The pictures are views of one object: {', '.join(VIEWS)}, in their order (multi-view models).",
    ),
]  # fmt: skip
Replay = Annotated[
    str | None,
    _text(MESH, "--from", metavar="GLB", help="Repeat a .glb made by edit; other options change it."),
]

Model = Annotated[
    str | None,
    _text(
        MODEL, "--model", "-m", metavar="MODEL",
        help=f"Registry name (edit models), folder or hub id. [dim]default {DEFAULT_MODELS['mesh']}[/]",
    ),
]  # fmt: skip
Budget = Annotated[
    str | None,
    _text(
        MODEL, "--budget", "-b", metavar="X",
        help="Share of the dense FLOPs to spend, 0 < X <= 1. [dim]default: what the routers recommend[/]",
    ),
]  # fmt: skip

Output = Annotated[
    str | None,
    _text(
        OUTPUT, "--output", "-o", metavar="PATH",
        help=f"File ({' '.join(MESH_SUFFIXES)}), folder, or template with {{prompt}} (the picture's name) "
        "{seed} {index} {budget} {model}. [dim]default: named after the picture[/]",
    ),
]  # fmt: skip
Format = Annotated[
    str | None,
    _text(
        OUTPUT, "--format", metavar="NAME",
        help=f"{', '.join(s[1:] for s in MESH_SUFFIXES)}, where --output names none. [dim]default glb[/]",
    ),
]  # fmt: skip
Preview = Annotated[
    str | None,
    _text(
        OUTPUT, "--preview", metavar="PNG",
        help="Also write a lit turntable picture of the mesh (file or folder).",
    ),
]  # fmt: skip
Compare = Annotated[
    bool,
    typer.Option(
        "--compare", metavar="",
        help="Also make the dense mesh with the same seed: Chamfer distance, F-score, volume IoU, seconds.",
        rich_help_panel=OUTPUT,
    ),
]  # fmt: skip
Offload = Annotated[
    str | None,
    _text(MACHINE, "--offload", metavar="HOW", help=f"Keep weights off the GPU: {', '.join(OFFLOADS)}."),
]
