"""The registry: torch-free, names with suggestions, folders recognised by their pipeline class."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from operator import attrgetter

import pytest

from backbones import registry
from backbones.model_files import ModelError
from backbones.pipeline_call import GIVES, known_call, variant
from backbones.spec import DIFFUSERS, PACKAGE_FOLDER

FAMILIES = {family.name: family for family in registry.FAMILIES if family.layout == DIFFUSERS}
HUB_ROWS = [name for name, row in registry.rows().items() if not row.packaged]
TABLE = {row["name"]: row for row in json.loads((PACKAGE_FOLDER / "models.json").read_text())}
DESCRIBED = [name for name in HUB_ROWS if "pipeline" not in TABLE[name]]
NAMED = [name for name in HUB_ROWS if "pipeline" in TABLE[name]]


def test_importing_it_imports_no_torch():
    code = "import sys, edit_cli.main, backbones.registry as r; r.rows(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", NAMED)
def test_rows_that_name_a_pipeline_agree_with_its_source(name):
    row = registry.resolve(name)
    call = known_call(row.family.pipeline_class)
    assert GIVES[call.gives] == row.makes
    assert registry.resolve(row.source) == row
    assert row.parameters == 0 or row.parameters > row.transformer_parameters
    assert call.guidance is not None or not row.takes_guidance
    for given in ("width", "height", "frames"):
        assert getattr(row.defaults, given) is None or call.argument(given)
    assert len(call.required) == 0 and call.argument("prompt")


@pytest.mark.parametrize("name", DESCRIBED)
def test_hub_rows_agree_with_their_shipped_configs(name):
    from backbones.loading import meta_transformer

    row = registry.resolve(name)
    transformer = meta_transformer(row)
    assert type(transformer).__name__ == row.family.transformer.transformer_class
    count = sum(p.numel() for p in transformer.parameters())
    assert row.parameters > row.transformer_parameters == count
    assert registry.resolve(row.source) == row
    traits = row.family.traits(registry.component_configs(row))
    shared = ["guided", "takes_guidance", "size_multiple"]
    if row.makes == "picture":
        shared += ["defaults"] if "configs" not in TABLE[name] else []
        assert row.defaults.width % row.size_multiple == 0
    assert [getattr(row, field) for field in shared] == [getattr(traits, field) for field in shared]


@pytest.mark.parametrize("family", FAMILIES)
def test_specs_name_what_diffusers_has(family, qwen_folder, flux_folder):
    """Every path, argument and MLP of a family's spec exists in the installed diffusers."""
    import inspect

    import diffusers
    import torch

    family = FAMILIES[family]
    spec = family.transformer
    folder = {"QwenImagePipeline": qwen_folder, "FluxPipeline": flux_folder}[family.pipeline_class]
    transformer_class = getattr(diffusers, spec.transformer_class)
    transformer = transformer_class.from_pretrained(folder, subfolder="transformer")
    names = inspect.signature(transformer_class.forward).parameters
    assert spec.timestep in names
    assert spec.sample in names
    for block in spec.blocks:
        first = attrgetter(block.path)(transformer)[0]
        assert type(first).__name__ == block.block_class
        arguments = inspect.signature(first.forward).parameters
        assert {*block.streams, block.modulation, *block.batched} <= set(arguments)
        for mlp in block.mlps:
            inner, outer = attrgetter(mlp.in_linear)(first), attrgetter(mlp.out_linear)(first)
            dim = outer.out_features
            assert inner.out_features - mlp.in_offset * dim == outer.in_features - mlp.out_offset * dim
            assert isinstance(attrgetter(mlp.activation)(first), torch.nn.Module)
    pipeline = getattr(diffusers, family.pipeline_class)
    parameters = inspect.signature(pipeline.__call__).parameters
    assert known_call(family.pipeline_class).guidance in parameters
    pictures = variant(family.pipeline_class, ("image",)).pipeline
    assert {"image", "strength"} <= set(inspect.signature(getattr(diffusers, pictures).__call__).parameters)


