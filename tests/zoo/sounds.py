"""Transformers that make sounds: configurations and the arguments of one call, as data."""

from __future__ import annotations

import torch

from tests.zoo.model import Model

# fmt: off

SOUNDS = [
    Model(
        "AceStepTransformer1DModel",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
            "sliding_window": 4},
        lambda d: {"hidden_states": d.floats(16, 8), "timestep": d.time(), "timestep_r": d.time(),
            "encoder_hidden_states": d.floats(5, 32, salt=1), "context_latents": d.floats(16, 16, salt=2)},
    ),
    Model(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 32, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 8},
        lambda d: {"hidden_states": d.floats(16, 8), "encoder_hidden_states": d.floats(5, 12, salt=1),
            "encoder_attention_mask": d.ones(5).bool(), "timestep": d.time(),
            "attention_mask": d.ones(16).bool(), "latent_cond": d.floats(16, 8, salt=2)},
    ),
    Model(
        "MiniMaxMusic3Transformer1DModel",
        {"in_channels": 4, "condition_dim": 12, "num_layers": 3, "num_attention_heads": 2,
            "attention_head_dim": 16, "ff_inner_dim": 48, "rotary_dim": 8, "fourier_embedding_dim": 8},
        lambda d: {"hidden_states": d.floats(4, 16), "timestep": d.time(),
            "encoder_hidden_states": d.floats(16, 12, salt=1)},
    ),
    Model(
        "StableAudio3DiTModel",
        {"io_channels": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "cond_token_dim": 12,
            "global_cond_dim": 12, "local_add_cond_dim": 5, "timestep_features_dim": 8, "ff_mult": 2.0,
            "num_memory_tokens": 2},
        lambda d: {"hidden_states": d.floats(4, 16), "timestep": d.time(),
            "encoder_hidden_states": d.floats(5, 12, salt=1), "global_hidden_states": d.floats(12, salt=2)},
    ),
    Model(
        "StableAudioDiTModel",
        {"sample_size": 16, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
            "num_attention_heads": 2, "num_key_value_attention_heads": 2, "out_channels": 4,
            "cross_attention_dim": 16, "time_proj_dim": 8, "global_states_input_dim": 8,
            "cross_attention_input_dim": 8},
        lambda d: {"hidden_states": d.floats(4, 16), "timestep": d.time(),
            "encoder_hidden_states": d.floats(5, 8, salt=1), "global_hidden_states": d.floats(1, 8, salt=2),
            "rotary_embedding": (torch.ones(17, 4), torch.zeros(17, 4))},
    ),
]
