"""`edit generate`: prompts to pictures at a compute budget. Thin: parse, plan, run, save, report."""

from __future__ import annotations

from edit_cli import options as o
from edit_cli.console import print_result, print_warnings
from edit_cli.generate.plan import Asked, make_plan


def generate(
    prompts: o.Prompts = None,
    prompts_file: o.PromptsFile = None,
    model: o.Model = None,
    base: o.Base = None,
    routers: o.Routers = None,
    budget: o.Budget = None,
    force: o.Force = False,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    solver: o.Solver = None,
    negative_prompt: o.NegativePrompt = None,
    seed: o.Seed = None,
    num_images: o.NumImages = None,
    batch_size: o.BatchSize = None,
    width: o.Width = None,
    height: o.Height = None,
    image: o.Image = None,
    strength: o.Strength = None,
    output: o.Output = None,
    replay: o.Replay = None,
    compare: o.Compare = False,
    dry_run: o.DryRun = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    offload: o.Offload = None,
    lora: o.LoraFiles = None,
    compile: o.Compile = False,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Generate pictures, spending only a share of the model's compute.

    The budget is a share of the dense transformer's FLOPs, routers included.
    Options marked * may also stand in a JSON line of --prompts.

    [dim]edit generate "a cat" --budget 0.6
    edit generate "a cat" "a dog" -n 4 -o out/
    edit generate --from cat.png --budget 0.4[/dim]
    """
    asked = Asked(
        prompts=tuple(prompts or ()),
        prompts_file=prompts_file,
        replay=replay,
        model=model,
        base=base,
        routers=routers,
        budget=budget,
        steps=steps,
        guidance=guidance,
        solver=solver,
        negative_prompt=negative_prompt,
        seeds=tuple(seed or ()),
        num_images=num_images,
        batch_size=batch_size,
        width=width,
        height=height,
        image=image,
        strength=strength,
        output=output,
        device=device,
        dtype=dtype,
        offload=offload,
        loras=tuple(lora or ()),
        compile=compile,
        force=force,
        compare=compare,
        dry_run=dry_run,
    )
    plan = make_plan(asked)
    print_warnings(plan.warnings, quiet)
    if dry_run:
        from edit_cli.generate import dryrun

        found = dryrun.dry_run(plan)
        table = dryrun.as_table(plan, found)
    else:
        from edit_cli.generate import report
        from edit_cli.generate.clock import StageClock
        from edit_cli.generate.loop import run_plan

        result = run_plan(plan, compare=compare, show_progress=not quiet, clock=StageClock())
        found, table = report.as_json(result), report.as_table(result)
        print_warnings(result.notes, quiet)
    print_result(found, table, json_output=json_output, quiet=quiet)
