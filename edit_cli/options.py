"""Command-line options, declared once and shared by the commands.

Values arrive as text and are checked in `values.py`, so that every message says what is allowed and what to
do next.
"""

from __future__ import annotations

from typing import Annotated

import typer

from backbones.registry import DEFAULT_MODELS
from backbones.spec import DTYPES, OFFLOADS, SOLVERS

PICTURE, MODEL, OUTPUT, MACHINE = "Picture", "Model and routers", "Output", "Machine"

Prompts = Annotated[
    list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw; several give several pictures.")
]
PromptsFile = Annotated[
    str | None,
    typer.Option(
        "--prompts", metavar="FILE", help="Prompts from a .txt (one a line) or .jsonl file, or - for stdin.",
        rich_help_panel=PICTURE,
    ),
]  # fmt: skip
NegativePrompt = Annotated[
    str | None,
    typer.Option("--negative-prompt", metavar="TEXT", help="What to avoid. *", rich_help_panel=PICTURE),
]
Seed = Annotated[
    list[str] | None,
    typer.Option(
        "--seed", "-s", metavar="N...", help="One or more seeds. [dim]default 0[/] *", rich_help_panel=PICTURE
    ),
]
NumImages = Annotated[
    str | None,
    typer.Option(
        "--num-images", "-n", metavar="N", help="Pictures per prompt and seed: seeds N, N+1...",
        rich_help_panel=PICTURE,
    ),
]  # fmt: skip
Width = Annotated[str | None, typer.Option("--width", metavar="PX", help="Width. *", rich_help_panel=PICTURE)]
Height = Annotated[
    str | None, typer.Option("--height", metavar="PX", help="Height. *", rich_help_panel=PICTURE)
]
Steps = Annotated[
    str | None,
    typer.Option(
        "--steps", "--num-inference-steps", metavar="N", help="Denoising steps. *", rich_help_panel=PICTURE
    ),
]
Guidance = Annotated[
    str | None,
    typer.Option(
        "--guidance", "--guidance-scale", "--true-cfg-scale", metavar="X", help="Guidance scale. *",
        rich_help_panel=PICTURE,
    ),
]  # fmt: skip
Solver = Annotated[
    str | None,
    typer.Option(
        "--solver", "--sampler", metavar="NAME",
        help=f"{', '.join(SOLVERS)}: ab2 and dpm++2m come nearer to the exact solution in as many steps. "
        "[dim]default: the model's own[/] *",
        rich_help_panel=PICTURE,
    ),
]  # fmt: skip
Image = Annotated[
    str | None,
    typer.Option(
        "--image", metavar="FILE", help="Start from this picture (image-to-image). *", rich_help_panel=PICTURE
    ),
]
Strength = Annotated[
    str | None,
    typer.Option(
        "--strength", metavar="X", help="How far to leave --image, 0 to 1. [dim]default 0.6[/] *",
        rich_help_panel=PICTURE,
    ),
]  # fmt: skip
Replay = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="PICTURE", help="Repeat a picture made by edit; other options change it.",
        rich_help_panel=PICTURE,
    ),
]  # fmt: skip

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="MODEL",
        help="Registry name (edit models), folder, .safetensors file or hub id. "
        f"[dim]default {DEFAULT_MODELS['picture']}[/]",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="MODEL",
        help="For a single-file --model: what text encoders and VAE come from. "
        "[dim]default: the published model, if it is in the local cache[/]",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
Routers = Annotated[
    str | None,
    typer.Option(
        "--routers", metavar="PATH",
        help="Bundle folder, .safetensors file, or none. [dim]default: the model's own[/]",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", "-b", metavar="X",
        help="Share of the dense FLOPs to spend, 0 < X <= 1. [dim]default: what the routers recommend[/] *",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
Force = Annotated[
    bool,
    typer.Option(
        "--force", metavar="",
        help="Use routers fitted on other weights of the same architecture (a fine-tune).",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
LoraFiles = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="PATH[:SCALE]", help="LoRA weights; repeatable.", rich_help_panel=MODEL),
]

Output = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="PATH",
        help="File (.png .jpg .webp), folder, or template with {prompt} {seed} {index} {budget} {model}. "
        "[dim]default: named after the prompt[/] *",
        rich_help_panel=OUTPUT,
    ),
]  # fmt: skip
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        metavar="",
        help="Also run dense with the same seeds: side-by-side picture, PSNR, SSIM, measured time ratio.",
        rich_help_panel=OUTPUT,
    ),
]  # fmt: skip
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar="",
        help="Show plan, FLOPs and memory; load no weights, write nothing.",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", metavar="", help="Print one JSON object as the last line of stdout.", rich_help_panel=OUTPUT
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", metavar="", help="No progress, no table.", rich_help_panel=OUTPUT)
]

BatchSize = Annotated[
    str | None,
    typer.Option("--batch-size", metavar="N", help="Pictures generated together.", rich_help_panel=MACHINE),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="auto, cuda, cuda:N, mps or cpu.", rich_help_panel=MACHINE
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help=f"{', '.join(DTYPES)}.", rich_help_panel=MACHINE),
]
Offload = Annotated[
    str | None,
    typer.Option(
        "--offload",
        metavar="HOW",
        help=f"Keep weights off the GPU: {', '.join(OFFLOADS)}.",
        rich_help_panel=MACHINE,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", metavar="", help="torch.compile the transformer's blocks.", rich_help_panel=MACHINE
    ),
]
