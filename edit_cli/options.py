"""The table of options: all that can be typed, group by group. Commands name the groups that they take.

Signatures, checks, help, docs/cli.md, fields of JSON lines, records and replay all come from here.
"""

from __future__ import annotations

from dataclasses import replace

from backbones.registry import DEFAULT_MODELS, FAMILIES
from backbones.spec import DTYPES, OFFLOADS, SOLVERS
from edit_cli import checks
from edit_cli.export.settings import APPLIES, FORMATS
from edit_cli.generate.outputs import MESH_SUFFIXES
from edit_cli.request import Option, Options
from routers.train.settings import KINDS, PRECISIONS

BACKGROUNDS = ("auto", "yes", "no")
DECODES = ("auto", "dense", "hierarchical")
VIEWS = ("front", "left", "back", "right")
METHODS = ("fit", "train")
ELASTIC_METRICS = ("skip", "reuse", "width", "error", "time")
DENSE_METRICS = ("adds", "similarity", "cost", "time")
"""What the heatmaps can show of an elastic, and of a dense profile; the first is the default."""
SAMPLES, REPEATS, CACHE_LIMIT_MIB = 4, 3, 1024
"""Of a profile: samples when no prompt is given; timed repeats; a larger feature cache is warned about."""
PICTURE_PANEL, MESH_PANEL, MODEL_PANEL = "Picture", "Mesh", "Model and routers"
OUTPUT_PANEL, MACHINE_PANEL, MEASURE_PANEL = "Output", "Machine", "Measurement"
TRAIN_PANEL = "Training (--method train)"

PROMPTS: Options = {
    "prompt": Option(
        "prompt", "PROMPT...", "What to draw; several give several pictures.", check=checks.prompt,
        many=True, line="value", instead=("prompts_file", "replay"),
    ),
    "prompts_file": Option(
        "--prompts", "FILE", "Prompts from a .txt (one a line) or .jsonl file, or - for stdin.",
        PICTURE_PANEL, checks.text,
    ),
}  # fmt: skip
IMAGES: Options = {
    "image": Option(
        "image", "IMAGE...", "Pictures of one object each; several give several meshes.",
        check=checks.readable_file, many=True, line="list", instead=("images_file", "replay"),
    ),
    "images_file": Option(
        "--images-file", "FILE",
        "Pictures from a .txt (one path a line) or .jsonl file, or - for stdin.", MESH_PANEL, checks.text,
    ),
}  # fmt: skip
SAMPLING: Options = {
    "steps": Option(
        "--steps --num-inference-steps", "N", "Denoising steps.", PICTURE_PANEL, checks.steps, line="value"
    ),
    "guidance": Option(
        "--guidance --guidance-scale --true-cfg-scale", "X", "Guidance scale.", PICTURE_PANEL,
        checks.guidance, line="value",
    ),
    "solver": Option(
        "--solver --sampler", "NAME",
        f"{', '.join(SOLVERS)}: ab2 and dpm++2m come nearer to the exact solution in as many steps. "
        "[dim]default: the model's own[/]",
        PICTURE_PANEL, checks.choice(*SOLVERS), line="value",
    ),
    "seed": Option(
        "--seed -s", "N...", "One or more seeds. [dim]default 0[/]", PICTURE_PANEL, checks.seed, many=True,
        line="value",
    ),
}  # fmt: skip
PICTURE: Options = {
    "negative_prompt": Option(
        "--negative-prompt", "TEXT", "What to avoid.", PICTURE_PANEL, checks.text, line="value"
    ),
    "count": Option(
        "--num-images -n", "N", "Pictures per prompt and seed: seeds N, N+1...", PICTURE_PANEL, checks.count
    ),
    "width": Option("--width", "PX", "Width.", PICTURE_PANEL, checks.side, line="value"),
    "height": Option("--height", "PX", "Height.", PICTURE_PANEL, checks.side, line="value"),
    "image": Option(
        "--image", "FILE", "Start from this picture (image-to-image).", PICTURE_PANEL, checks.picture_file,
        line="value",
    ),
    "strength": Option(
        "--strength", "X", "How far to leave --image, 0 to 1. [dim]default 0.6[/]", PICTURE_PANEL,
        checks.strength, line="value",
    ),
    "replay": Option(
        "--from", "PICTURE", "Repeat a picture made by edit; other options change it.", PICTURE_PANEL,
        checks.text,
    ),
}  # fmt: skip
MESH: Options = {
    "count": Option(
        "--num-meshes -n", "N", "Meshes per picture and seed: seeds N, N+1...", MESH_PANEL, checks.count
    ),
    "octree_resolution": Option(
        "--octree-resolution", "N", "Grid cells per axis, 8 to 1024.", MESH_PANEL,
        checks.whole(8, 1024, "usual are 128 (draft), 256, 384 (fine)"), line="value",
    ),
    "decode": Option(
        "--decode", "HOW",
        f"{', '.join(DECODES)}: everywhere, or only near the surface with the same mesh. "
        "[dim]default auto[/]",
        MESH_PANEL, checks.choice(*DECODES), line="value",
    ),
    "faces": Option(
        "--faces", "N", "Simplify to at most N triangles.", MESH_PANEL, checks.whole(4, 50_000_000),
        line="value",
    ),
    "remove_background": Option(
        "--remove-background", "HOW",
        f"{', '.join(BACKGROUNDS)}: alpha if there is any, plain colours by flood fill, the rest by "
        "rembg if installed. [dim]default auto[/]",
        MESH_PANEL, checks.choice(*BACKGROUNDS), line="value",
    ),
    "views": Option(
        "--views", "NAME...",
        f"The pictures are views of one object: {', '.join(VIEWS)}, in their order (multi-view models).",
        MESH_PANEL, checks.choice(*VIEWS), many=True, line="list",
    ),
    "replay": Option(
        "--from", "GLB", "Repeat a .glb made by edit; other options change it.", MESH_PANEL, checks.text
    ),
}  # fmt: skip

