"""What is true of a model of the zoo, written down.

A row reads "list block: streams -> positions in the return; time argument; in-linear > out-linear", with
"gate * linear" for gated MLPs of three linears and "2x linear" for fused ones. `facts` are the fields of the
description that differ from their defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Expected:
    """rows: of the table. left: lists that run in full, with the reason. facts: what else is not as usual."""

    rows: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
