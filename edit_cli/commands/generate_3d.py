"""`edit generate-3d`: pictures to meshes at a compute budget. Thin: parse, plan, run, save, report."""

from __future__ import annotations

from edit_cli import options as o
from edit_cli.console import print_result, print_warnings
from edit_cli.generate import mesh_options as m
from edit_cli.generate.mesh_plan import MeshAsked, make_mesh_plan


def generate_3d(
    images: m.Images = None,
    model: m.Model = None,
    routers: o.Routers = None,
    budget: m.Budget = None,
    force: o.Force = False,
    steps: m.Steps = None,
    guidance: m.Guidance = None,
    seed: m.Seed = None,
    octree_resolution: m.Resolution = None,
    decode: m.Decode = None,
    faces: m.Faces = None,
    format: m.Format = None,
    remove_background: m.RemoveBackground = None,
    views: m.Views = None,
    output: m.Output = None,
    preview: m.Preview = None,
    replay: m.Replay = None,
    compare: m.Compare = False,
    dry_run: o.DryRun = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    offload: m.Offload = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make meshes from pictures, spending only a share of the diffusion transformer's compute.

    The budget is a share of the dense transformer's FLOPs. Decoding the surface is not part of it:
    the report shows the seconds of each stage.

    [dim]edit generate-3d cat.png -o cat.glb --budget 0.6
    edit generate-3d cat.png dog.png -o out/ --preview out/
    edit generate-3d --from cat.glb --octree-resolution 384[/dim]
    """
    asked = MeshAsked(
        images=tuple(images or ()),
        replay=replay,
        model=model,
        routers=routers,
        budget=budget,
        steps=steps,
        guidance=guidance,
        seeds=tuple(seed or ()),
        octree_resolution=octree_resolution,
        decode=decode,
        faces=faces,
        format=format,
        remove_background=remove_background,
        views=tuple(views or ()),
        output=output,
        preview=preview,
        device=device,
        dtype=dtype,
        offload=offload,
        force=force,
        dry_run=dry_run,
    )
    plan = make_mesh_plan(asked)
    print_warnings(plan.warnings, quiet)
    if dry_run:
        from edit_cli.generate import mesh_dryrun

        found = mesh_dryrun.dry_run(plan)
        table = mesh_dryrun.as_table(plan, found)
    else:
        from edit_cli.generate import mesh_report
        from edit_cli.generate.mesh_loop import run_mesh_plan

        result = run_mesh_plan(plan, compare=compare, show_progress=not quiet)
        found, table = mesh_report.as_json(result), mesh_report.as_table(result)
        print_warnings(result.notes, quiet)
    print_result(found, table, json_output=json_output, quiet=quiet)