MODEL: Options = {
    "model": Option(
        "--model -m", "MODEL",
        "Registry name (edit models), folder, .safetensors file or hub id. "
        f"[dim]default {DEFAULT_MODELS['picture']}[/]",
        MODEL_PANEL, checks.text,
    ),
    "base": Option(
        "--base", "MODEL",
        "For a single-file --model: what text encoders and VAE come from. "
        "[dim]default: the published model, if it is in the local cache[/]",
        MODEL_PANEL, checks.text,
    ),
}  # fmt: skip
MESH_MODEL: Options = {
    "model": Option(
        "--model -m", "MODEL",
        f"Registry name (edit models), folder or hub id. [dim]default {DEFAULT_MODELS['mesh']}[/]",
        MODEL_PANEL, checks.text,
    ),
}  # fmt: skip
ROUTERS: Options = {
    "routers": Option(
        "--routers", "PATH",
        "Bundle folder, .safetensors file, or none. [dim]default: the model's own[/]",
        MODEL_PANEL, checks.text,
    ),
    "budget": Option(
        "--budget -b", "X",
        "Share of the dense FLOPs to spend, 0 < X <= 1. [dim]default: what the routers recommend[/]",
        MODEL_PANEL, checks.budget, line="value",
    ),
    "force": Option(
        "--force", help="Use routers fitted on other weights of the same architecture (a fine-tune).",
        panel=MODEL_PANEL,
    ),
}  # fmt: skip
LORA: Options = {
    "lora": Option(
        "--lora", "PATH[:SCALE]", "LoRA weights; repeatable.", MODEL_PANEL, checks.lora, many=True
    ),
}

MACHINE: Options = {
    "batch_size": Option(
        "--batch-size", "N", "Pictures generated together.", MACHINE_PANEL, checks.count
    ),
    "device": Option("--device", "DEVICE", "auto, cuda, cuda:N, mps or cpu.", MACHINE_PANEL, checks.device),
    "dtype": Option("--dtype", "DTYPE", f"{', '.join(DTYPES)}.", MACHINE_PANEL, checks.choice(*DTYPES)),
    "offload": Option(
        "--offload", "HOW", f"Keep weights off the GPU: {', '.join(OFFLOADS)}.", MACHINE_PANEL,
        checks.choice(*OFFLOADS),
    ),
    "compile": Option(
        "--compile", help="torch.compile the transformer's blocks.", panel=MACHINE_PANEL
    ),
}  # fmt: skip

