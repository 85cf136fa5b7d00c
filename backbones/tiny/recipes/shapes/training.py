"""What both training steps share: options, and how their models run fast on a CPU."""

import argparse
from pathlib import Path

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backbones.tiny.recipes.training import arguments as common_arguments


def plain_attention():
    """Context: attention as two products; the fused CPU kernel's backward pass is far slower here."""
    return sdpa_kernel([SDPBackend.MATH])


def compile_blocks(modules: list[nn.Module], enabled: bool) -> None:
    """Compile modules in place; their parameters keep their names."""
    if enabled:
        for module in modules:
            module.compile(dynamic=False)


def arguments(description: str | None, out: str, minutes: float) -> argparse.ArgumentParser:
    """The options that the training steps share."""
    parser = common_arguments(description, Path(out), minutes, 2e-3)
    parser.set_defaults(data=Path("runs/shapes/data"))
    parser.add_argument("--puff-share", type=float, default=0.55, help="share of inflated silhouettes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check-minutes", type=float, default=8.0, help="between held-out checks")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of the log")
    return parser
