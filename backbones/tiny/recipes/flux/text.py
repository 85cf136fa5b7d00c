"""Step `text`: the CLIP and T5 tokenizers, trained on the captions; and the two small text encoders.

    python -m backbones.tiny.recipes.flux.text [--data runs/data] [--out runs/flux/tokenizers]

Both load with the pipeline's own classes. Those rebuild themselves from vocabulary, merges and, for T5, the
SentencePiece character map alone, so nothing else may be relied on: lower-casing for T5 is such a map.

Shapes: B batch, L text tokens, D width.
"""

import argparse
import base64
import collections
import json
import math
import re
import struct
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from backbones.tiny.recipes.text import training_text

T5_TOKENS = 20  # T5 prompts are padded or cut to this: `max_sequence_length` in edit.json
CLIP_TOKENS = 20  # CLIP prompts likewise, through the tokenizer's model_max_length
CLIP_PIECES, T5_PIECES = 3072, 2560
CLIP_WIDTH, T5_WIDTH = 128, 160
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
T5_SPECIAL = ("<pad>", "</s>", "<unk>")


def captions_text(index: dict) -> list[str]:
    """Lower-case caption lines, without those that hold Qwen's prompt template."""
    return [line.lower() for line in training_text(index) if "describe the image" not in line.lower()]


def train_clip_tokenizer(lines: list[str], folder: Path) -> CLIPTokenizer:
    """Train CLIP's byte-level BPE with end-of-word marks and save the folder."""
    blank = CLIPTokenizer(vocab={token: i for i, token in enumerate(CLIP_SPECIAL)}, merges=[])
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    raw.normalizer = blank.backend_tokenizer.normalizer
    raw.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_PIECES, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator(lines, trainer)
    model = json.loads(raw.to_str())["model"]
    vocab = dict(model["vocab"])
    # The trainer knows only word ends it has seen; a word may end in any byte.
    for token in (*(letter + "</w>" for letter in alphabet), *CLIP_SPECIAL):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in model["merges"]]
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def lower_case_map() -> str:
    """A SentencePiece character map that turns A-Z into a-z, base64, for T5's `_spm_precompiled_charsmap`.

    Layout (sentencepiece/src/normalizer.cc): uint32 size of the trie in bytes, a darts double-array trie of
    uint32 units, then the zero-terminated replacements that its leaves index. A unit holds its label in bits
    0-7, "has a leaf" in bit 8 and the distance to its children (a xor) from bit 10 on; leaves set bit 31.
    """
    units, replacements = [0] * (512 + 26), b""
    units[0] = 256 << 10
    for letter in range(ord("A"), ord("Z") + 1):
        node, leaf = 256 + letter, 512 + letter - ord("A")
        units[node] = (node ^ leaf) << 10 | 1 << 8 | letter
        units[leaf] = 1 << 31 | len(replacements)
        replacements += bytes([letter]).lower() + b"\0"
    trie = struct.pack(f"<{len(units)}I", *units)
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + replacements).decode()


def t5_vocabulary(lines: list[str], pre_tokenizer: pre_tokenizers.PreTokenizer) -> list[tuple[str, float]]:
    """Unigram pieces with log probabilities: every caption word whole, and sub-words for the rest.

    The Unigram trainer alone splits even frequent words, because captions repeat so few of them.
    """
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=T5_PIECES, special_tokens=list(T5_SPECIAL), unk_token="<unk>", show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789,.-'!?▁"),
    )  # fmt: skip
    raw.train_from_iterator(lines, trainer)
    pieces = dict(json.loads(raw.to_str())["model"]["vocab"])
    counts = collections.Counter(word for line in lines for word in re.findall(r"[^\s,]+", line))
    total = sum(counts.values())
    for word, count in counts.items():
        pieces["▁" + word] = math.log(count / total)
    return list(pieces.items())


