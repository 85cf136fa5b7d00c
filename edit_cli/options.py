"""The table of options: all that can be typed, group by group. Commands name the groups that they take.

Signatures, checks, help, docs/cli.md, fields of JSON lines, records and replay all come from here.
"""

# fmt: off
from __future__ import annotations

from dataclasses import replace

from backbones.registry import DEFAULT_MODELS, FAMILIES, names
from backbones.spec import DTYPES, OFFLOADS, QUANTISED, SOLVERS
from edit_cli import checks
from edit_cli.checks import choice, text, whole
from edit_cli.commands.presets import allow, preset_names
from edit_cli.export.settings import APPLIES, FORMATS
from edit_cli.generation.outputs import MESH_SUFFIXES
from edit_cli.request import Option, Options, only, under
from routers.spec import TARGETS
from routers.train.settings import KINDS, PRECISIONS

BACKGROUNDS = ("auto", "yes", "no")
DECODES = ("auto", "dense", "hierarchical")
VIEWS = ("front", "left", "back", "right")
METHODS = ("fit", "train")
ENGINES = ("local", "ray")
MESH_OFFLOADS = tuple(o for o in OFFLOADS if any(f.makes == "mesh" and o in f.offloads for f in FAMILIES))
MESH_FORMATS = tuple(suffix[1:] for suffix in MESH_SUFFIXES)
ELASTIC_METRICS = ("skip", "reuse", "width", "error", "time")
DENSE_METRICS = ("adds", "similarity", "cost", "time")
"""What the heatmaps can show of an elastic, and of a dense profile; the first is the default."""
SAMPLES, REPEATS, CACHE_LIMIT_MIB = 4, 3, 1024
"""Of a profile: samples when no prompt is given; timed repeats; a larger feature cache is warned about."""
OWN = "[dim]default: the model's own[/]"
TEMPLATE = "{seed} {index} {budget} {model}"
LIST = ".txt ({} a line, # for notes) or .jsonl file, or - for stdin."

PROMPTS: Options = under("Picture", {
    "prompt": Option("prompt", "PROMPT...", "What to draw; several give several pictures.", checks.prompt,
                     many=True, line="value", instead=("prompts_file", "replay")),
    "prompts_file": Option("--prompts", "FILE", f"Prompts from a {LIST.format('one')}", text),
})
IMAGES: Options = under("Mesh", {
    "image": Option("image", "IMAGE...", "Pictures of one object each; several give several meshes.",
                    checks.readable_file, many=True, line="list", instead=("images_file", "replay")),
    "images_file": Option("--images-file", "FILE", f"Pictures from a {LIST.format('one path')}", text),
})
SAMPLING: Options = under("Picture", {
    "steps": Option("--steps --num-inference-steps", "N", f"Denoising steps. {OWN}", checks.steps,
                    line="value"),
    "guidance": Option("--guidance --guidance-scale --true-cfg-scale", "X", f"Guidance scale. {OWN}",
                       checks.guidance, line="value"),
    "solver": Option("--solver --sampler", "NAME",
                     f"{', '.join(SOLVERS)}: ab2 and dpm++2m come nearer to the exact solution in as many "
                     f"steps. {OWN}", choice(*SOLVERS), line="value"),
    "seed": Option("--seed -s", "N...", "One or more seeds, or random. [dim]default 0[/]", checks.seed,
                   many=True, line="value"),
})
PICTURE: Options = under("Picture", {
    "negative_prompt": Option("--negative-prompt", "TEXT", "What to avoid.", text, line="value"),
    "count": Option("--num-images -n", "N", "Pictures per prompt and seed: seeds N, N+1... [dim]default 1[/]",
                    checks.count),
    "width": Option("--width", "PX", f"Width. {OWN}", checks.side, line="value"),
    "height": Option("--height", "PX", f"Height. {OWN}", checks.side, line="value"),
    "image": Option("--image", "FILE...", "Pictures to start from, to edit or to refer to.",
                    checks.picture_file, many=True, line="list"),
    "mask": Option("--mask", "FILE", "White where --image may change.", checks.picture_file, line="value"),
    "control_image": Option("--control-image", "FILE", "What a control model follows: edges, depth, a pose.",
                            checks.picture_file, line="value"),
    "strength": Option("--strength", "X", "How far to leave --image, 0 to 1. [dim]default 0.6[/]",
                       checks.strength, line="value"),
    "frames": Option("--frames --num-frames", "N", f"Frames of a video. {OWN}", checks.frames, line="value"),
    "fps": Option("--fps --frame-rate", "X", f"Frames per second of a video. {OWN}",
                  checks.fps, line="value"),
    "seconds": Option("--seconds", "X", f"Length of a sound. {OWN}", checks.seconds, line="value"),
    "replay": Option("--from", "FILE", "Repeat what edit made; other options change it.", text),
})
MESH: Options = under("Mesh", {
    "count": Option("--num-meshes -n", "N", "Meshes per picture and seed: seeds N, N+1... [dim]default 1[/]",
                    checks.count),
    "octree_resolution": Option("--octree-resolution", "N", f"Grid cells per axis, 8 to 1024. {OWN}",
                                whole(8, 1024, "usual are 128 (draft), 256, 384 (fine)"), line="value"),
    "decode": Option("--decode", "HOW", f"{', '.join(DECODES)}: everywhere, or only near the surface with "
                     "the same mesh. [dim]default auto[/]", choice(*DECODES), line="value"),
    "faces": Option("--faces", "N", "Simplify to at most N triangles. [dim]default: all[/]",
                    whole(4, 50_000_000), line="value"),
    "remove_background": Option("--remove-background", "HOW",
                                f"{', '.join(BACKGROUNDS)}: alpha if there is any, plain colours by flood "
                                "fill, the rest by rembg if installed. [dim]default auto[/]",
                                choice(*BACKGROUNDS), line="value"),
    "views": Option("--views", "NAME...", f"The pictures are views of one object: {', '.join(VIEWS)}, in "
                    "their order (multi-view models).", choice(*VIEWS), many=True, line="list"),
    "replay": Option("--from", "GLB", "Repeat a .glb made by edit; other options change it.", text),
})

