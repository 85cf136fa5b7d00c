"""Step `vocabulary`: write what a picture model was trained on, its words and sizes, into its folder.

    python -m backbones.tiny.recipes.vocabulary [--out FOLDER]

The words are those of the captions in latents.npz (step `latents`), the things those of pictures.json.
"""

import argparse
import collections
import json
from pathlib import Path

from backbones.tiny.recipes.dataset import SMALL, load_buckets
from backbones.vocabulary import FILE, GRAMMAR, split

PACKAGED = Path(__file__).parent.parent / "qwen_image_tiny"
SELDOM = 3
"""Words that fewer captions have are slips of the templates (plurals of plurals), not what was learnt."""


def vocabulary(index: dict, captions: dict[str, list[list[str]]]) -> dict:
    """What `vocabulary.json` holds. captions: of every picture, by size ("128x128")."""
    things = {concept["name"]: [*concept["synonyms"], *concept["keywords"]] for concept in index["concepts"]}
    named = {word for name, others in things.items() for phrase in (name, *others) for word in split(phrase)}
    counts = collections.Counter(
        word for rows in captions.values() for row in rows for caption in row for word in split(caption)
    )
    others = [word for word, count in counts.most_common() if count >= SELDOM]
    others = [word for word in others if word not in named and word not in GRAMMAR]
    plurals = {word for word in others if word.removesuffix("s") in named or word.removesuffix("es") in named}
    sizes = sorted([int(side) for side in key.split("x")] for key in captions)
    return {"sizes": sizes, "others": [word for word in others if word not in plurals], "things": things}


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--latents", type=Path, default=Path("runs/latents.npz"))
    parser.add_argument("--out", type=Path, default=PACKAGED)
    args = parser.parse_args()
    index = json.loads((args.data / "pictures.json").read_text())
    buckets = load_buckets(args.latents, [concept.get("section", "") for concept in index["concepts"]])
    found = vocabulary(index, {key: b.captions for key, b in buckets.items() if key != SMALL})
    things = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(words)}" for name, words in found["things"].items()
    )
    head = "".join(f' "{name}": {json.dumps(found[name])},\n' for name in ("sizes", "others"))
    (args.out / FILE).write_text(f'{{\n{head} "things": {{\n{things}\n }}\n}}\n', "utf-8")
    print(f"vocabulary: {len(found['things'])} things, {len(found['others'])} other words")


if __name__ == "__main__":
    main()
