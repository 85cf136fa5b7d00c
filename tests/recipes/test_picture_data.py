"""What the picture models learn from: words, captions, drawings, scenes, and the file of latents."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones.tiny.recipes import captions, dataset, drawings, scene_plan
from backbones.tiny.recipes.art import render
from backbones.tiny.recipes.concepts import COLOURS, STYLES, Concept, add_keywords, load_concepts
from backbones.tiny.recipes.data import dominant_mask, recolour
from backbones.tiny.recipes.scenes import Composer

CONCEPTS = load_concepts()


# Words


def test_every_concept_has_a_picture_and_a_synonym():
    assert len(CONCEPTS) > 600
    assert [c.name for c in CONCEPTS if not c.synonyms] == []
    own = [c.art.removeprefix("own:") for c in CONCEPTS if c.art.startswith("own:")]
    assert sorted(set(own) - set(drawings.load_drawings())) == []
    parts = [name for name, _, _ in scene_plan.PARTS]
    assert sorted(set(drawings.load_drawings()) - set(own) - set(parts)) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("🐱 | cat | kitty\n- | pet | kitty | own:table", "repeated.*kitty"),
        ("- | table | desk", "neither an emoji nor art"),
        ("🐱 | cat", "expected 'emoji"),
    ],
)
def test_a_bad_concept_line_is_named(tmp_path, lines, message):
    file = tmp_path / "concepts.txt"
    file.write_text(lines, "utf-8")
    with pytest.raises(ValueError, match=message):
        load_concepts(file)


def test_sections_are_the_headings(tmp_path):
    file = tmp_path / "concepts.txt"
    file.write_text("# animals\n🐱 | cat | kitty\n# more food\n- | soup | broth | own:soup\n", "utf-8")
    assert [(c.section, c.art) for c in load_concepts(file)] == [("animals", ""), ("food", "own:soup")]


def test_keywords_are_those_that_no_other_concept_has(tmp_path):
    (tmp_path / "emojilib" / "dist").mkdir(parents=True)
    (tmp_path / "emojilib" / "dist" / "emoji-en-US.json").write_text(
        '{"🐱": ["pet", "meow", "cat"], "🐶": ["pet", "woof"]}'
    )
    (tmp_path / "emoji-datasource").mkdir()
    (tmp_path / "emoji-datasource" / "emoji.json").write_text("[]")
    both = [Concept("cat", "🐱"), Concept("dog", "🐶"), Concept("table", "", art="own:table")]
    assert [c.keywords for c in add_keywords(both, tmp_path)] == [("meow",), ("woof",), ()]


def test_the_everyday_prompts_are_two_hundred_and_nothing_reads_them():
    folder = Path(captions.__file__).parents[1]
    lines = (folder / "prompts" / "everyday200.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 200
    readers = [file for file in folder.rglob("*.py") if "everyday200" in file.read_text()]
    assert readers == []


# Captions


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("cat", "cats"), ("mouse", "mice"), ("cherry", "cherries"), ("toy", "toys"), ("bus", "buses"),
        ("box", "boxes"), ("fire engine", "fire engines"), ("old man", "old men"),
        ("paint brush", "paint brushes"), ("tomato", "tomatoes"), ("fish", "fish"), ("baby", "babies"),
    ],
)  # fmt: skip
def test_plurals(noun, many):
    assert captions.plural(noun) == many


def test_articles_and_words_without_one():
    assert captions.with_article("apple", "apple") == "an apple"
    assert captions.with_article("red apple", "apple") == "a red apple"
    assert captions.with_article("unicorn", "unicorn") == "a unicorn"
    assert captions.with_article("ice cream", "ice cream") == "ice cream"


def test_captions_say_the_colour_and_only_words_of_their_concept():
    cat = {"name": "cat", "synonyms": ["kitty"], "keywords": []}
    rng = random.Random(0)
    texts = [captions.caption(cat, 1, "blue", rng).lower() for _ in range(300)]
    assert all("blue" in text and ("cat" in text or "kitty" in text) for text in texts)
    words = {word for style in STYLES.values() for word in style}
    said = {word for text in texts for word in words if word in text.split() or f"{word}," in text}
    assert said == {"flat", "fluent"}


# Drawings


def test_every_drawing_paints_something_in_every_look():
    for name in drawings.load_drawings():
        icon = render(drawings.drawing_svg(name, "fluent-emoji-flat"), 32)
        assert (icon[..., 3] > 128).mean() > 0.02, name
    flat, noto, mirrored = (render(drawings.drawing_svg("kettle", look), 64) for look in
                            ("fluent-emoji-flat", "noto", "twemoji"))  # fmt: skip
    assert np.abs(flat.astype(int) - noto).mean() > 2
    assert (np.abs(mirrored[:, ::-1, 3].astype(int) - flat[..., 3]) > 64).mean() < 0.02


def test_a_shape_outside_the_language_is_named(monkeypatch):
    monkeypatch.setattr(drawings, "load_drawings", lambda: {"blob": "z 1 2 r"})
    with pytest.raises(ValueError, match="'z 1 2 r'"):
        drawings.drawing_svg("blob", "noto")


def test_recolouring_reaches_the_named_colour():
    icon = render(drawings.drawing_svg("ball", "fluent-emoji-flat"), 64)
    mask = dominant_mask(icon)
    assert mask is not None
    blue = recolour(icon, mask, COLOURS["blue"])
    inside = (mask > 0) & (icon[..., 3] > 200)
    assert np.abs(np.median(blue[inside][:, :3], axis=0) - COLOURS["blue"]).max() < 12
    assert np.array_equal(blue[..., 3], icon[..., 3])


# Scenes


class DrawnArt:
    """Our drawings for every concept, so that scenes need no icon package."""

    def pictures(self, concept: Concept) -> dict[int, str]:
        name = "ball" if concept.name < "m" else "toy_car"
        return {style: drawings.drawing_svg(name, look) for style, look in enumerate(drawings.LOOKS)}


@pytest.fixture
def composer() -> Composer:
    composer = Composer.__new__(Composer)
    art = DrawnArt()
    composer.concepts, composer.svgs = CONCEPTS, lambda number: art.pictures(CONCEPTS[number])
    return composer


@pytest.fixture
def planner() -> scene_plan.Planner:
    return scene_plan.Planner(CONCEPTS, 0)


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_counted_things_are_as_many_as_the_caption_says(planner, composer, number):
    from scipy.ndimage import label

    scene = planner.count(number, coloured=True)
    assert len(scene.things) == number
    word = captions.COUNTS[number - 1]
    assert all(word in text.lower() or str(number) in text for text in scene.texts)
    assert all(scene.things[0].colour in text.lower() for text in scene.texts)
    picture = composer.picture(scene)
    assert picture.shape == (128, 128, 3)
    regions, count = label((picture < 250).any(-1))
    assert sum((regions == region).sum() > 100 for region in range(1, count + 1)) == number


def test_pairs_stand_in_the_order_of_the_words(planner):
    for _ in range(20):
        scene = planner.pair()
        first, second = ({CONCEPTS[t.concept].name, *CONCEPTS[t.concept].synonyms} for t in scene.things)
        assert scene.things[0].box[0] < scene.things[1].box[0]
        text = scene.texts[0].lower()
        places = [min(text.find(w.lower()) for w in words if w.lower() in text) for words in (first, second)]
        assert places[0] <= places[1], text


def test_what_is_on_something_is_above_it(planner):
    for _ in range(20):
        scene = planner.above()
        top, bottom = scene.things
        assert top.box[1] < bottom.box[1]
        assert any(word in scene.texts[0] for word in (" on ", "above", "over", "under", "below"))


def test_parts_have_the_colours_of_the_caption(planner, composer):
    while (scene := planner.part()).parts[0] != "cottage" or scene.style != 1:
        pass
    picture = composer.picture(scene)
    colours = dict(scene.parts[1])
    for letter, (x, y) in {"b": (94, 100), "r": (64, 30)}.items():
        expected = [int(colours[letter][i : i + 2], 16) for i in (1, 3, 5)]
        at = (6 + round(x * 116 / 128), 6 + round(y * 116 / 128))
        assert np.abs(picture[at[1], at[0]].astype(int) - expected).max() < 8


def test_the_plan_is_seeded_and_covers_every_size():
    plans = [list(scene_plan.Planner(CONCEPTS, 3).plan(0.01)) for _ in range(2)]
    assert plans[0] == plans[1]
    assert {scene.size for scene in plans[0]} == {(128, 128), *scene_plan.OTHER_SIZES}
    assert list(scene_plan.Planner(CONCEPTS, 4).plan(0.01)) != plans[0]


# The file of latents


def write(path, rows: int = 6) -> torch.Tensor:
    z = torch.randn(rows, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    kinds = [0, 0, 0, 1, 2, 2][:rows]
    columns = {"kind": kinds, "concept": [0, 0, 1, 1, -1, -1][:rows], "style": [0, 1, 0, 2, -1, -1][:rows]}
    texts = [
        ["a cat", "kitty"],
        ["cat"],
        ["a dog"],
        ["a red dog"],
        ["two cats"],
        ["a cat and two dogs on a mat"],
    ]
    arrays = {f"{name}_128x128": np.array(column) for name, column in columns.items()}
    one = {"kind": 0, "concept": 1, "style": 0}
    wide = {f"{name}_192x128": np.array([value]) for name, value in one.items()}
    np.savez(
        path, z_128x128=dataset.quantise(z), captions_128x128=dataset.join_captions(texts[:rows]),
        z_small=dataset.quantise(z[:, :, ::2, ::2]), z_192x128=np.zeros((1, 8, 16, 24), np.int8),
        captions_192x128=dataset.join_captions([["a wide dog"]]), **arrays, **wide,
    )  # fmt: skip
    return z


INDEX = {"concepts": [{"section": "animals"}, {"section": "things"}]}


def test_latents_survive_quantisation_and_captions_the_file(tmp_path):
    z = write(tmp_path / "z.npz")
    data = dataset.TrainingSet(tmp_path / "z.npz", INDEX, 0)
    bucket = data.buckets[dataset.SQUARE]
    assert (bucket.latents.float() / dataset.QUANTA - z).abs().max() < 0.51 / dataset.QUANTA
    assert bucket.captions[0] == ["a cat", "kitty"]
    assert bucket.grid == (8, 8)
    assert data.buckets["192x128"].grid == (8, 12)
    assert data.buckets[dataset.SMALL].captions is bucket.captions


def test_kinds_and_concepts_are_drawn_as_often_as_they_should(tmp_path):
    write(tmp_path / "z.npz")
    weight = dataset.TrainingSet(tmp_path / "z.npz", INDEX, 0).buckets[dataset.SQUARE].weight
    plain, coloured, scene = weight[:3], weight[3:4], weight[4:]
    assert torch.allclose(torch.stack([part.sum() for part in (plain, coloured, scene)]),
                          torch.tensor(dataset.KIND_SHARES, dtype=torch.float64))  # fmt: skip
    assert (plain[0] + plain[1]) / plain[2] == pytest.approx(dataset.FACE_WEIGHT)
    assert plain[0] / plain[1] == pytest.approx(dataset.STYLE_WEIGHTS[0] / dataset.STYLE_WEIGHTS[1])


def test_batches_are_seeded_drop_captions_and_leave_out_long_ones(tmp_path):
    write(tmp_path / "z.npz")

    def make() -> dataset.TrainingSet:
        return dataset.TrainingSet(tmp_path / "z.npz", INDEX, 5, lambda text: len(text) < 12)

    first, second = make().batch(400), make().batch(400)
    assert first.captions == second.captions
    assert torch.equal(first.latents, second.latents)
    empty = sum(not text.strip() for text in first.captions) / 400
    assert 0.05 < empty < 0.16
    assert "a cat and two dogs on a mat" not in first.captions
    assert first.latents.shape == (400, 64, 32)
    assert make().batch(3, dataset.SMALL).latents.shape == (3, 16, 32)
    assert make().batch(3, dataset.SMALL).step == 2