PRESET: Options = under("Model and routers", {
    "preset": Option("--preset", "NAME", "Options saved under [NAME] in ./edit.toml or ~/.config/edit.toml; "
                     "those of [default] hold always (edit config).", text, complete=preset_names),
})
MODEL: Options = under("Model and routers", {
    "model": Option("--model -m", "MODEL", "Registry name (edit models), folder, .safetensors or .gguf file, "
                    f"hub id. [dim]default {DEFAULT_MODELS['picture']}[/]", text, complete=names),
    "base": Option("--base", "MODEL", "For a single-file --model: what text encoders and VAE come from. "
                   "[dim]default: the published model, if it is in the local cache[/]", text),
})
MESH_MODEL: Options = {
    "model": replace(MODEL["model"], help="Registry name (edit models), folder or hub id. "
                     f"[dim]default {DEFAULT_MODELS['mesh']}[/]"),
}
ROUTERS: Options = under("Model and routers", {
    "routers": Option("--routers", "PATH",
                      "Bundle folder, .safetensors file, or none. [dim]default: the model's own[/]", text),
    "budget": Option("--budget -b", "X...", "Share of the dense FLOPs to spend, 0 < X <= 1; several are "
                     "drawn and shown side by side. [dim]default: what the model's bundle "
                     "recommends, else 1[/]", checks.budget, many=True, line="value"),
    "time": Option("--time", "5s", "Seconds to spend on each result once the model is loaded: 5s, 800ms, 2m. "
                   "The plan is chosen that ends in time, within --budget.", checks.duration, line="value"),
    "target": Option("--target", "NAME", "dense: near to the run of all steps; exact: to the solution that "
                     "ever more steps tend to. [dim]default dense[/]", choice(*TARGETS), line="value"),
    "force": Option("--force", "", "Use routers fitted on other weights of the same architecture "
                    "(a fine-tune)."),
})
LORA: Options = under("Model and routers", {
    "lora": Option("--lora", "PATH[:SCALE]", "LoRA, LoKr, LoHa weights; repeatable.", checks.lora, many=True),
})

