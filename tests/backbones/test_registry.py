"""The registry: torch-free, names with suggestions, folders recognised by their pipeline class."""

from __future__ import annotations

import json
import subprocess
import sys
from operator import attrgetter

import pytest

from backbones import mesh_registry, registry
from backbones.registry import ModelNotFoundError
from backbones.spec import PACKAGE_FOLDER

FAMILIES = {family.name: family for family in registry.FAMILIES}


def test_importing_it_imports_no_torch():
    code = "import sys, edit_cli.main, backbones.registry as r; r.rows(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_hub_rows_ship_their_configs():
    for row in registry.rows().values():
        assert row.parameters > row.transformer_parameters > 0
        if row.folder is None:
            assert (PACKAGE_FOLDER / "configs" / f"{row.name}.json").is_file()
            assert row.defaults.width % row.size_multiple == 0
            assert registry.resolve(row.source) == row


@pytest.mark.parametrize("name", ["qwen-image", "flux-dev", "flux-schnell"])
def test_shipped_configs_have_the_registered_size(name):
    import diffusers
    import torch

    row = registry.resolve(name)
    config = dict(registry.component_config(row, "transformer"))
    with torch.device("meta"):
        transformer = getattr(diffusers, row.family.transformer.transformer_class).from_config(config)
    assert sum(p.numel() for p in transformer.parameters()) == row.transformer_parameters


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
    assert family.guidance_argument in parameters
    assert {"image", "strength"} <= set(
        inspect.signature(getattr(diffusers, family.image_to_image_class).__call__).parameters
    )


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
        ("a/b/c", "does not exist"),
    ],
)
def test_unknown_names_get_a_hint(name, message):
    with pytest.raises(ModelNotFoundError, match=message):
        registry.resolve(name)


def test_unknown_defaults_are_refused(tmp_path, qwen_folder):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(qwen_folder, folder)
    (folder / "edit.json").write_text(json.dumps({"widht": 64}))
    with pytest.raises(ModelNotFoundError, match=r"unknown keys \['widht'\]; allowed are width, height"):
        registry.resolve(str(folder))


@pytest.mark.parametrize("name", [name for name, row in mesh_registry.rows().items() if not row.packaged])
def test_shipped_mesh_configs_have_the_registered_size(name):
    import torch

    from backbones.hunyuan3d.config import build

    row = mesh_registry.resolve(name)
    with torch.device("meta"):
        transformer = build("model", mesh_registry.model_config(row)["model"])
    assert sum(p.numel() for p in transformer.parameters()) == row.transformer_parameters
    assert type(transformer).__name__ == row.family.transformer.transformer_class
    assert row.guided != bool(transformer.guidance_embed)


def test_mesh_models_resolve_by_name_hub_id_and_folder(mesh_folder):
    assert mesh_registry.resolve("tencent/Hunyuan3D-2mini").name == "hunyuan3d-2mini"
    assert mesh_registry.resolve("tencent/Hunyuan3D-2/hunyuan3d-dit-v2-0-turbo").name == "hunyuan3d-2-turbo"
    assert mesh_registry.resolve("tencent/Hunyuan3D-2").name == "hunyuan3d-2"
    found = mesh_registry.resolve(str(mesh_folder))
    assert (found.family.name, found.defaults.octree_resolution) == ("Hunyuan3D 2", 24)
    assert found.bundle == mesh_folder / "routers"
    assert found.parameters == sum(mesh_registry.component_parameters(found).values()) > 0
    with pytest.raises(ModelNotFoundError, match=r"makes meshes: use `edit generate-3d -m hunyuan3d-2\.1`"):
        registry.resolve("hunyuan3d-2.1")
