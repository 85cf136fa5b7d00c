"""What `calibrate --method train` adds to a bundle: routers, their profile, and weights of the backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .backbone import FILE, BackboneWeights
from .policy import Array, Profile


@dataclass
class Trained:
    """routers: the tensors of each block's. profile: what they spend at each step. trend [N]: how far closed
    blocks continue what they added before; None: they add nothing. backbone: weights trained with them, or
    None.
    """

    routers: list[dict[str, Tensor]]
    profile: Profile
    trend: Array | None = None
    backbone: BackboneWeights | None = None

    @classmethod
    def read(cls, path: str | Path, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trained:
        """From a bundle's place, description and tensors. Raises ValueError, KeyError."""
        routers: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("routers."):
                _, index, name = key.split(".", 2)
                routers.setdefault(int(index), {})[name] = value
        budgets, spend = (tensors[f"profile.{name}"].double().numpy() for name in ("budgets", "spend"))
        backbone = data["backbone"]
        return cls(
            [routers[i] for i in range(len(routers))],
            Profile(budgets, spend),
            tensors["profile.trend"].double().numpy() if "profile.trend" in tensors else None,
            None if backbone is None else BackboneWeights.read(Path(path), backbone),
        )

    def tensors(self) -> dict[str, Tensor]:
        """What goes into the bundle's file of tensors."""
        return {
            **{f"routers.{i}.{k}": v.contiguous() for i, r in enumerate(self.routers) for k, v in r.items()},
            "profile.budgets": torch.from_numpy(self.profile.budgets),
            "profile.spend": torch.from_numpy(self.profile.spend),
            **({} if self.trend is None else {"profile.trend": torch.from_numpy(self.trend)}),
        }

    def description(self) -> dict[str, Any]:
        """JSON data. `per_sample` is for versions that also knew routers beside plans."""
        backbone = None if self.backbone is None else self.backbone.description()
        return {"per_sample": True, "backbone": backbone}

    def files(self, folder: Path) -> dict[Path, Callable[[str], object]]:
        """Files of the bundle's folder that hold the backbone's weights, with their writers."""
        if self.backbone is None:
            return {}
        tensors = {name: tensor.contiguous() for name, tensor in self.backbone.tensors.items()}
        return {folder / FILE: partial(save_file, tensors)}