MACHINE: Options = under("Machine", {
    "batch_size": Option("--batch-size", "N", f"Pictures generated together. {OWN}", checks.count),
    "device": Option("--device", "DEVICE", "auto, cuda, cuda:N, mps or cpu. [dim]default auto[/]",
                     checks.device),
    "dtype": Option("--dtype", "DTYPE", f"{', '.join(DTYPES)}. [dim]default auto[/]", choice(*DTYPES)),
    "offload": Option("--offload", "HOW", f"Keep weights off the GPU: {', '.join(OFFLOADS)}. "
                      "[dim]default none[/]",
                      choice(*OFFLOADS)),
    "compile": Option("--compile", "", "torch.compile the transformer's blocks."),
    "engine": Option("--engine", "NAME", "local, or ray: on the cluster that Ray knows (docs/scale.md).",
                     choice(*ENGINES), default="local"),
    "workers": Option("--workers", "N", "Actors of --engine ray. [dim]default: one per card or two cores[/]",
                      checks.count),
})
MEMORY: Options = under("Machine", {
    "quantize": Option("--quantize", "HOW", f"{', '.join(QUANTISED)}: transformer and text encoders in fewer "
                       "bits (extra quantised).", choice(*QUANTISED)),
    "fit": Option("--fit", "", "As much of --vae-tiling, --quantize and --offload as it takes to fit."),
    "vae_tiling": Option("--vae-tiling", "", "Decode in tiles: less memory, faint seams."),
})
MESH_MACHINE: Options = {
    **MACHINE,
    "batch_size": replace(MACHINE["batch_size"], help=f"Meshes denoised together. {OWN}"),
    "offload": replace(MACHINE["offload"], help=f"Keep weights off the GPU: {', '.join(MESH_OFFLOADS)}. "
                       "[dim]default none[/]",
                       check=choice(*MESH_OFFLOADS)),
    "fit": replace(MEMORY["fit"], help="With --offload, if it takes that to fit the free memory."),
}

OUTPUT: Options = under("Output", {
    "output": Option("--output -o", "PATH", f"File (.png .jpg .webp), folder, or template with {{prompt}} "
                     f"{TEMPLATE}. [dim]default: named after the prompt[/]", text, line="value"),
    "compare": Option("--compare", "[dense|exact]", "Also run dense with the same seeds: side-by-side "
                      "picture, PSNR, SSIM, measured time ratio; exact: both beside the exact solution.",
                      choice(*TARGETS), bare="dense"),
    "preview": Option("--preview", "FILE", "Show what the picture is going to be, in this .png "
                      "or .jpg, every few steps; takes about 1 % of the time.", checks.preview_file),
    "gallery": Option("--gallery", "", "Also write index.html: all pictures of edit in the "
                      "folder on one page."),
})
MESH_OUTPUT: Options = under("Output", {
    "format": Option("--format", "NAME", f"{', '.join(MESH_FORMATS)}, where --output names none. "
                     "[dim]default glb[/]", choice(*MESH_FORMATS)),
    "output": Option("--output -o", "PATH", f"File ({' '.join(MESH_SUFFIXES)}), folder, or template with "
                     f"{{prompt}} (the picture's name) {TEMPLATE}. [dim]default: named after the picture[/]",
                     text, line="value"),
    "preview": Option("--preview", "PNG", "Also write a lit turntable picture of the mesh (file or folder).",
                      text),
    "compare": Option("--compare", "[dense|exact]", "Also make the dense mesh with the same seed: Chamfer "
                      "distance, F-score, volume IoU, seconds; exact: of both to the exact solution.",
                      choice(*TARGETS), bare="dense"),
})
KEEP: Options = under("Output", {
    "overwrite": Option("--overwrite", "", "Replace files that are there, whatever made them."),
    "resume": Option("--resume", "", "Go on where the same command was stopped: what it made is not made "
                     "again."),
})
LEARN: Options = under("Output", {
    "observe": Option("--observe --learn", "BUNDLE", "Make the first result with all steps, a bundle of what "
                      "that run taught, and the rest with it.", text),
})
DRY_RUN: Options = under("Output", {
    "dry_run": Option("--dry-run", "", "Show plan, FLOPs and memory; load no weights, write nothing."),
})
OPEN: Options = under("Output", {
    "open": Option("--open", "", "Show the first result with the system's viewer."),
})
REPORT: Options = under("Output", {
    "json": Option("--json", "", "Print one JSON object as the last line of stdout."),
    "quiet": Option("--quiet -q", "", "No progress, no table: the paths that were written, one a line."),
})
VERBOSE: Options = under("Output", {
    "verbose": Option("--verbose -v", "", "Tell how it was done too: evaluations, decisions, FLOPs, stages."),
})

