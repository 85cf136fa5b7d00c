"""Read and write checkpoints as published: `config.yaml` + `model[.variant].{safetensors,ckpt}`.

Modules are built on the meta device and take over memory-mapped tensors, so weights lie in memory once.
Loading is strict: a missing or left-over key, an unknown setting or a wrong shape is a ModelError.
Pickle files are read with `weights_only=True` and nothing else.
"""

# mypy: no-warn-return-any
from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones.model_files import STATIC, ModelError, load_weights
from backbones.model_folder import read_model_folder
from backbones.spec import HUNYUAN3D
from routers.files import write_whole

from .config import COMPONENTS, SECTIONS, build, read_config
from .family import TRANSFORMER_2, TRANSFORMER_21
from .folders import find_weights, resolve_folder
from .pipeline import Hunyuan3DPipeline
from .shape_vae import ENCODER_KEYS

State = dict[str, Tensor]


def read_weights(path: Path) -> dict[str, State]:
    """Memory-mapped tensors by component. Raises ModelError."""
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(tensors.get("state_dict"), Mapping):
        tensors = {"model": _strip_training_prefixes(tensors["state_dict"], path)}
    components: dict[str, State] = {}
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            components[name] = dict(value)
        else:
            component, _, rest = name.partition(".")
            components.setdefault(component, {})[rest] = value
    stored = [value for state in components.values() for value in state.values()]
    if (
        not stored
        or not all(isinstance(value, Tensor) for value in stored)
        or set(components) - set(COMPONENTS)
    ):
        raise ModelError(
            f"{path} holds something other than the tensors of {', '.join(COMPONENTS)}; "
            "it is not a Hunyuan3D checkpoint"
        )
    return components


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


def build_component(
    name: str, spec: Mapping[str, Any], state: State, folder: Path | None = None
) -> nn.Module:
    """A module of a config section with its weights; those of a VAE's encoder are passed over.

    folder: where a static transformer's shape is looked up. Raises ModelError.
    """
    if name == "vae":
        state = {key: tensor for key, tensor in state.items() if not key.startswith(ENCODER_KEYS)}
    with torch.device("meta"):
        module = build(name, spec)
        if name == "model" and folder is not None and STATIC in read_model_folder(folder).says:
            from backbones.static_folder import narrow_like

            kinds = {kind.transformer_class: kind for kind in (TRANSFORMER_2, TRANSFORMER_21)}
            narrow_like(module, kinds[type(module).__name__], folder)
    load_weights(module, state, name)
    return module.requires_grad_(False).eval()


def load_component(name: str, folder: Path) -> nn.Module:
    """One module of a published folder, in its file's dtype, on the CPU. Raises ModelError."""
    config, states = read_config(folder / HUNYUAN3D), read_weights(find_weights(folder))
    if name not in states or name not in config:
        raise ModelError(f"{folder}: there is no {name!r} in it")
    return build_component(name, config[name], states[name], folder)


def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    offload: bool = False,
) -> Hunyuan3DPipeline:
    """A pipeline from a published folder or hub id. dtype: None keeps the file's. Raises ModelError."""
    folder = resolve_folder(model)
    config, states = read_config(folder / HUNYUAN3D), read_weights(find_weights(folder))
    lacking = {"model", "vae", "scheduler", "image_processor", *states} - set(config)
    if lacking:
        raise ModelError(f"{folder}: config.yaml lacks the sections {sorted(lacking)}")
    absent = {"model", "vae"} - set(states)
    if absent:
        raise ModelError(f"{folder}: the weights lack {sorted(absent)}")
    parts = {name: build_component(name, config[name], state, folder) for name, state in states.items()}
    pipe: Hunyuan3DPipeline = build(
        "pipeline",
        config.get("pipeline", {"target": "Hunyuan3DDiTFlowMatchingPipeline"}),
        transformer=parts["model"],
        vae=parts["vae"],
        conditioner=parts.get("conditioner"),
        scheduler=build("scheduler", config["scheduler"]),
        image_processor=build("image_processor", config["image_processor"]),
    )
    return pipe.to(device, dtype, offload)


def save_checkpoint(folder: Path, config: Mapping[str, Any], components: Mapping[str, nn.Module]) -> None:
    """Write `config.yaml` and `model.safetensors` in the published layout; both appear whole or not at all.

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
    text = yaml.safe_dump(dict(config), sort_keys=False)
    write_whole(
        {
            folder / "model.safetensors": lambda name: save_file(tensors, name),
            folder / HUNYUAN3D: lambda name: Path(name).write_text(text, encoding="utf-8"),
        }
    )