OUTPUT: Options = {
    "output": Option(
        "--output -o", "PATH",
        "File (.png .jpg .webp), folder, or template with {prompt} {seed} {index} {budget} {model}. "
        "[dim]default: named after the prompt[/]",
        OUTPUT_PANEL, checks.text, line="value",
    ),
    "compare": Option(
        "--compare",
        help="Also run dense with the same seeds: side-by-side picture, PSNR, SSIM, measured time ratio.",
        panel=OUTPUT_PANEL,
    ),
}  # fmt: skip
MESH_OUTPUT: Options = {
    "format": Option(
        "--format", "NAME",
        f"{', '.join(s[1:] for s in MESH_SUFFIXES)}, where --output names none. [dim]default glb[/]",
        OUTPUT_PANEL, checks.choice(*(s[1:] for s in MESH_SUFFIXES)),
    ),
    "output": Option(
        "--output -o", "PATH",
        f"File ({' '.join(MESH_SUFFIXES)}), folder, or template with {{prompt}} (the picture's name) "
        "{seed} {index} {budget} {model}. [dim]default: named after the picture[/]",
        OUTPUT_PANEL, checks.text, line="value",
    ),
    "preview": Option(
        "--preview", "PNG", "Also write a lit turntable picture of the mesh (file or folder).",
        OUTPUT_PANEL, checks.text,
    ),
    "compare": Option(
        "--compare",
        help="Also make the dense mesh with the same seed: Chamfer distance, F-score, volume IoU, seconds.",
        panel=OUTPUT_PANEL,
    ),
}  # fmt: skip
DRY_RUN: Options = {
    "dry_run": Option(
        "--dry-run", help="Show plan, FLOPs and memory; load no weights, write nothing.", panel=OUTPUT_PANEL
    ),
}
REPORT: Options = {
    "json": Option("--json", help="Print one JSON object as the last line of stdout.", panel=OUTPUT_PANEL),
    "quiet": Option("--quiet -q", help="No progress, no table.", panel=OUTPUT_PANEL),
}

MESH_OFFLOADS = tuple(
    how for how in OFFLOADS if any(f.makes == "mesh" and how in f.offloads for f in FAMILIES)
)
MESH_MACHINE: Options = {
    **MACHINE,
    "batch_size": replace(MACHINE["batch_size"], help="Meshes denoised together."),
    "offload": replace(
        MACHINE["offload"],
        help=f"Keep weights off the GPU: {', '.join(MESH_OFFLOADS)}.",
        check=checks.choice(*MESH_OFFLOADS),
    ),
}

PROFILE: Options = {
    "prompt": Option(
        "prompt", "PROMPT...", "What to draw; without any, the model's calibration prompts.",
        check=checks.prompt, many=True,
    ),
    "images": Option(
        "--images", "FILE...", "Pictures to make meshes of (image-to-mesh models).", PICTURE_PANEL,
        checks.picture_name, many=True,
    ),
    "octree_resolution": replace(
        MESH["octree_resolution"], panel=PICTURE_PANEL, help="Grid cells per axis (image-to-mesh models)."
    ),
    "seed": replace(
        SAMPLING["seed"], metavar="N", help="Sample i starts from seed N + i. [dim]default 0[/]", line=""
    ),
    "budget": replace(
        ROUTERS["budget"], metavar="X...", many=True, line="",
        help="One or more budgets, shown side by side. [dim]default: what the routers recommend[/]",
    ),
    "dense": Option(
        "--dense", help="No routers: map how little each block adds, how alike steps are, and what a skip "
        "costs.", panel=MODEL_PANEL,
    ),
    "metric": Option(
        "--metric", "NAME",
        f"What the map shows: {', '.join(ELASTIC_METRICS)}; with --dense {', '.join(DENSE_METRICS)}. "
        "[dim]default: the first with anything to show[/]",
        MEASURE_PANEL, checks.text,
    ),
    "samples": Option(
        "--samples", "N",
        f"Generations per run, prompts taken in turn. [dim]default: one per prompt, else {SAMPLES}[/]",
        MEASURE_PANEL, checks.count,
    ),
    "repeats": Option(
        "--repeats", "N", f"Timed repeats after a warm-up; medians are shown. [dim]default {REPEATS}[/]",
        MEASURE_PANEL, checks.count,
    ),
    "cache_limit": Option(
        "--cache-limit", "MIB", f"Warn about a feature cache above this. [dim]default {CACHE_LIMIT_MIB}[/]",
        MEASURE_PANEL, checks.count,
    ),
    "output": Option(
        "--output -o", "FOLDER",
        "Write report.html, heatmap.png and .svg, trace.json and chrome-trace.json here.", OUTPUT_PANEL,
        checks.text,
    ),
    "replay": Option(
        "--from", "TRACE", "Show a trace.json written earlier again, with another --metric or as a new "
        "report.", OUTPUT_PANEL, checks.text,
    ),
}  # fmt: skip

