"""Read and write checkpoints as published: `config.yaml` + `model[.variant].{safetensors,ckpt}`.

Modules are built on the meta device and take over memory-mapped tensors, so weights lie in memory once.
Loading is strict: a missing or left-over key, an unknown setting or a wrong shape is a ModelError.
Pickle files are read with `weights_only=True` and nothing else.
"""

# mypy: no-warn-return-any
from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones import static_folder as static
from backbones.model_files import ModelError

from .config import COMPONENTS, SECTIONS, build, read_config
from .family import TRANSFORMER_2, TRANSFORMER_21
from .folders import find_weights, resolve_folder
from .pipeline import Hunyuan3DPipeline

State = dict[str, Tensor]


def read_weights(path: Path) -> dict[str, State]:
    """Memory-mapped tensors by component. A flat VAE-only file is returned under "vae"."""
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(tensors.get("state_dict"), Mapping):
        tensors = {"model": _strip_training_prefixes(tensors["state_dict"], path)}
    if tensors and all(isinstance(value, Mapping) for value in tensors.values()):
        nested = {str(name): dict(state) for name, state in tensors.items()}
        if not all(isinstance(value, Tensor) for state in nested.values() for value in state.values()):
            raise ModelError(f"{path} holds something else than tensors; it is no Hunyuan3D checkpoint")
        return nested
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ModelError(f"{path} holds something else than tensors; it is no Hunyuan3D checkpoint")
    if all(key.split(".", 1)[0] in COMPONENTS for key in tensors):
        components: dict[str, State] = {}
        for key, tensor in tensors.items():
            name, rest = key.split(".", 1)
            components.setdefault(name, {})[rest] = tensor
        return components
    return {"vae": tensors}


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"refused {path}: it holds more than tensors, so loading could run code; use a .safetensors file"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"cannot read {path}: {reason}") from error
    if not isinstance(data, Mapping):
        raise ModelError(f"{path} must hold a mapping, not {type(data).__name__}")
    return dict(data)


def _strip_training_prefixes(state: Mapping[str, Tensor], path: Path) -> State:
    """Names of a training dump (`_forward_module.model.*`) to the transformer's own."""
    stripped = {}
    for key, tensor in state.items():
        name = key.removeprefix("_forward_module.")
        if not name.startswith("model."):
            raise ModelError(f"{path}: key {key!r} of the training dump does not belong to the model")
        stripped[name.removeprefix("model.")] = tensor
    return stripped


def check_keys(module: nn.Module, found: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Compare names and shapes with the module's own. Raises ModelError with the first offenders."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    problems = []
    for label, keys in (
        ("missing", expected.keys() - found.keys()),
        ("left over", found.keys() - expected.keys()),
    ):
        if keys:
            problems.append(f"{len(keys)} {label}, first {sorted(keys)[0]}")
    wrong = sorted(key for key in expected.keys() & found.keys() if expected[key] != tuple(found[key]))
    if wrong:
        problems.append(
            f"{len(wrong)} of wrong shape, first {wrong[0]} {list(found[wrong[0]])} instead of "
            f"{list(expected[wrong[0]])}"
        )
    if problems:
        raise ModelError(f"{name} weights do not fit the config: {'; '.join(problems)}")


def load_weights(module: nn.Module, state: State, name: str) -> None:
    """Give a module (on the meta device or not) exactly these tensors, without copying them."""
    check_keys(module, {key: tuple(tensor.shape) for key, tensor in state.items()}, name)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


def build_component(
    name: str, spec: Mapping[str, Any], state: State, folder: Path | None = None
) -> nn.Module:
    """A module of a config section with its weights. A VAE without encoder weights becomes a decoder only.

    folder: where a static transformer's shape is looked up. Raises ModelError, ModelError.
    """
    overrides = {"with_encoder": any(key.startswith("encoder.") for key in state)} if name == "vae" else {}
    with torch.device("meta"):
        module = build(name, spec, **overrides)
        if name == "model" and static.read_shape(folder) is not None:
            kinds = {kind.transformer_class: kind for kind in (TRANSFORMER_2, TRANSFORMER_21)}
            static.narrow_like(module, kinds[type(module).__name__], folder)
    load_weights(module, state, name)
    return module


def load_pipeline(
    model: str | Path,
    *,
    subfolder: str | None = None,
    variant: str | None = "fp16",
    vae: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    offload: bool = False,
) -> Hunyuan3DPipeline:
    """A pipeline from a published folder or hub id.

    vae: a VAE-only folder or hub id to use instead of the checkpoint's own (the turbo decoders).
    dtype: None keeps the file's. Raises ModelError.
    """
    folder = resolve_folder(model, subfolder, variant)
    config, states = read_config(folder / "config.yaml"), read_weights(find_weights(folder, variant))
    required = {"model", "scheduler", "image_processor"} | (set() if vae else {"vae"})
    lacking = required - set(config)
    extra = set(states) - set(config)
    if lacking or extra:
        raise ModelError(f"{folder}: config.yaml lacks the sections {sorted(lacking | extra)}")
    absent = ({"model"} | (set() if vae else {"vae"})) - set(states)
    if absent:
        raise ModelError(f"{folder}: the weights lack {sorted(absent)}")
    if vae:
        states.pop("vae", None)
    parts = {
        name: build_component(name, config[name], states[name], folder)
        for name in COMPONENTS
        if name in states
    }
    pipe: Hunyuan3DPipeline = build(
        "pipeline",
        config.get("pipeline", {"target": "Hunyuan3DDiTFlowMatchingPipeline"}),
        transformer=parts["model"],
        vae=load_vae(vae, variant=variant) if vae else parts["vae"],
        conditioner=parts.get("conditioner"),
        scheduler=build("scheduler", config["scheduler"]),
        image_processor=build("image_processor", config["image_processor"]),
    )
    return pipe.to(device, dtype, offload)


def load_vae(model: str | Path, *, subfolder: str | None = None, variant: str | None = "fp16") -> nn.Module:
    """A shape VAE from a VAE-only folder or from a pipeline's."""
    folder = resolve_folder(model, subfolder, variant)
    config, states = read_config(folder / "config.yaml"), read_weights(find_weights(folder, variant))
    if "vae" not in config or "vae" not in states:
        raise ModelError(f"{folder} holds no VAE")
    return build_component("vae", config["vae"], states["vae"])


def save_checkpoint(folder: Path, config: Mapping[str, Any], components: Mapping[str, nn.Module]) -> None:
    """Write `config.yaml` and `model.safetensors` in the published layout; each appears whole or not at all.

    config: sections `{target, params}` as `read_config` returns them. components: e.g. `pipe.components`.
    """
    unknown = (set(config) - set(SECTIONS)) | (set(components) - set(COMPONENTS))
    if unknown:
        raise ModelError(f"unknown sections {sorted(unknown)}; known are {', '.join(SECTIONS)}")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, module in components.items()
        for key, tensor in module.state_dict().items()
    }
    partial = folder / ".model.safetensors.part"
    save_file(tensors, partial)
    os.replace(partial, folder / "model.safetensors")
    partial = folder / ".config.yaml.part"
    partial.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    os.replace(partial, folder / "config.yaml")