def test_folders_are_recognised_by_their_pipeline_class(qwen_folder, flux_folder):
    qwen, flux = registry.resolve(str(qwen_folder)), registry.resolve(str(flux_folder))
    assert (qwen.family.name, flux.family.name) == ("Qwen-Image", "FLUX.1")
    assert (qwen.defaults.width, qwen.defaults.steps, qwen.defaults.guidance) == (64, 4, 4.0)
    assert (flux.defaults.max_sequence_length, flux.defaults.guidance) == (32, 3.5)
    assert qwen.bundle == qwen_folder / "routers"
    assert qwen.parameters == sum(registry.component_parameters(qwen).values())
    assert set(registry.component_parameters(qwen)) == {"transformer", "text_encoder", "vae"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen-imge", "did you mean qwen-image"),
        ("FLUX-DEV", "did you mean flux-dev"),
        ("zzz", "known are"),
        ("a/b/c/d", "does not exist"),
    ],
)
def test_unknown_names_get_a_hint(name, message):
    with pytest.raises(ModelError, match=message):
        registry.resolve(name)


def test_unknown_defaults_are_refused(tmp_path, qwen_folder):
    folder = tmp_path / "copy"
    shutil.copytree(qwen_folder, folder)
    (folder / "edit.json").write_text(json.dumps({"widht": 64}))
    with pytest.raises(ModelError, match=r"unknown keys \['widht'\]; allowed are width, height"):
        registry.resolve(str(folder))


def test_mesh_models_resolve_by_name_hub_id_and_folder(mesh_folder):
    assert registry.resolve("tencent/Hunyuan3D-2mini").name == "hunyuan3d-2mini"
    assert registry.resolve("tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0-turbo").name == "hunyuan3d-2-turbo"
    assert registry.resolve("tencent/Hunyuan3D-2").name == "hunyuan3d-2"
    found = registry.resolve(str(mesh_folder))
    assert (found.family.name, found.defaults.octree_resolution) == ("Hunyuan3D 2", 24)
    assert found.bundle == mesh_folder / "routers"
    assert found.parameters == sum(registry.component_parameters(found).values()) > 0


@pytest.mark.parametrize("model", ["hunyuan3d-2.1", "tencent/Hunyuan3D-2", "folder"])
def test_a_model_of_another_kind_is_refused_by_name_hub_id_and_folder(model, mesh_folder):
    model = str(mesh_folder) if model == "folder" else model
    with pytest.raises(
        ModelError, match=rf"{re.escape(model)}' makes meshes: use `edit generate-3d -m {re.escape(model)}`"
    ):
        registry.resolve(model, makes="picture")
    assert registry.resolve(model, makes="mesh").makes == registry.resolve(model).makes == "mesh"
    with pytest.raises(ModelError, match="'flux-dev' makes pictures: use `edit generate -m flux-dev`"):
        registry.resolve("flux-dev", makes="mesh")


@pytest.mark.parametrize("model", ["tencent/Hunyuan3D-3", "tencent/Hunyuan3D-3/turbo", "someone/unknown"])
@pytest.mark.parametrize("makes", [None, "picture", "mesh"])
def test_an_unreachable_hub_id_gives_one_message_whatever_is_asked_of_it(model, makes):
    message = rf"'{'/'.join(model.split('/')[:2])}' is not in the local cache and the hub cannot be reached"
    with pytest.raises(ModelError, match=message):
        registry.resolve(model, makes=makes)


def test_hub_ids_in_the_cache_are_recognised_by_the_file_they_have(
    tmp_path, monkeypatch, mesh_folder, qwen_folder
):
    cache = {"a/meshes": mesh_folder, "a/pictures": qwen_folder}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, file: str(path) if (path := cache[repository] / file).is_file() else None,
    )
    meshes, pictures = (registry.resolve(name) for name in cache)
    assert (meshes.makes, meshes.name) == ("mesh", "a/meshes")
    assert (pictures.makes, pictures.source) == ("picture", "a/pictures")
    assert pictures.defaults.width == 1024
    assert registry.component_configs(pictures) == registry.component_configs(
        registry.resolve(str(qwen_folder))
    )


def test_a_folder_is_read_again_only_when_it_changes(tmp_path, qwen_folder, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(qwen_folder, folder)
    before = registry.resolve(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", None)
        patch.setattr("io.open", None)
        assert registry.resolve(str(folder)) is before
    (folder / "edit.json").write_text(json.dumps({"steps": 7}))
    assert registry.resolve(str(folder)).defaults.steps == 7
    (folder / "edit.json").unlink()
    assert registry.resolve(str(folder)).defaults.steps == 50
