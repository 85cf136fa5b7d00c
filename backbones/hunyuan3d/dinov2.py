"""Transformers' DINOv2 under the published key names (those of transformers 4.x).

Transformers renamed its layers between 5.12 and 5.24, and a checkpoint's in `from_pretrained` only. Here
`load_state_dict` and `state_dict` do it, so a checkpoint loads as it is, memory-mapped, and is written alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, cat, nn

NAMES = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
    "mlp.weights_out.": "mlp.down_proj.",
}
"""Published name -> the module's."""
STACKED, GATE, UP = "mlp.weights_in.", "mlp.gate_proj.", "mlp.up_proj."
"""Two linears of the module are the halves of one published linear."""
OLDER_SETTINGS = frozenset({"torch_dtype", "out_features", "out_indices", "stage_names", "_name_or_path"})
"""What older dumps of a Dinov2Config hold besides its fields; without effect here."""


def build_dinov2(settings: Mapping[str, Any]) -> Any:
    """A Dinov2Model of a Dinov2Config dump. Raises ValueError on settings that it does not have."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Dinov2Config, Dinov2Model  # imports for a second; only a mesh run needs it

    unknown = set(settings) - set(Dinov2Config().to_dict()) - OLDER_SETTINGS
    if unknown:
        raise ValueError(f"unknown Dinov2Config keys {sorted(unknown)}")
    try:
        model = Dinov2Model(
            Dinov2Config(**{key: value for key, value in settings.items() if key not in OLDER_SETTINGS})
        )
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if any(".q_proj." in name for name, _ in model.named_parameters()):
        model.register_load_state_dict_pre_hook(_from_published)
        model.register_state_dict_post_hook(_to_published)
    return model


def _from_published(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename in place; the halves of a stacked linear are views."""
    for key in [key for key in state if key.startswith(prefix)]:
        tensor = state.pop(key)
        if STACKED in key:
            state[key.replace(STACKED, GATE)], state[key.replace(STACKED, UP)] = tensor.chunk(2)
        else:
            state[_renamed(key, NAMES)] = tensor


def _to_published(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    back = {name: published for published, name in NAMES.items()}
    for key in [key for key in state if key.startswith(prefix) and UP not in key]:
        tensor = state.pop(key)
        if GATE in key:
            tensor = cat([tensor, state.pop(key.replace(GATE, UP))])
        state[_renamed(key, back | {GATE: STACKED})] = tensor


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key