def train_t5_tokenizer(lines: list[str], folder: Path) -> T5TokenizerFast:
    """Train a Unigram model with T5's pre-tokenisation, lower-casing, no sentinels, and save the folder."""
    blank = T5TokenizerFast(extra_ids=0, vocab=[(token, 0.0) for token in T5_SPECIAL])
    vocab = t5_vocabulary(lines, blank.backend_tokenizer.pre_tokenizer)
    tokenizer = T5TokenizerFast(
        vocab=vocab, extra_ids=0, _spm_precompiled_charsmap=base64.b64decode(lower_case_map()),
        model_max_length=512,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


class Prompts:
    """Both tokenizers, used as FluxPipeline uses them."""

    def __init__(self, clip: CLIPTokenizer, t5: T5TokenizerFast):
        self.clip, self.t5 = clip, t5
        self._cache: dict[str, tuple[list[int], list[int]]] = {}
        self._lengths: dict[str, int] = {}  # T5 tokens

    @classmethod
    def load(cls, folder: Path) -> "Prompts":
        """Tokenizers from `folder`/clip and `folder`/t5. Raises ValueError when they are not there."""
        if not folder.is_dir():
            raise ValueError(
                f"no tokenizers in {folder}: run python -m backbones.tiny.recipes.flux.text first"
            )
        return cls(
            CLIPTokenizer.from_pretrained(folder / "clip"), T5TokenizerFast.from_pretrained(folder / "t5")
        )

    def read(self, prompts: list[str]) -> None:
        """Count the T5 tokens of many prompts at once, which `fits` then need not."""
        new, backend = list(dict.fromkeys(prompts)), self.t5.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._lengths.update(zip(new, map(len, backend.encode_batch_fast(new)), strict=True))

    def ids(self, prompt: str) -> list[int]:
        """T5 ids with the end token, neither padded nor cut: they tell if a caption is short enough."""
        return self.t5(prompt).input_ids

    def fits(self, prompt: str) -> bool:
        """Whether T5 need not cut the prompt."""
        length = self._lengths.get(prompt)
        return (len(self.ids(prompt)) if length is None else length) <= T5_TOKENS

    def batch(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """CLIP ids (B, CLIP_TOKENS) and T5 ids (B, T5_TOKENS), padded and cut."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        if new:
            ids = (
                tokenizer(new, padding="max_length", max_length=length, truncation=True).input_ids
                for tokenizer, length in ((self.clip, CLIP_TOKENS), (self.t5, T5_TOKENS))
            )
            self._cache.update(zip(new, zip(*ids, strict=True), strict=True))
        clip, t5 = zip(*(self._cache[prompt] for prompt in prompts), strict=True)
        return torch.tensor(clip), torch.tensor(t5)


def build_encoders(prompts: Prompts) -> tuple[CLIPTextModel, T5EncoderModel]:
    """The two encoders with random weights: 2 layers each, about 0.5 and 0.9 M parameters."""
    clip, t5 = prompts.clip, prompts.t5
    clip_config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=CLIP_WIDTH, intermediate_size=2 * CLIP_WIDTH, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=CLIP_WIDTH, max_position_embeddings=CLIP_TOKENS,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    t5_config = T5Config(
        vocab_size=len(t5), d_model=T5_WIDTH, d_kv=32, d_ff=2 * T5_WIDTH, num_layers=2, num_heads=5,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, relative_attention_num_buckets=16,
        relative_attention_max_distance=32, tie_word_embeddings=False,
    )  # fmt: skip
    return CLIPTextModel(clip_config), T5EncoderModel(t5_config)


def encode_text(clip: nn.Module, t5: nn.Module, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled CLIP state (B, D_clip) and T5 states (B, L, D_t5); as in the pipeline, T5 gets no mask."""
    return clip(clip_ids).pooler_output, t5(t5_ids)[0]


def main() -> None:
    """Parse the command line and train both tokenizers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/flux/tokenizers"))
    args = parser.parse_args()
    lines = captions_text(json.loads((args.data / "pictures.json").read_text()))
    clip = train_clip_tokenizer(lines, args.out / "clip")
    t5 = train_t5_tokenizer(lines, args.out / "t5")
    print(f"text: CLIP {len(clip)} tokens, T5 {len(t5)} tokens -> {args.out}")


if __name__ == "__main__":
    main()
