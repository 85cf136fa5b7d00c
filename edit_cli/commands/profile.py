"""`edit profile`: where the compute goes. Thin: parse, plan, measure, show, write."""

from __future__ import annotations

from edit_cli import options as o
from edit_cli.console import print_result, print_warnings, progress, stderr, stdout
from edit_cli.errors import EditError
from edit_cli.profile import options as p
from edit_cli.profile.plan import ProfileAsked, check_metric, make_profile_plan, report_folder


def profile(
    prompts: p.Prompts = None,
    prompts_file: o.PromptsFile = None,
    images: p.Images = None,
    model: o.Model = None,
    routers: o.Routers = None,
    budget: p.Budgets = None,
    dense: p.Dense = False,
    force: o.Force = False,
    metric: p.Metric = None,
    samples: p.Samples = None,
    repeats: p.Repeats = None,
    cache_limit: p.CacheLimit = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    seed: p.Seed = None,
    width: o.Width = None,
    height: o.Height = None,
    octree_resolution: p.Resolution = None,
    output: p.Output = None,
    replay: p.Replay = None,
    batch_size: o.BatchSize = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    offload: o.Offload = None,
    lora: o.LoraFiles = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """See which blocks ran at which step, what that cost, and what limits the gain.

    Runs real generations, dense and at every budget, and shows a heatmap of blocks x steps, the time of
    every stage and block kind, FLOPs, memory, host reads, and the most that any budget could gain.

    [dim]edit profile "a cat" --budget 0.4 0.6 -o report/
    edit profile --dense --metric cost
    edit profile --images cat.png -m hunyuan3d-2mini
    edit profile --from report/trace.json --metric width[/dim]
    """
    asked = ProfileAsked(
        prompts=tuple(prompts or ()), prompts_file=prompts_file, images=tuple(images or ()), replay=replay,
        model=model, routers=routers, budgets=tuple(budget or ()), dense=dense, metric=metric,
        samples=samples, repeats=repeats, cache_limit=cache_limit, steps=steps, guidance=guidance,
        seeds=tuple(seed or ()), batch_size=batch_size, width=width, height=height,
        octree_resolution=octree_resolution, output=output, device=device, dtype=dtype, offload=offload,
        loras=tuple(lora or ()), force=force,
    )  # fmt: skip
    if replay is not None:
        from edit_cli.profile import report as profile_report

        _refuse_besides_replay(asked)
        folder, (trace, pictures) = report_folder(output), profile_report.reopen(replay)
        check_metric(metric, trace["kind"] == "dense")
    else:
        plan = make_profile_plan(asked)
        from edit_cli.profile import report as profile_report

        print_warnings(plan.request.warnings, quiet)
        folder = plan.folder
        with progress(not quiet) as bars:
            trace, pictures = profile_report.run(plan, bars)
    print_warnings(trace["warnings"], quiet)
    files = [] if folder is None else profile_report.write(folder, trace, pictures, metric)
    console = stderr() if json_output else stdout()
    view = profile_report.view(trace, metric, console, files)
    print_result(profile_report.as_json(trace, files), view, json_output=json_output, quiet=quiet)


def _refuse_besides_replay(asked: ProfileAsked) -> None:
    """--from shows what was measured: nothing that would measure anew may stand beside it."""
    kept = ("replay", "metric", "output")
    extra = [name for name, value in vars(asked).items() if value and name not in kept]
    if extra:
        names = {"prompts_file": "prompts", "budgets": "budget", "seeds": "seed", "loras": "lora"}
        option = "PROMPT" if extra[0] == "prompts" else "--" + names.get(extra[0], extra[0]).replace("_", "-")
        raise EditError(f"--from shows a trace as it was measured; leave {option} out, or leave --from out")