CALIBRATE: Options = {
    "output": Option("--output -o", "FOLDER", "Where the bundle goes.", check=checks.text),
    "evaluate": Option("--evaluate", "BUNDLE", "Only measure this bundle again.", check=checks.text),
    "resume": Option("--resume", help="Go on where an earlier attempt at the same was stopped."),
    "method": Option(
        "--method", "METHOD", "fit: minutes, the weights stay as they are. train: the paper's training of "
        "gates and widths.", check=checks.choice(*METHODS), default="fit",
    ),
    "budgets": Option(
        "--budgets", "LOW:HIGH[:COUNT]", "The lowest budget the bundle serves, and the range it is measured "
        "on.", check=checks.budgets, default="0.35:1.0",
    ),
    "samples": Option(
        "--samples", "N", "Pictures or meshes to calibrate on.", check=checks.whole(4, 4096), default="32"
    ),
    "probes": Option(
        "--probes", "N", "Single reuses followed through to the final latents.",
        check=checks.whole(8, 10**6), default="80",
    ),
    "plan_samples": Option(
        "--plan-samples", "N", "Samples that candidate plans are run on to choose the best; 0 to trust the "
        "closed form.", check=checks.whole(0, 4096), shown="8, or 2 for large models",
    ),
    "steps": replace(SAMPLING["steps"], check=checks.whole(2, checks.MAX_STEPS)),
    "images": Option(
        "--images", "DIR", "Pictures of one object each, for models that make meshes.", MESH_PANEL,
        checks.text,
    ),
}  # fmt: skip
TRAIN: Options = {
    "train": Option(
        "--train", "WHAT", "routers (default), or with them the backbone: lora or full.", TRAIN_PANEL,
        checks.choice(*KINDS),
    ),
    "train_steps": Option(
        "--train-steps", "N", "Optimiser steps (default 1000).", TRAIN_PANEL, checks.whole(1, 10**7)
    ),
    "learning_rate": Option(
        "--learning-rate", "RATE", "Of the routers (default 0.003); the backbone's is a 30th of it.",
        TRAIN_PANEL, checks.rate,
    ),
    "lora_rank": Option(
        "--lora-rank", "N", "Rank of --train lora (default 16).", TRAIN_PANEL, checks.whole(1, 1024)
    ),
    "mixed_precision": Option(
        "--mixed-precision", "no|bf16", "Run the backbone in bfloat16 while training.", TRAIN_PANEL,
        checks.choice(*PRECISIONS),
    ),
    "gradient_checkpointing": Option(
        "--gradient-checkpointing", help="Compute each block again for its gradient instead of keeping what "
        "it needs.", panel=TRAIN_PANEL,
    ),
    "data": Option(
        "--data", "DIR", "Pictures, each with its prompt in a .txt of the same name, to train on too.",
        TRAIN_PANEL, checks.text,
    ),
}  # fmt: skip


def _for(name: str, text: str) -> str:
    return f"{', '.join(APPLIES[name])}: {text}"


EXPORT: Options = {
    "source": Option(
        "source", "SOURCE", "A bundle folder, a model, or a checkpoint of the paper's.", check=checks.text
    ),
    "format": Option(
        "--format", "F", f"One of: {', '.join(FORMATS)}.", check=checks.choice(*FORMATS), default="bundle"
    ),
    "output": Option("--output -o", "FOLDER", "Where the export goes.", check=checks.text),
    "force": Option("--force", help="Replace an earlier export at --output."),
    "budget": Option(
        "--budget", "B", _for("--budget", "share of the dense FLOPs to keep."), check=checks.budget
    ),
    "prompts_file": Option(
        "--prompts", "FILE", _for("--prompts", "prompts to measure on."), check=checks.text
    ),
    "images": Option("--images", "DIR", _for("--images", "pictures, for mesh models."), check=checks.text),
    "batch_size": Option(
        "--batch-size", "N", "torch-export: rows of a call; default 1.", check=checks.count
    ),
    "text_tokens": Option("--text-tokens", "N", "torch-export: text tokens of a call.", check=checks.count),
    "dtype": Option(
        "--dtype", "DTYPE", _for("--dtype", f"{', '.join(DTYPES)}."), check=checks.choice(*DTYPES)
    ),
    "shard_size": Option(
        "--shard-size", "SIZE", _for("--shard-size", "most of a weight file, like 5GB."), check=checks.size
    ),
}  # fmt: skip
LIST: Options = {
    "json": Option("--json", help="Print one JSON object instead of the table."),
}
