"""`edit export --format torch-export`: the transformer, static or dense, as one program without Python code.

A `.pt2` file of torch.export holds the graph of one call for fixed shapes, and its weights. It needs PyTorch
and nothing of this package. A process of its own runs it before it is kept.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backbones import registry
from backbones.model_files import first_line
from backbones.spec import CallSize
from edit_cli.console import two_columns
from edit_cli.errors import EditError, RunError
from edit_cli.export.source import Source, freeze
from edit_cli.export.write import Say
from edit_cli.request import Request
from routers.calls import first_tensor, flatten, unflatten

FILE = "transformer.pt2"
TEXT_TOKENS = 64
"""Of models whose prompts have any length, unless asked otherwise."""
TOLERANCE = 1e-4
"""Largest difference in a fresh process, relative to the largest output; half precision: `HALF_TOLERANCE`."""
HALF_TOLERANCE = 3e-2

CHECK = """
import sys, torch
from safetensors.torch import load_file, save_file
inputs = load_file(sys.argv[2])
with torch.no_grad():
    output = torch.export.load(sys.argv[1]).module()(*(inputs[name] for name in sorted(inputs)))
save_file({"output": output.contiguous()}, sys.argv[3])
"""
"""What the fresh process runs; inputs are named by their position."""


class Call(nn.Module):
    """One transformer call with tensors as positional arguments and everything else fixed.

    arguments: by name; a tensor, a `{name: tensor}`, or a constant. `names`: the tensors', in order.
    """

    def __init__(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.transformer = transformer
        tensors, self.constants = flatten(arguments)
        self.names = list(tensors)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The model's output `[B, L, C]`."""
        arguments = unflatten(dict(zip(self.names, tensors, strict=True)), self.constants)
        return first_tensor(self.transformer(**arguments))


def fill(source: Source, request: Request, folder: Path, say: Say) -> dict[str, Any]:
    """Write the program. Raises EditError, ValueError; RunError for a model that cannot be traced or a
    program that gives something else.
    """
    transformer: nn.Module = source.transformer
    flops = 1.0
    if request["budget"] < 1:
        frozen = freeze(source, request["budget"], say)
        transformer, flops = frozen.transformer, frozen.choice.flops
    arguments = call_inputs(source, request.get("batch_size", 1), request.get("text_tokens"))
    call = Call(transformer.eval(), arguments)
    tensors = list(flatten(arguments)[0].values())
    say("tracing")
    write_program(call, tensors, folder / FILE)
    say("running it in a fresh process")
    difference = check_program(call, tensors, folder / FILE)
    return {
        "torch": torch.__version__,
        "model": source.backbone.name,
        "budget": request["budget"],
        "flops": round(flops, 4),
        "inputs": [
            {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in zip(call.names, tensors, strict=True)
        ],
        "fixed": {name: repr(value) for name, value in call.constants.items()},
        "difference": difference,
    }


def call_inputs(source: Source, batch: int, text_tokens: int | None) -> dict[str, Any]:
    """Arguments of one call at the model's default size, tensors filled with noise from seed 0."""
    backbone = source.backbone
    if source.backbone.makes == "mesh":
        if text_tokens is not None:
            raise EditError("--text-tokens is for models that read text; leave it out for this one")
        size = CallSize(batch)
    else:
        tokens = text_tokens or backbone.defaults.max_sequence_length or TEXT_TOKENS
        size = CallSize(batch, backbone.defaults.width or 0, backbone.defaults.height or 0, tokens)
    arguments = backbone.family.call_inputs(registry.component_configs(backbone), size)
    like = next(source.transformer.parameters())
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: fill(key, inner) for key, inner in value.items()}
        if not isinstance(value, Tensor):
            return value
        if name.endswith("_ids"):  # positions, in pixels of the latents
            return torch.arange(value.numel(), dtype=torch.float32).view(value.shape).remainder(16).to(like)
        draw = torch.rand if value.dim() == 1 else torch.randn
        return draw(value.shape, generator=generator).to(like)

    return {name: fill(name, value) for name, value in arguments.items()}


def write_program(call: Call, tensors: list[Tensor], file: Path) -> None:
    """Trace and save. Raises RunError, one line, if the model cannot be traced."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(call, tuple(tensors), strict=False)
            torch.export.save(program, file)
    except Exception as error:  # the tracer raises anything
        name = type(call.transformer).__name__
        raise RunError(f"{name} cannot be exported: {type(error).__name__}: {first_line(error)}") from error


def check_program(call: Call, tensors: list[Tensor], file: Path) -> float:
    """Largest difference of the program, run in a fresh process, from the model, relative to the output.

    Raises RunError if it is more than rounding, or if the process fails.
    """
    with torch.no_grad():
        expected = call(*tensors).float().cpu()
    with tempfile.TemporaryDirectory(prefix="edit-export-") as folder:
        given, got = Path(folder) / "inputs.safetensors", Path(folder) / "output.safetensors"
        save_file({f"{i:02d}": t.cpu().contiguous() for i, t in enumerate(tensors)}, given)
        command = [sys.executable, "-c", CHECK, str(file), str(given), str(got)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode or not got.is_file():
            last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"the exported program does not run in a fresh process: {last[:200]}")
        output = load_file(got)["output"].float()
    if output.shape != expected.shape:
        raise RunError(f"the exported program gives {list(output.shape)}, not {list(expected.shape)}")
    difference = float((output - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    half = next(call.transformer.parameters()).dtype != torch.float32
    if not difference <= (HALF_TOLERANCE if half else TOLERANCE):
        raise RunError(
            f"the exported program differs by {difference:g} of the largest output; nothing was kept"
        )
    return difference


def model_card(facts: Mapping[str, Any], source: Source, name: str) -> str:
    """README.md: how to call the program."""
    inputs = "\n".join(f"| {i['name']} | {i['shape']} | {i['dtype']} |" for i in facts["inputs"])
    return f"""# {name}

The transformer of `{facts["model"]}` at {facts["flops"]:.1%} of its FLOPs, as a program of
PyTorch {facts["torch"]} (`torch.export`). Shapes are fixed; the inputs, in order:

| input | shape | dtype |
|---|---|---|
{inputs}

    program = torch.export.load("{FILE}").module()
    output = program({", ".join(i["name"].replace(".", "_") for i in facts["inputs"])})

The licence of the original model applies.
"""


def as_table(facts: Mapping[str, Any]) -> Any:
    """What was written, for people."""
    inputs = ", ".join(f"{i['name']} {i['shape']}" for i in facts["inputs"])
    return two_columns(
        {
            "written": f"{facts['output']} ({FILE}, {facts['bytes'] / 2**20:.2f} MiB)",
            "transformer": f"{facts['model']} at {facts['flops']:.1%} of its FLOPs",
            "inputs": f"{inputs}, {facts['inputs'][0]['dtype']}",
            "checked": f"run in a fresh process, largest relative difference {facts['difference']:.1e}",
        }
    )
