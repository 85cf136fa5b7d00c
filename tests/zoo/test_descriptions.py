"""The derived description of every transformer class is the one that was written down for it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from routers.derive import Derived, derive
from routers.derive.table import rows
from routers.spec import RowsAt, TransformerSpec
from tests.zoo.catalogue import MODELS, PARAMS
from tests.zoo.expected import EXPECTED, NEEDS_VALUES
from tests.zoo.model import Model


@pytest.mark.parametrize("model", PARAMS)
def test_description(model: Model) -> None:
    derived = derive(model.build(), model.call())
    assert [str(row) for row in rows(derived)] == list(EXPECTED[model.name].rows)
    assert derived.left_in_full == EXPECTED[model.name].left
    assert facts(derived) == EXPECTED[model.name].facts
    real = any("real call" in note for note in derived.notes)
    assert real == (model.name in NEEDS_VALUES)
    assert TransformerSpec.from_dict(derived.spec.to_dict()) == derived.spec


def facts(derived: Derived) -> dict[str, Any]:
    """The fields of a description that differ from their defaults and are not in the table."""
    spec = derived.spec
    usual = asdict(TransformerSpec(spec.transformer_class, spec.blocks))
    found = {name: value for name, value in asdict(spec).items() if value != usual[name]}
    for block in spec.blocks:
        for name in ("ends", "arity", "fresh", "objects"):
            value = getattr(block, name)
            if value:
                found[f"{block.kind} {name}"] = list(value) if isinstance(value, tuple) else value
        if block.rows:
            found[f"{block.kind} rows"] = [_place(place) for place in block.rows]
    return found


def _place(place: RowsAt) -> str:
    axis = f" axis {place.axis}" if place.axis else ""
    return f"{place.path}{axis}{' folded' if place.folded else ''}"


def test_every_model_has_an_expectation() -> None:
    assert {model.name for model in MODELS} == set(EXPECTED)
