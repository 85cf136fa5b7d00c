"""LoRA files into a pipeline: spellings that diffusers does not know, and what of a file finds no place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from backbones.lycoris import as_lora, is_lycoris
from backbones.model_files import ModelError, first_line, read_json
from backbones.model_folder import read_header
from backbones.spec import Lora

OTHER_KINDS = {"oft_": "OFT", "boft_": "BOFT", "ia3_": "IA3"}
"""Parts of weights' names, and which kind of adapter has them."""
READ = "weights named lora_A and lora_B, or lora_down and lora_up, of a LoKr or of a LoHa"
PEFT_PREFIX = "base_model.model."
PEFT_SETTINGS = "adapter_config.json"
LAYER = re.compile(r"\.lora(_A|\.down|_down)\.(?:\w+\.)?weight$")
"""The end of one of the two weights that every layer of a LoRA has."""


class TooStrongError(ModelError):
    """What a LoRA adds at its scale is more than numbers can hold."""


def add_loras(pipe: Any, loras: tuple[Lora, ...]) -> list[str]:
    """Load LoRAs at their scales, one at least. Returns what of them has no effect. Raises ModelError."""
    notes, scales = [], []
    for i, lora in enumerate(loras):
        note, own = _add(pipe, lora, f"lora_{i}")
        notes += note
        scales.append(lora.scale * own)
    pipe.set_adapters([f"lora_{i}" for i in range(len(loras))], scales)
    _check_strength(pipe, loras)
    return notes


def _check_strength(pipe: Any, loras: tuple[Lora, ...]) -> None:
    """Norms square what they are given: infinite squares become zeros there, and a picture of nothing."""
    for module in pipe.transformer.modules():
        for i, lora in enumerate(loras):
            name = f"lora_{i}"
            if name not in getattr(module, "lora_A", ()):
                continue
            down, up = (getattr(module, part)[name].weight.float() for part in ("lora_A", "lora_B"))
            added = down.norm() * up.norm() * module.scaling[name]
            if not (added * added).isfinite():
                raise TooStrongError(
                    f"--lora {str(lora.path)!r}: the numbers overflowed at scale {lora.scale:g}; give a "
                    "smaller one, usual are 0.5 to 1"
                )


def _add(pipe: Any, lora: Lora, name: str) -> tuple[list[str], float]:
    """Notes, and the scale that comes with the file."""
    if not hasattr(pipe, "load_lora_weights"):
        raise ModelError(f"--lora is not for {type(pipe).__name__}, which takes none; leave it out")
    source, where, own = _source(pipe, lora)
    try:
        held = pipe.lora_state_dict(dict(source) if isinstance(source, dict) else source, **where)
        pipe.load_lora_weights(source, adapter_name=name, **where)
    except Exception as error:  # diffusers and peft raise anything from KeyError to RuntimeError here
        raise ModelError(
            f"--lora {str(lora.path)!r} does not fit {type(pipe).__name__}: {first_line(error)[:120]}"
        ) from error
    if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
        raise ModelError(
            f"--lora {str(lora.path)!r} does not hold weights for {type(pipe).__name__}; read are {READ}"
        )
    return _without_effect(pipe, lora, name, held[0] if isinstance(held, tuple) else held), own


def _source(pipe: Any, lora: Lora) -> tuple[Any, dict[str, Any], float]:
    """What diffusers is given: a folder and the file in it, or weights with names that it knows."""
    where: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    file = lora.path
    if file.is_dir():
        inside = sorted(file.glob("*.safetensors"))
        if len(inside) != 1:
            return str(file), where, 1.0
        (file,) = inside
    names = read_header(file)
    for part, kind in OTHER_KINDS.items():
        if any(f".{part}" in name for name in names):
            raise ModelError(
                f"--lora {str(lora.path)!r} is of the kind {kind}, which is not read; give {READ}"
            )
    other = is_lycoris(names)
    prefix = PEFT_PREFIX if all(name.startswith(PEFT_PREFIX) for name in names) else ""
    parts = {name.removeprefix(prefix).split(".")[0] for name in names}
    if not other and (not parts or not all(hasattr(pipe.transformer, part) for part in parts)):
        return str(file.parent), {**where, "weight_name": file.name}, 1.0
    from safetensors.torch import load_file

    held, scale = load_file(file), _peft_scale(file.with_name(PEFT_SETTINGS))
    if not other:
        return {f"transformer.{name.removeprefix(prefix)}": held[name] for name in held}, {}, scale
    try:
        return as_lora(held, pipe.transformer), {}, scale
    except ValueError as error:
        raise ModelError(f"--lora {str(lora.path)!r}: {error}; give {READ}, of linear layers") from error


def _peft_scale(file: Path) -> float:
    """Alpha over rank, which PEFT writes beside the weights."""
    settings = read_json(file) if file.is_file() else {}
    alpha, rank = settings.get("lora_alpha") or settings.get("alpha"), settings.get("r")
    return float(alpha) / float(rank) if alpha and rank else 1.0


def _without_effect(pipe: Any, lora: Lora, name: str, held: dict[str, Any]) -> list[str]:
    """One line on the layers of a file that are in no component of the pipeline."""
    layers = [key[: match.start()] for key in held if (match := LAYER.search(key))]
    lost = [layer for layer in layers if not _is_loaded(pipe, layer, name)]
    if not lost:
        return []
    return [
        f"--lora {lora.path.name!r}: {len(lost)} of its {len(layers)} layers match nothing in this model and "
        f"have no effect, {lost[0]} among them"
    ]


def _is_loaded(pipe: Any, layer: str, name: str) -> bool:
    component, _, path = layer.partition(".")
    try:
        module = getattr(pipe, component).get_submodule(path)
    except AttributeError:
        return False
    return name in getattr(module, "lora_A", ())
