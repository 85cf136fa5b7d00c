"""Transformers that make videos: configurations and the arguments of one call, as data."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from tests.zoo.model import Draw, Inputs, Model

# fmt: off

WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3,
    "rope_max_seq_len": 32}


def _wan(d: Draw) -> Inputs:
    return {"hidden_states": d.floats(4, 2, 8, 8), "timestep": d.time(1000),
        "encoder_hidden_states": d.floats(5, 12, salt=1)}


def _filled(d: Draw) -> WanAnimate2KVCache:
    """The keys and values of a reference, as a pass over it leaves them."""
    cache = WanAnimate2KVCache(3)
    for number, layer in enumerate(cache.layer_caches):
        layer.store(d.floats(32, 2, 12, salt=3 + number), d.floats(32, 2, 12, salt=6 + number))
    return cache


HUNYUAN = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
    "num_layers": 2, "num_single_layers": 3, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1,
    "text_embed_dim": 12, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)}


def _hunyuan(d: Draw) -> Inputs:
    return {"hidden_states": d.floats(4, 3, 8, 8), "timestep": d.time(1000),
        "encoder_hidden_states": d.floats(5, 12, salt=1), "encoder_attention_mask": d.ones(5),
        "pooled_projections": d.floats(8, salt=2), "guidance": torch.full((d.rows,), 3.5)}


VIDEOS = [
    Model(
        "AllegroTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
            "num_layers": 3, "cross_attention_dim": 48, "sample_height": 8, "sample_width": 8,
            "sample_frames": 2, "caption_channels": 12},
        lambda d: {"hidden_states": d.floats(4, 2, 8, 8), "encoder_hidden_states": d.floats(5, 12, salt=1),
            "timestep": d.time(1000), "attention_mask": d.ones(2, 8, 8),
            "encoder_attention_mask": d.ones(5)},
    ),
    Model(
        "AnyFlowTransformer3DModel",
        {**WAN},
        lambda d: {"hidden_states": d.floats(2, 4, 8, 8), "timestep": d.time(1000, 2),
            "r_timestep": d.time(900, 2), "encoder_hidden_states": d.floats(5, 12, salt=1)},
    ),
    Model(
        "AnyFlowFARTransformer3DModel",
        {**WAN, "full_chunk_limit": 2, "chunk_partition": (1, 1)},
        lambda d: {"hidden_states": d.floats(2, 4, 8, 8), "timestep": d.time(1000, 2),
            "r_timestep": d.time(900, 2), "encoder_hidden_states": d.floats(5, 12, salt=1),
            "chunk_partition": [1, 1]},
    ),
    Model(
        "ChronoEditTransformer3DModel",
        {**WAN, "rope_temporal_skip_len": 2},
        _wan,
    ),
    Model(
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 8, "text_embed_dim": 12, "num_layers": 3, "sample_width": 8,
            "sample_height": 8, "sample_frames": 5, "patch_size": 2, "max_text_seq_length": 5},
        lambda d: {"hidden_states": d.floats(2, 4, 8, 8), "encoder_hidden_states": d.floats(5, 12, salt=1),
            "timestep": d.time(1000)},
    ),
    Model(
        "ConsisIDTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 8, "text_embed_dim": 12, "num_layers": 4, "sample_width": 8,
            "sample_height": 8, "sample_frames": 5, "patch_size": 2, "max_text_seq_length": 5,
            "is_train_face": True, "cross_attn_interval": 2, "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2, "LFE_id_dim": 8, "LFE_vit_dim": 8, "LFE_depth": 5, "LFE_dim_head": 8,
            "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 2, "LFE_output_dim": 10,
            "LFE_ff_mult": 1, "LFE_num_scale": 1},
        lambda d: {"hidden_states": d.floats(2, 4, 8, 8), "encoder_hidden_states": d.floats(5, 12, salt=1),
            "timestep": d.time(1000), "id_cond": d.floats(8, salt=2), "id_vit_hidden": [d.floats(2, 8,
            salt=3)]},
    ),
    Model(
        "CosmosTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
            "num_layers": 3, "mlp_ratio": 2, "text_embed_dim": 12, "adaln_lora_dim": 4, "max_size": (4, 16,
            16), "patch_size": (1, 2, 2), "extra_pos_embed_type": "learnable",
            "concat_padding_mask": False},
        lambda d: {"hidden_states": d.floats(4, 2, 8, 8), "timestep": d.time(),
            "encoder_hidden_states": d.floats(5, 12, salt=1), "fps": 8},
    ),
    Model(
        "Cosmos3OmniTransformer",
        {"head_dim": 12, "hidden_size": 24, "intermediate_size": 48, "latent_channel": 4,
            "latent_patch_size": 2, "num_attention_heads": 2, "num_hidden_layers": 3,
            "num_key_value_heads": 1, "patch_latent_dim": 16, "vocab_size": 20, "rope_axes_dim": (2, 2, 2),
            "rope_scaling": {"mrope_section": [2, 2, 2], "rope_type": "default",
            "mrope_interleaved": True}},
        lambda d: {"input_ids": torch.arange(5), "text_indexes": torch.arange(5),
            "position_ids": torch.arange(21).expand(3, -1), "und_len": 5, "sequence_length": 21,
            "vision_tokens": [d.floats(4, 1, 8, 8)[:1]], "vision_token_shapes": [(1, 4, 4)],
            "vision_sequence_indexes": torch.arange(5, 21), "vision_mse_loss_indexes": torch.arange(5, 21),
            "vision_timesteps": torch.full((16,), d.t), "vision_noisy_frame_indexes": [torch.arange(1)]},
    ),
    Model(
        "EasyAnimateTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "patch_size": 2, "num_layers": 3, "mmdit_layers": 2, "time_embed_dim": 8, "text_embed_dim": 12},
        lambda d: {"hidden_states": d.floats(4, 2, 16, 16), "timestep": d.time(1000),
            "encoder_hidden_states": d.floats(5, 12, salt=1)},
    ),
    Model(
        "HeliosTransformer3DModel",
        {**{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)},
        lambda d: {**_wan(d), "indices_hidden_states": torch.arange(2).expand(d.rows, -1),
            "indices_latents_history_short": torch.arange(2).expand(d.rows, -1),
            "latents_history_short": d.floats(4, 2, 8, 8, salt=5)},
    ),
    Model(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        _hunyuan,
    ),
    Model(
        "HunyuanVideo15Transformer3DModel",
        {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "num_layers": 6, "num_refiner_layers": 1, "text_embed_dim": 12, "text_embed_2_dim": 8,
            "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6), "target_size": 16},
        lambda d: {"hidden_states": d.floats(9, 1, 12, 12), "timestep": d.time(1000),
            "encoder_hidden_states": d.floats(5, 12, salt=1), "encoder_attention_mask": d.ones(5),
            "encoder_hidden_states_2": d.floats(3, 8, salt=2), "encoder_attention_mask_2": d.ones(3),
            "image_embeds": torch.zeros(d.rows, 2, 8)},
    ),
    Model(
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        lambda d: {**_hunyuan(d), "image_embeds": d.floats(3, 8, salt=3),
            "indices_latents": torch.arange(3), "latents_clean": d.floats(4, 3, 8, 8, salt=4),
            "indices_latents_clean": torch.tensor([0, 3, 4]), "latents_history_2x": d.floats(4, 4, 8, 8,
            salt=5), "indices_latents_history_2x": torch.tensor([1, 2, 3, 4]),
            "latents_history_4x": d.floats(4, 4, 8, 8, salt=6),
            "indices_latents_history_4x": torch.arange(4)},
    ),
    Model(
        "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 8, "time_dim": 8, "out_visual_dim": 4,
            "model_dim": 32, "ff_dim": 48, "num_text_blocks": 2, "num_visual_blocks": 3, "axes_dims": (4, 6,
            6)},
        lambda d: {"hidden_states": d.floats(3, 8, 8, 4), "encoder_hidden_states": d.floats(5, 12, salt=1),
            "timestep": d.time(1000), "pooled_projections": d.floats(8, salt=2),
            "visual_rope_pos": (torch.arange(3), torch.arange(4), torch.arange(4)),
            "text_rope_pos": torch.arange(5)},
    ),
    Model(
        "Kandinsky6Transformer3DModel",
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 8, "time_dim": 8,
            "model_dim": 32, "ff_dim": 48, "num_text_blocks": 2, "num_visual_blocks": 3, "axes_dims": (4, 6,
            6), "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
        lambda d: {"hidden_states": d.floats(2, 8, 8, 4), "encoder_hidden_states": d.floats(5, 12, salt=1),
            "pooled_projections": d.floats(8, salt=2), "timestep": d.time(1000),
            "audio_hidden_states": d.floats(7, 4, salt=3)},
    ),
    Model(
        "LatteTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
            "num_layers": 3, "cross_attention_dim": 16, "sample_size": 8, "patch_size": 2,
            "norm_type": "ada_norm_single", "caption_channels": 12, "video_length": 2,
            "norm_elementwise_affine": False},
        lambda d: {"hidden_states": d.floats(4, 2, 8, 8), "timestep": d.time(1000),
            "encoder_hidden_states": d.floats(5, 12, salt=1)},
    ),
    Model(
        "LTXVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
            "cross_attention_dim": 24, "num_layers": 3, "caption_channels": 12},
        lambda d: {"hidden_states": d.floats(32, 4), "encoder_hidden_states": d.floats(5, 12, salt=1),
            "timestep": d.time(1000), "encoder_attention_mask": d.ones(5), "num_frames": 2, "height": 4,
            "width": 4},
    ),
    Model(
        "LTX2VideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
            "cross_attention_dim": 24, "audio_in_channels": 4, "audio_out_channels": 4,
            "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
            "num_layers": 3, "caption_channels": 12},
        lambda d: {"hidden_states": d.floats(32, 4), "audio_hidden_states": d.floats(7, 4, salt=3),
            "encoder_hidden_states": d.floats(5, 12, salt=1), "audio_encoder_hidden_states": d.floats(5, 12,
            salt=2), "timestep": d.time(1000, 1), "encoder_attention_mask": d.ones(5),
            "audio_encoder_attention_mask": d.ones(5), "num_frames": 2, "height": 4, "width": 4,
            "audio_num_frames": 7},
    ),
    Model(
        "MiniMaxH3Transformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 32, "hidden_size": 48, "num_layers": 3,
            "num_refiner_layers": 1, "ffn_dim": 64, "in_channels": 4, "audio_in_channels": 4,
            "text_dim": 12, "freq_dim": 16, "time_embed_hidden_dim": 16, "time_embed_dim": 16,
            "rope_freq_dim": 4},
        lambda d: {"hidden_states": d.floats(32, 16), "audio_hidden_states": d.floats(7, 4, salt=3),
            "encoder_hidden_states": d.floats(5, 12, salt=1), "timestep": d.time()[:1],
            "timestep_indices": torch.zeros(44).long(),
            "token_tags": torch.tensor([0] * 32 + [1] * 7 + [2] * 5), "position_ids": torch.zeros(44, 3),
            "video_indices": torch.arange(32), "audio_indices": torch.arange(32, 39),
            "text_indices": torch.arange(39, 44)},
    ),
    Model(
        "MochiTransformer3DModel",
        {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3,
            "pooled_projection_dim": 12, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8,
            "max_sequence_length": 5},
        lambda d: {"hidden_states": d.floats(4, 2, 8, 8), "encoder_hidden_states": d.floats(5, 16, salt=1),
            "timestep": d.time(1000), "encoder_attention_mask": d.ones(5).bool()},
    ),
    Model(
        "MotifVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "num_layers": 2, "num_single_layers": 3, "text_embed_dim": 12, "rope_axes_dim": (4, 6, 6)},
        lambda d: {"hidden_states": d.floats(4, 2, 8, 8), "timestep": d.time(1000),
            "encoder_hidden_states": d.floats(5, 12, salt=1), "encoder_attention_mask": d.ones(5).bool()},
    ),
    Model(
        "SanaVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
            "num_layers": 3, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12,
            "cross_attention_dim": 24, "caption_channels": 12, "sample_size": 8, "rope_max_seq_len": 32},
        lambda d: {"hidden_states": d.floats(4, 2, 8, 8), "encoder_hidden_states": d.floats(5, 12, salt=1),
            "timestep": d.time(1000)},
    ),
    Model(
        "SkyReelsV2Transformer3DModel",
        WAN,
        _wan,
    ),
    Model(
        "TransformerTemporalModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "num_layers": 3},
        lambda d: {"hidden_states": d.floats(2, 32, 4, 4).flatten(0, 1), "num_frames": 2,
            "timestep": d.time()},
    ),
    Model(
        "WanTransformer3DModel",
        WAN,
        _wan,
    ),
    Model(
        "WanAnimateTransformer3DModel",
        {**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 8, "added_kv_proj_dim": 24,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2, "num_layers": 4},
        lambda d: {"hidden_states": d.floats(12, 3, 8, 8), "timestep": d.time(1000),
            "encoder_hidden_states": d.floats(5, 12, salt=1), "encoder_hidden_states_image": d.floats(4, 8,
            salt=2), "pose_hidden_states": d.floats(4, 2, 8, 8, salt=3), "face_pixel_values": d.floats(3, 5,
            16, 16, salt=4)},
    ),
    Model(
        "WanAnimate2Transformer3DModel",
        {"text_len": 5, "in_dim": 8, "dim": 24, "ffn_dim": 32, "freq_dim": 16, "text_dim": 12, "out_dim": 4,
            "num_heads": 2, "num_layers": 3, "use_img_emb": False},
        lambda d: {"hidden_states": d.each(4, 2, 8, 8), "timestep": d.time(1000),
            "encoder_hidden_states": d.each(5, 12, salt=1), "condition_latents": d.each(4, 2, 8, 8, salt=2),
            "kv_cache": _filled(d), "kv_cache_mode": "cached", "seq_len": 32,
            "reference_grid_sizes": torch.tensor([[2, 4, 4]] * d.rows), "origin_len": 5,
            "origin_area": [64, 64]},
    ),
    Model(
        "WanVACETransformer3DModel",
        {**WAN, "vace_layers": [0, 2], "vace_in_channels": 6},
        lambda d: {**_wan(d), "control_hidden_states": d.floats(6, 2, 8, 8, salt=2)},
    ),
]
