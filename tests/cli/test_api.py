"""`import edit_cli`: one line makes what the command makes, with the same checks and the same files."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import trimesh
from PIL import Image

import edit_cli
from edit_cli.errors import EditError
from tests.conftest import edit_environment


@pytest.fixture(autouse=True)
def free():
    yield
    edit_cli.forget()


@pytest.mark.filterwarnings("ignore:calibrated at 4 steps")
def test_a_picture_is_the_commands_own(edit_here, qwen_folder, tmp_path):
    made = edit_cli.generate("a cat", model=qwen_folder, steps=2, budget=0.5, seed=[3, 4])
    assert [each.seed for each in made] == [3, 4] and made[0].spent == 0.5
    assert isinstance(made[1].value, Image.Image) and made.seconds["denoise"] > 0
    files = made.save(tmp_path / "{prompt}-{seed}.png")
    assert [file.name for file in files] == ["a-cat-3.png", "a-cat-4.png"]
    typed = ["a cat", "-m", qwen_folder, "--steps", "2", "-b", "0.5", "--seed", "3", "4"]
    ran = edit_here("generate", *typed, "-o", "cli-{seed}.png", cwd=tmp_path)
    assert ran.code == 0, ran.err
    for seed in (3, 4):
        assert (tmp_path / f"cli-{seed}.png").read_bytes() == (tmp_path / f"a-cat-{seed}.png").read_bytes()
    again = [made.save(f"{tmp_path}/new/") for _ in range(2)]
    assert [file.name for files in again for file in files] == [
        "a-cat-3.png", "a-cat-4.png", "a-cat-3-2.png", "a-cat-4-2.png",
    ]  # fmt: skip
    one = edit_cli.generate("a cat", replay=files[0])
    assert one.value.tobytes() == made[0].value.tobytes()
    with pytest.raises(ValueError, match="too many values"):
        _ = made.value


def test_the_model_stays_loaded(qwen_folder, monkeypatch):
    from backbones import loading

    loaded = []
    usual = loading.load
    monkeypatch.setattr(loading, "load", lambda *a: loaded.append(a) or usual(*a))
    first = edit_cli.generate("a cat", model=qwen_folder, steps=2, budget=1)
    again = edit_cli.generate("a cat", model=qwen_folder, steps=2, budget=1)
    assert len(loaded) == 1 and first.value.tobytes() == again.value.tobytes()
    edit_cli.forget()
    edit_cli.generate("a cat", model=qwen_folder, steps=2, budget=1)
    assert len(loaded) == 2


@pytest.mark.filterwarnings("ignore:calibrated at 4 steps")
def test_items_with_fields_of_their_own(qwen_folder):
    wishes = [{"prompt": "a cat", "seed": 5}, "a dog", {"prompt": "a cat", "seed": 6, "budget": 1}]
    made = edit_cli.generate(wishes, model=qwen_folder, steps=2, budget=0.5, batch_size=1)
    assert [(each.record["prompt"], each.seed, each.spent) for each in made] == [
        ("a cat", 5, 0.5), ("a dog", 0, 0.5), ("a cat", 6, 1.0),
    ]  # fmt: skip
    alone = edit_cli.generate("a cat", model=qwen_folder, steps=2, budget=0.5, seed=5)
    assert alone.value.tobytes() == made[0].value.tobytes()
    with pytest.raises(EditError, match="item 0: sead is unknown"):
        edit_cli.generate({"prompt": "a cat", "sead": 1}, model=qwen_folder)


def test_meshes_and_presets(mesh_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = Image.new("RGBA", (64, 64), (200, 30, 30, 0))
    picture.paste((200, 30, 30, 255), (16, 16, 48, 48))
    picture.save("shape.png")
    (tmp_path / "edit.toml").write_text("[small]\noctree-resolution = 16\nsteps = 2\n")
    made = edit_cli.generate_3d("shape.png", model=mesh_folder, preset="small", budget=1)
    assert made[0].record["octree_resolution"] == 16
    made.save("shape.glb")
    assert len(trimesh.load("shape.glb", force="mesh").faces) == len(made.value.faces)


REFUSED = [
    ({"stepps": 3}, TypeError, r"generate\(\) has no option 'stepps'; did you mean steps\?"),
    ({"steps": 0}, EditError, "--steps 0 is out of range"),
    ({"model": "qwen-imag"}, ValueError, "did you mean"),
    ({"output": "a.png"}, TypeError, "no option 'output'"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_options_are_refused_as_on_the_command_line(options, error, message):
    with pytest.raises(error, match=message):
        edit_cli.generate("a cat", **options)


def test_the_import_alone_imports_nothing():
    names = ("torch", "numpy", "typer", "edit")
    code = f"import edit_cli, sys; print([m for m in sys.modules if m.startswith({names})])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=edit_environment())
    assert ran.stdout.strip() == "['edit_cli']", ran.stderr


def test_generate_is_a_function_whatever_has_been_imported():
    import edit_cli.generation.plan  # the package behind it has a name of its own

    assert (
        inspect.isfunction(edit_cli.generate) and "prompt" in inspect.signature(edit_cli.generate).parameters
    )