PROFILE: Options = {
    "prompt": Option("prompt", "PROMPT...", "What to draw; without any, the model's calibration prompts.",
                     checks.prompt, many=True),
    **only(PROMPTS, "prompts_file"),
    **under("Picture", {
        "images": Option("--images", "FILE...", "Pictures to edit, or to make meshes of.",
                         checks.picture_name, many=True),
        **only(SAMPLING, "steps", "guidance"),
        "seed": replace(SAMPLING["seed"], metavar="N", help="Sample i starts from seed N + i. "
                        "[dim]default 0[/]"),
        **only(PICTURE, "width", "height"),
        "octree_resolution": replace(MESH["octree_resolution"], help="Grid cells per axis (image-to-mesh "
                                     "models)."),
    }),
    **PRESET, **only(MODEL, "model"), **only(ROUTERS, "routers"),
    "budget": replace(ROUTERS["budget"], metavar="X...", many=True, help="One or more budgets, shown side "
                      "by side. [dim]default: what the routers recommend[/]"),
    **under("Model and routers", {
        "dense": Option("--dense", "", "No routers: map how little each block adds, how alike steps are, and "
                        "what a skip costs."),
    }),
    **only(ROUTERS, "force"), **LORA,
    **under("Measurement", {
        "metric": Option("--metric", "NAME", f"What the map shows: {', '.join(ELASTIC_METRICS)}; with "
                         f"--dense {', '.join(DENSE_METRICS)}. [dim]default: the first with anything to "
                         "show[/]", text),
        "samples": Option("--samples", "N", "Generations per run, prompts taken in turn. "
                          f"[dim]default: one per prompt, else {SAMPLES}[/]", checks.count),
        "repeats": Option("--repeats", "N", "Timed repeats after a warm-up; medians are shown. "
                          f"[dim]default {REPEATS}[/]", checks.count),
        "cache_limit": Option("--cache-limit", "MIB", "Warn about a feature cache above this. "
                              f"[dim]default {CACHE_LIMIT_MIB}[/]", checks.count),
    }),
    **under("Output", {
        "output": Option("--output -o", "FOLDER", "Write report.html, heatmap.png and .svg, trace.json and "
                         "chrome-trace.json here.", text),
        "replay": Option("--from", "TRACE", "Show a trace.json written earlier again, with another --metric "
                         "or as a new report.", text),
    }),
    **only(KEEP, "overwrite"),
    **REPORT, **only(MACHINE, "batch_size", "device", "dtype", "offload"), **only(MEMORY, "quantize"),
}

