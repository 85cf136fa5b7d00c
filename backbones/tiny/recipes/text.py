"""The tiny Qwen2.5-VL text encoder: tokenizer, model, and a fast forward for training.

Shapes: B batch, L tokens after the template's fixed prefix, D width, H heads, K head dim.
"""

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from backbones.tiny.recipes.captions import COUNTS, caption, plural
from backbones.tiny.recipes.concepts import COLOURS, STYLES

WIDTH, LAYERS, HEADS, MLP_WIDTH, VOCAB = 160, 2, 5, 320, 4096
PREFIX_TOKENS = 34  # QwenImagePipeline.prompt_template_encode_start_idx
SCENE_PHRASES = [
    "a blue house with a red roof", "two cats and three dogs", "a cat next to a dog",
    "a cat to the left of a dog",
    "a cat on top of a chair", "a sun above a house", "a house below a sun", "a cat under a table",
    "a cat over a house", "a cat beside a house", "four stars", "five hearts", "a flower in a pot",
    "a hat with a ribbon", "a ball with dots", "a car with wheels", "walls and a roof", "a band",
    "1 2 3 4 5 spots",
]  # fmt: skip
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def training_text(index: dict, seed: int = 0) -> list[str]:
    """Caption lines for the BPE: every word in first and later position, plurals, counts and the template."""
    rng = random.Random(seed)
    lines = []
    for concept in index["concepts"]:
        for word in (concept["name"], *concept["synonyms"], *concept["keywords"]):
            weight = 12 if word == concept["name"] else 6 if word in concept["synonyms"] else 2
            lines += [word, f"a {word}"] * weight
        lines += [f"{rng.choice(COUNTS)} {plural(concept['name'])}"] * 4
        for _ in range(8):
            lines.append(caption(concept, rng.randrange(len(STYLES)), rng.choice([None, *COLOURS]), rng))
    for colour in COLOURS:
        lines += [colour, f"a {colour}", f"{colour} cat"] * 40
    lines += SCENE_PHRASES * 60
    body = TEMPLATE
    for token in SPECIAL:
        body = body.replace(token, "")
    return lines + [body.format("a")] * 200


def train_tokenizer(index: dict, folder: Path) -> Qwen2Tokenizer:
    """Train a byte-level BPE with Qwen2's pre-tokenisation and save it as a Qwen2Tokenizer folder.

    Raises ValueError when the pipeline's prompt template does not come to exactly 34 tokens.
    """
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(training_text(index), trainer)
    model = json.loads(raw.to_str())["model"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    vocab = dict(model["vocab"])
    for token in SPECIAL:
        vocab[token] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, padding_side="right", model_max_length=1024)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save_pretrained(folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    found = len(tokenizer(TEMPLATE.split("{}")[0]).input_ids)
    if found != PREFIX_TOKENS:
        raise ValueError(
            f"the template is {found} tokens, the pipeline cuts {PREFIX_TOKENS}: add its words to the text"
        )
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The text encoder with a vision tower as small as the class allows (pictures are never encoded)."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": WIDTH,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0], "spatial_merge_size": 1,
        "temporal_patch_size": 1,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


class PromptTokens:
    """Tokenises prompts in the pipeline's template and splits off the constant prefix."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        self.tokenizer = tokenizer
        self.pad = tokenizer.pad_token_id
        self.prefix = torch.tensor([tokenizer(TEMPLATE.split("{}")[0]).input_ids])
        self._cache: dict[str, list[int]] = {}

    def read(self, prompts: list[str]) -> None:
        """Tokenise many prompts at once, which `ids` then need not."""
        new = list(dict.fromkeys(prompts))
        rows = self.tokenizer.backend_tokenizer.encode_batch_fast([TEMPLATE.format(text) for text in new])
        self._cache.update(zip(new, (row.ids[PREFIX_TOKENS:] for row in rows), strict=True))

    def ids(self, prompt: str) -> list[int]:
        """Token ids after the prefix: the user's words and the template's tail (5 tokens)."""
        if prompt not in self._cache:
            self._cache[prompt] = self.tokenizer(TEMPLATE.format(prompt)).input_ids[PREFIX_TOKENS:]
        return self._cache[prompt]

    def batch(self, prompts: list[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Right-padded ids (B, L) and boolean mask (B, L)."""
        rows = [self.ids(prompt) for prompt in prompts]
        length = length or max(map(len, rows))
        ids = torch.tensor([(row + [self.pad] * length)[:length] for row in rows])
        mask = torch.arange(length)[None] < torch.tensor([len(row) for row in rows])[:, None]
        return ids, mask


def _rms(norm, x: Tensor) -> Tensor:
    x32 = x.float()
    return norm.weight * (x32 * (x32.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()).to(
        x.dtype
    )


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, H, L, K)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _layer(
    layer, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor | None
):
    attention, normed = layer.self_attn, _rms(layer.input_layernorm, x)
    q, k, v = (_heads(proj(normed)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
    if past is not None:
        keys, values = (
            torch.cat([old.expand(x.shape[0], -1, -1, -1), new], dim=2)
            for old, new in zip(past, (k, v), strict=False)
        )
    else:
        keys, values = k, v
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    mlp, normed = layer.mlp, _rms(layer.post_attention_layernorm, x)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)), (k, v)


def encode_text(model: Qwen2_5_VLForConditionalGeneration, prefix: Tensor, ids: Tensor) -> Tensor:
    """The last hidden states (B, L, D) of the tokens after the prefix, as the unmodified class gives them.

    The template's prefix is the same for every prompt and attention is causal, so its keys and values are
    computed once per call, for one row. Padding is on the right, where causal attention never looks.
    """
    text = model.model.language_model
    count, length = prefix.shape[1], ids.shape[1]
    positions = torch.arange(count + length, dtype=torch.float32, device=ids.device)
    angles = torch.outer(positions, text.rotary_emb.inv_freq.float()).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    causal = torch.ones(count + length, count + length, dtype=torch.bool, device=ids.device).tril()
    head, tail = text.embed_tokens(prefix), text.embed_tokens(ids)
    for layer in text.layers:
        head, past = _layer(layer, head, cos[:count], sin[:count], None, causal[:count, :count])
        tail, _ = _layer(layer, tail, cos[count:], sin[count:], past, causal[count:])
    return _rms(text.norm, tail)


@torch.no_grad()
def largest_difference(pipe: QwenImagePipeline, prompts: list[str]) -> float:
    """Largest difference between `encode_text` and the pipeline's own `encode_prompt`, over real tokens."""
    tokens = PromptTokens(pipe.tokenizer)
    ids, mask = tokens.batch(prompts)
    mine = encode_text(pipe.text_encoder, tokens.prefix, ids)
    theirs, _ = pipe.encode_prompt(prompts)
    return ((mine - theirs).abs() * mask[..., None]).max().item()
