"""`edit generate-3d`: pictures to meshes at a compute budget."""

from __future__ import annotations

from edit_cli.commands.generate import carry_out
from edit_cli.generation.mesh import MESH
from edit_cli.options import (
    DRY_RUN,
    IMAGES,
    KEEP,
    LEARN,
    MESH_MACHINE,
    MESH_MODEL,
    MESH_OUTPUT,
    OPEN,
    PRESET,
    REPORT,
    ROUTERS,
    SAMPLING,
    VERBOSE,
)
from edit_cli.options import MESH as MESH_OPTIONS
from edit_cli.request import Request, command, under


@command(
    IMAGES,
    PRESET,
    MESH_MODEL,
    ROUTERS,
    under("Mesh", SAMPLING),
    MESH_OPTIONS,
    MESH_OUTPUT,
    KEEP,
    LEARN,
    DRY_RUN,
    OPEN,
    REPORT,
    VERBOSE,
    MESH_MACHINE,
)
def generate_3d(request: Request) -> None:
    """Make meshes from pictures, spending only a share of the diffusion transformer's compute.

    The budget is a share of the dense transformer's FLOPs. Decoding the surface is not part of it:
    -v shows the seconds of each stage.
    Options marked * may also stand in a JSON line of --images-file.

    [dim]edit generate-3d cat.png -o cat.glb --budget 0.6
    edit generate-3d cat.png dog.png -o out/ --preview out/
    edit generate-3d --from cat.glb --octree-resolution 384[/dim]
    """
    carry_out(request, MESH)