TRAIN: Options = under("Training (--method train)", {
    "train": Option("--train", "WHAT", "routers (default), or with them the backbone: lora or full.",
                    choice(*KINDS)),
    "train_steps": Option("--train-steps", "N", "Optimiser steps (default 1000).", whole(1, 10**7)),
    "learning_rate": Option("--learning-rate", "RATE", "Of the routers (default 0.003); the backbone's is a "
                            "30th of it.", checks.rate),
    "lora_rank": Option("--lora-rank", "N", "Rank of --train lora (default 16).", whole(1, 1024)),
    "mixed_precision": Option("--mixed-precision", "no|bf16", "Run the backbone in bfloat16 while training.",
                              choice(*PRECISIONS)),
    "gradient_checkpointing": Option("--gradient-checkpointing", "", "Compute each block again for its "
                                     "gradient instead of keeping what it needs."),
    "data": Option("--data", "DIR", "Pictures, each with its prompt in a .txt of the same name, to train on "
                   "too.", text),
})
CALIBRATE: Options = {
    "output": Option("--output -o", "FOLDER", "Where the bundle goes.", text),
    "evaluate": Option("--evaluate", "BUNDLE", "Only measure this bundle again.", text),
    **only(KEEP, "overwrite", "resume"),
    "method": Option("--method", "METHOD", "fit: minutes, the weights stay as they are. train: the paper's "
                     "training of gates and widths.", choice(*METHODS), default="fit"),
    "budgets": Option("--budgets", "X or LOW:HIGH[:COUNT]", "Make plans for these budgets only, and measure "
                      "them. [dim]default: plans for all, measured from 0.35 to 1[/]", checks.budgets),
    "target": Option("--target", "NAME", "dense: plans near to the run of all steps; exact: to the solution; "
                     "both. [dim]default dense[/]", choice(*TARGETS, "both")),
    "samples": Option("--samples", "N", "Pictures or meshes to calibrate on, in one batch (train: in "
                      "several).", whole(1, 4096), shown="4, 1 for large models, 32 to train"),
    "trained": Option("--routers", "BUNDLE", "Trained routers of this model (--method train): plans leave "
                      "evaluations to them where that ends nearer.", text),
    "tries": Option("--tries", "N", "Candidates that are run for each plan. [dim]default: 1 or 2, of the "
                    "first of many all[/]", whole(1, 6)),
    **PRESET, **only(MODEL, "model"), **only(PROMPTS, "prompts_file"),
    "steps": replace(SAMPLING["steps"], check=whole(2, checks.MAX_STEPS)),
    **only(SAMPLING, "guidance", "seed"), **only(PICTURE, "width", "height"),
    "images": Option("--images", "DIR", "Pictures, in turn with the prompts, for models that edit them; of "
                     "one object each for models that make meshes.", text),
    **only(MESH, "remove_background"), **LORA,
    **only(MACHINE, "batch_size", "device", "dtype", "offload", "compile"), **only(MEMORY, "quantize"),
    **TRAIN,
    "dry_run": replace(DRY_RUN["dry_run"], help="Forecast FLOPs, time and memory; load no weights, write "
                       "nothing."),
    **REPORT,
}


def _for(name: str, help: str) -> str:
    return f"{', '.join(APPLIES[name])}: {help}"


EXPORT: Options = {
    "source": Option("source", "SOURCE", "A bundle folder, a model, or a checkpoint of the paper's.", text),
    "format": Option("--format", "F", f"One of: {', '.join(FORMATS)}.", choice(*FORMATS), default="bundle"),
    "output": Option("--output -o", "FOLDER", "Where the export goes.", text),
    "overwrite": replace(KEEP["overwrite"], names="--overwrite --force"),
    "budget": Option("--budget", "B", _for("--budget", "share of the dense FLOPs to keep."),
                     checks.budget),
    "prompts_file": Option("--prompts", "FILE", _for("--prompts", "prompts to measure on."), text),
    "images": Option("--images", "DIR", _for("--images", "pictures, for mesh models."), text),
    "batch_size": Option("--batch-size", "N", "torch-export: rows of a call; default 1.", checks.count),
    "text_tokens": Option("--text-tokens", "N", "torch-export: text tokens of a call.", checks.count),
    "dtype": Option("--dtype", "DTYPE", _for("--dtype", f"{', '.join(DTYPES)}."), choice(*DTYPES)),
    "shard_size": Option("--shard-size", "SIZE", _for("--shard-size", "most of a weight file, like 5GB."),
                         checks.size),
    **REPORT,
}
_YES = Option("--yes -y", "", "Do not ask.")
_JSON = replace(REPORT["json"], help="Print one JSON object instead of the table.", panel=None)
LISTING: Options = {
    "models": Option("models", "NAME...", "Models to describe; without any, all are listed.", text, many=True,
                     complete=names),
    "installed": Option("--installed", "", "Only what is on this machine."),
    "remove": Option("--remove", "", "Take the named models out of the local cache, after asking."),
    "yes": _YES,
    "words": Option("--words", "", "The words that the named models know, where they can be listed."),
    "inspect": Option("--inspect", "FOLDER", "Describe the blocks of a folder's transformers.", text),
    "json": _JSON,
}
DOWNLOAD: Options = {
    "models": Option("models", "MODEL...", "Names of `edit models`, or hub ids.", text, many=True,
                     instead=(), complete=names),
    "json": _JSON,
    "quiet": replace(REPORT["quiet"], help="No progress.", panel=None),
}
CONFIG: Options = {"json": _JSON}

for _group in [group for group in globals().values() if isinstance(group, dict)]:
    allow({name: option for name, option in _group.items() if isinstance(option, Option)})
