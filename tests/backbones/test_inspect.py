"""`edit models --inspect`: a folder's transformers described from their configs alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backbones.inspect import InspectError, inspect_folder
from tests.zoo.catalogue import MODELS, PARAMS
from tests.zoo.expected import EXPECTED, NOT_GUESSED
from tests.zoo.model import Model


def save(folder: Path, **components: Model) -> Path:
    """A pipeline folder with nothing in it but configs."""
    index = {name: ["diffusers", model.name] for name, model in components.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline", "vae": [], **index}))
    for name, model in components.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"_class_name": model.name, **model.config}))
    return folder


@pytest.mark.parametrize("model", PARAMS)
def test_a_folder_of_configs_is_described_like_a_traced_call(tmp_path: Path, model: Model) -> None:
    folder = save(tmp_path, transformer=model)
    if model.name in NOT_GUESSED:
        with pytest.raises(InspectError, match=f"{model.name} cannot be described without a call"):
            inspect_folder(folder)
        return
    (found,) = inspect_folder(folder)
    assert (found.component, found.transformer) == ("transformer", model.name)
    assert [str(row) for row in found.rows] == list(EXPECTED[model.name].rows)
    assert found.left_in_full == EXPECTED[model.name].left


def test_every_transformer_of_a_pipeline_is_described(tmp_path: Path) -> None:
    wan = next(model for model in MODELS if model.name == "WanTransformer3DModel")
    found = inspect_folder(save(tmp_path, transformer=wan, transformer_2=wan))
    assert [inspection.component for inspection in found] == ["transformer", "transformer_2"]
    assert found[0].rows == found[1].rows


def test_a_folder_that_cannot_be_inspected_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InspectError, match=r"has no model_index\.json"):
        inspect_folder(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": []}))
    with pytest.raises(InspectError, match="has no transformer"):
        inspect_folder(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": []}))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "AutoPipelineForAll"}))
    with pytest.raises(InspectError, match="AutoPipelineForAll is not a model of the installed diffusers"):
        inspect_folder(tmp_path)
