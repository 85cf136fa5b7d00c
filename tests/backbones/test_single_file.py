"""Single-file checkpoints: FLUX in its original layout gives what diffusers' layout gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbones import loading, registry
from backbones.flux_checkpoint import original_parts
from backbones.model_files import ModelError
from backbones.weights import load_transformer
from tests.cli.test_cli_generate import pixels

# FLUX.1's own names; written for this test, apart from the table that the product reads files by
PLAIN = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}


def to_original(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A diffusers state dict in the original layout."""
    own, file = dict(own), {}
    kinds = ("weight", "bias")

    def take(*names: str) -> torch.Tensor:
        return torch.cat([own.pop(name) for name in names])

    for kind in kinds:
        for key, name in PLAIN.items():
            if f"{name}.{kind}" in own:
                file[f"{key}.{kind}"] = take(f"{name}.{kind}")
        scale, shift = own.pop(f"norm_out.linear.{kind}").chunk(2)
        file[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    doubles = {int(k.split(".")[1]) for k in own if k.startswith("transformer_blocks.")}
    singles = {int(k.split(".")[1]) for k in own if k.startswith("single_transformer_blocks.")}
    for i in doubles:
        block, out = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, norm, mlp, qkv, attention, qk in (
            ("img", "norm1", "ff", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k")),
            ("txt", "norm1_context", "ff_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out",
             ("norm_added_q", "norm_added_k")),
        ):  # fmt: skip
            for kind in kinds:
                file[f"{out}.{stream}_mod.lin.{kind}"] = take(f"{block}.{norm}.linear.{kind}")
                file[f"{out}.{stream}_attn.qkv.{kind}"] = take(*(f"{block}.attn.{n}.{kind}" for n in qkv))
                file[f"{out}.{stream}_attn.proj.{kind}"] = take(f"{block}.attn.{attention}.{kind}")
                file[f"{out}.{stream}_mlp.0.{kind}"] = take(f"{block}.{mlp}.net.0.proj.{kind}")
                file[f"{out}.{stream}_mlp.2.{kind}"] = take(f"{block}.{mlp}.net.2.{kind}")
            for name, key in zip(qk, ("query_norm", "key_norm"), strict=True):
                file[f"{out}.{stream}_attn.norm.{key}.scale"] = take(f"{block}.attn.{name}.weight")
    for i in singles:
        block, out = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for kind in kinds:
            file[f"{out}.modulation.lin.{kind}"] = take(f"{block}.norm.linear.{kind}")
            rows = (
                *(f"{block}.attn.{n}.{kind}" for n in ("to_q", "to_k", "to_v")),
                f"{block}.proj_mlp.{kind}",
            )
            file[f"{out}.linear1.{kind}"] = take(*rows)
            file[f"{out}.linear2.{kind}"] = take(f"{block}.proj_out.{kind}")
        for name, key in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
            file[f"{out}.norm.{key}.scale"] = take(f"{block}.attn.{name}.weight")
    assert not own, sorted(own)
    return file


def stored(folder: Path) -> dict[str, torch.Tensor]:
    (weights,) = (folder / "transformer").glob("*.safetensors")
    return load_file(weights)


@pytest.fixture(scope="module")
def files(flux_folder, tmp_path_factory) -> Path:
    """The random FLUX transformer in every layout a user may have it in."""
    folder, own = tmp_path_factory.mktemp("single"), stored(flux_folder)
    original = {name: tensor.contiguous() for name, tensor in to_original(own).items()}
    save_file(original, folder / "original.safetensors")
    save_file(own, folder / "diffusers.safetensors")
    everything = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    save_file({**everything, "vae.encoder.w": torch.zeros(2)}, folder / "all-in-one.safetensors")
    save_file({**original, "img_in.weight_scale_2": torch.ones(1)}, folder / "quantised.safetensors")
    fewer = {name: tensor for name, tensor in original.items() if name != "txt_in.bias"}
    save_file(fewer, folder / "incomplete.safetensors")
    fill = {**original, "img_in.weight": torch.zeros(64, 96)}
    save_file(fill, folder / "fill.safetensors")
    return folder


@pytest.mark.parametrize("name", ["original", "diffusers", "all-in-one"])
def test_every_layout_gives_the_same_transformer(files, flux_folder, name):
    backbone = registry.resolve(str(files / f"{name}.safetensors"), str(flux_folder))
    transformer = load_transformer(backbone, torch.float32)
    expected, found = stored(flux_folder), transformer.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not any(parameter.is_meta for parameter in transformer.parameters())
    assert load_transformer(backbone, torch.bfloat16).dtype == torch.bfloat16


def test_full_size_names_are_those_of_diffusers():
    """flux-dev's full table: the same keys and shapes as diffusers' own conversion, on the meta device."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    config = dict(registry.component_configs(registry.rows()["flux-dev"])["transformer"])
    with torch.device("meta"):
        own = diffusers.FluxTransformer2DModel.from_config(config).state_dict()
    original = to_original(own)
    parts = original_parts(config)
    assert parts.keys() == own.keys()
    assert {part.key for part in parts.values()} == original.keys()
    for name, part in parts.items():
        assert original[part.key][part.start : part.stop].shape == own[name].shape, name
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert {name: tensor.shape for name, tensor in theirs.items()} == {n: t.shape for n, t in own.items()}


def test_generating_from_a_file_gives_the_folders_picture(edit_here, files, flux_folder, tmp_path):
    arguments = ["generate", "a cat", "--routers", "none", "-q", "--json"]
    for name, model in (
        ("file", ["-m", files / "original.safetensors", "--base", flux_folder]),
        ("folder", ["-m", flux_folder]),
    ):
        ran = edit_here(*arguments, *model, "-o", f"{name}.png", cwd=tmp_path)
        assert ran.code == 0, ran.err
    assert (pixels(tmp_path / "file.png") == pixels(tmp_path / "folder.png")).all()
    # its record names file and base; routers fitted on the same weights fit it too
    ran = edit_here("generate", "--from", "file.png", "-o", "again.png", "-q", cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert (pixels(tmp_path / "again.png") == pixels(tmp_path / "file.png")).all()
    ran = edit_here(
        "generate", "a cat", "-m", files / "original.safetensors", "--base", flux_folder,
        "--routers", flux_folder / "routers", "-b", "0.7", "--json", "-q", cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["spent"][0] < 0.9


def test_defaults_and_counts_of_a_file(files, flux_folder):
    folder = registry.resolve(str(flux_folder))
    file = registry.resolve(str(files / "all-in-one.safetensors"), str(flux_folder))
    assert file.name == "all-in-one"
    assert file.transformer_parameters == folder.transformer_parameters
    assert file.parameters == folder.parameters
    assert registry.component_parameters(file) == registry.component_parameters(folder)
    assert (file.defaults, file.size_multiple) == (folder.defaults, folder.size_multiple)
    assert file.bundle is None
    assert loading.model_hash(file) != loading.model_hash(folder) is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quantised", "1 tensors are unknown, for example 'img_in.weight_scale_2'; give one in fp32,"),
        ("incomplete", "1 tensors are missing, for example 'txt_in.bias'"),
        ("fill", "has in_channels 96 and the base"),
    ],
)
def test_files_that_do_not_fit_are_refused(edit_here, files, flux_folder, tmp_path, name, message):
    model = files / f"{name}.safetensors"
    ran = edit_here("generate", "a cat", "-m", model, "--base", flux_folder, cwd=tmp_path)
    assert ran.code == 2
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_a_base_it_says_what_is_missing(edit_here, tmp_path):
    """A file of dev's sizes: planned from the packaged config, and refused for lack of encoders."""
    import diffusers

    config = dict(registry.component_configs(registry.rows()["flux-dev"])["transformer"])
    small = {**config, "num_layers": 1, "num_single_layers": 1}
    with torch.device("meta"):
        shapes = to_original(diffusers.FluxTransformer2DModel.from_config(small).state_dict())
    header, offset = {}, 0
    for name, tensor in shapes.items():
        size = 2 * tensor.numel()
        header[name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]
        }  # fmt: skip
        offset += size
    data = json.dumps(header).encode()
    file = tmp_path / "flux1-dev.safetensors"
    with file.open("wb") as stream:  # a sparse file: the sizes of the real one, no bytes on disk
        stream.write(len(data).to_bytes(8, "little") + data)
        stream.truncate(8 + len(data) + offset)
    planned = edit_here("generate", "a cat", "-m", file, "--dry-run", "--json", cwd=tmp_path)
    assert planned.code == 0, planned.err
    assert planned.json["model"] == "flux1-dev"
    ran = edit_here("generate", "a cat", "-m", file, cwd=tmp_path)
    assert ran.code == 2
    assert "'flux1-dev.safetensors' holds the transformer alone; its text encoders and VAE" in ran.err
    assert "give --base FOLDER, or --base black-forest-labs/FLUX.1-dev to download them" in ran.err


def test_a_base_of_another_family_is_refused(files, qwen_folder):
    with pytest.raises(ModelError, match=r"is a Qwen-Image model and '.*original.safetensors' is not;"):
        registry.resolve(str(files / "original.safetensors"), str(qwen_folder))


def test_a_base_that_is_no_model_is_refused(files):
    with pytest.raises(ModelError, match="unknown model 'flux-def'; did you mean flux-dev"):
        registry.resolve(str(files / "original.safetensors"), "flux-def")
