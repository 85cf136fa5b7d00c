"""What is true of the transformers that make videos."""

from __future__ import annotations

from tests.zoo.expected.expected import Expected

# fmt: off
VIDEOS = {
    "AllegroTransformer3DModel": Expected(
        rows=(
            "transformer_blocks AllegroTransformerBlock: hidden_states -> bare; time temb; ff.net.0.proj "
            "> ff.net.2",
        ),
    ),
    "AnyFlowTransformer3DModel": Expected(
        rows=(
            "blocks AnyFlowTransformerBlock: hidden_states -> bare; time -; ffn.net.0.proj > ffn.net.2",
        ),
    ),
    "ChronoEditTransformer3DModel": Expected(
        rows=(
            "blocks WanTransformerBlock: hidden_states -> bare; time -; ffn.net.0.proj > ffn.net.2",
        ),
    ),
    "CogVideoXTransformer3DModel": Expected(
        rows=(
            "transformer_blocks CogVideoXBlock: hidden_states, encoder_hidden_states -> 0, 1; time temb; "
            "ff.net.0.proj > ff.net.2",
        ),
    ),
    "ConsisIDTransformer3DModel": Expected(
        rows=(
            "transformer_blocks ConsisIDBlock: hidden_states, encoder_hidden_states -> 0, 1; time temb; "
            "ff.net.0.proj > ff.net.2",
        ),
        left={"perceiver_cross_attention": "no timestep argument"},
    ),
    "CosmosTransformer3DModel": Expected(
        rows=(
            "transformer_blocks CosmosTransformerBlock: hidden_states -> bare; time embedded_timestep; "
            "ff.net.0.proj > ff.net.2",
        ),
    ),
    "Cosmos3OmniTransformer": Expected(
        rows=(
            "layers Cosmos3VLTextMoTDecoderLayer: gen_seq, und_seq -> 1, 0; time -; mlp_moe_gen.gate_proj "
            "* mlp_moe_gen.up_proj > mlp_moe_gen.down_proj (all rows)",
        ),
        facts={
            "sample": "vision_tokens",
            "timestep": "vision_timesteps",
            "listed_sample": True,
            "per_row": False,
        },
    ),
    "EasyAnimateTransformer3DModel": Expected(
        rows=(
            "transformer_blocks EasyAnimateTransformerBlock: hidden_states, encoder_hidden_states -> 0, "
            "1; time temb; ff.net.0.proj > ff.net.2",
        ),
    ),
    "HeliosTransformer3DModel": Expected(
        rows=(
            "blocks HeliosTransformerBlock: hidden_states -> bare; time -; ffn.net.0.proj > ffn.net.2",
        ),
    ),
    "HunyuanVideoTransformer3DModel": Expected(
        rows=(
            "transformer_blocks HunyuanVideoTransformerBlock: hidden_states, encoder_hidden_states -> 0, "
            "1; time temb; ff.net.0.proj > ff.net.2",
            "single_transformer_blocks HunyuanVideoSingleTransformerBlock: hidden_states, "
            "encoder_hidden_states -> 0, 1; time temb; proj_mlp > proj_out",
        ),
        left={"context_embedder.token_refiner.refiner_blocks": "inside another module"},
    ),
    "HunyuanVideo15Transformer3DModel": Expected(
        rows=(
            "transformer_blocks HunyuanVideo15TransformerBlock: hidden_states, encoder_hidden_states -> "
            "0, 1; time temb; ff.net.0.proj > ff.net.2",
        ),
        left={"context_embedder.token_refiner.refiner_blocks": "inside another module"},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Expected(
        rows=(
            "transformer_blocks HunyuanVideoTransformerBlock: hidden_states, encoder_hidden_states -> 0, "
            "1; time temb; ff.net.0.proj > ff.net.2",
            "single_transformer_blocks HunyuanVideoSingleTransformerBlock: hidden_states, "
            "encoder_hidden_states -> 0, 1; time temb; proj_mlp > proj_out",
        ),
        left={"context_embedder.token_refiner.refiner_blocks": "inside another module"},
    ),
    "Kandinsky5Transformer3DModel": Expected(
        rows=(
            "text_transformer_blocks Kandinsky5TransformerEncoderBlock: x -> bare; time time_embed; "
            "feed_forward.in_layer > feed_forward.out_layer",
            "visual_transformer_blocks Kandinsky5TransformerDecoderBlock: visual_embed -> bare; time "
            "time_embed; feed_forward.in_layer > feed_forward.out_layer",
        ),
        facts={"skips": True},
    ),
    "Kandinsky6Transformer3DModel": Expected(
        rows=(
            "video_text_transformer_blocks Kandinsky6TransformerEncoderBlock: x -> bare; time time_embed; "
            "feed_forward.net.0.proj > feed_forward.net.2",
            "audio_text_transformer_blocks Kandinsky6TransformerEncoderBlock: x -> bare; time time_embed; "
            "feed_forward.net.0.proj > feed_forward.net.2",
            "visual_transformer_blocks Kandinsky6FusedTransformerDecoderBlock: vis, aud -> 0, 1; time -; "
            "video_dec_block.feed_forward.net.0.proj > video_dec_block.feed_forward.net.2",
        ),
        facts={"skips": True, "block2 fresh": True, "double rows": ["time_embed.0", "time_embed.1"]},
    ),
    "LatteTransformer3DModel": Expected(
        rows=(
            "transformer_blocks BasicTransformerBlock: hidden_states -> bare; time timestep; 2x "
            "ff.net.0.proj > ff.net.2",
        ),
        left={"temporal_transformer_blocks": "same argument names on other tokens"},
        facts={"block rows": ["hidden_states folded", "encoder_hidden_states folded", "timestep folded"]},
    ),
    "LTXVideoTransformer3DModel": Expected(
        rows=(
            "transformer_blocks LTXVideoTransformerBlock: hidden_states -> bare; time -; ff.net.0.proj > "
            "ff.net.2",
        ),
        facts={"block rows": ["image_rotary_emb.0", "image_rotary_emb.1"]},
    ),
    "LTX2VideoTransformer3DModel": Expected(
        rows=(
            "transformer_blocks LTX2VideoTransformerBlock: hidden_states, audio_hidden_states -> 0, 1; "
            "time -; ff.net.0.proj > ff.net.2",
        ),
        facts={
            "double rows": ["video_rotary_emb.0", "video_rotary_emb.1", "audio_rotary_emb.0",
                "audio_rotary_emb.1", "ca_video_rotary_emb.0", "ca_video_rotary_emb.1",
                "ca_audio_rotary_emb.0", "ca_audio_rotary_emb.1"],
        },
    ),
    "MiniMaxH3Transformer3DModel": Expected(
        rows=(
            "transformer_blocks MiniMaxH3TransformerBlock: hidden_states -> bare; time temb; 2x "
            "ff.net.0.proj > ff.net.2",
        ),
        left={"token_refiner.refiner_blocks": "inside another module"},
    ),
    "MochiTransformer3DModel": Expected(
        rows=(
            "transformer_blocks MochiTransformerBlock: hidden_states, encoder_hidden_states -> 0, 1; time "
            "temb; 2x ff.net.0.proj > ff.net.2",
        ),
    ),
    "MotifVideoTransformer3DModel": Expected(
        rows=(
            "transformer_blocks MotifVideoTransformerBlock: hidden_states, encoder_hidden_states -> 0, 1; "
            "time temb; ff.net.0.proj > ff.net.2",
            "single_transformer_blocks MotifVideoSingleTransformerBlock: hidden_states, "
            "encoder_hidden_states -> 0, 1; time temb; proj_mlp > proj_out",
        ),
    ),
    "SanaVideoTransformer3DModel": Expected(
        rows=(
            "transformer_blocks SanaVideoTransformerBlock: hidden_states -> bare; time -; fixed width",
        ),
    ),
    "SkyReelsV2Transformer3DModel": Expected(
        rows=(
            "blocks SkyReelsV2TransformerBlock: hidden_states -> bare; time -; ffn.net.0.proj > ffn.net.2",
        ),
    ),
    "TransformerTemporalModel": Expected(
        rows=(
            "transformer_blocks BasicTransformerBlock: hidden_states -> bare; time -; 2x ff.net.0.proj > "
            "ff.net.2",
        ),
        facts={"per_row": False},
    ),
    "WanTransformer3DModel": Expected(
        rows=(
            "blocks WanTransformerBlock: hidden_states -> bare; time -; ffn.net.0.proj > ffn.net.2",
        ),
    ),
    "WanAnimateTransformer3DModel": Expected(
        rows=(
            "blocks WanTransformerBlock: hidden_states -> bare; time -; ffn.net.0.proj > ffn.net.2",
        ),
        left={
            "motion_encoder.res_blocks": "not called once each in order (4 calls of 2 blocks)",
            "motion_encoder.motion_network": "not called once each in order (10 calls of 5 blocks)",
            "face_adapter": "no timestep argument",
        },
    ),
    "WanVACETransformer3DModel": Expected(
        rows=(
            "blocks WanTransformerBlock: hidden_states -> bare; time -; ffn.net.0.proj > ffn.net.2",
        ),
        left={"vace_blocks": "WanVACETransformerBlock: gives hints that others read"},
    ),
    "AnyFlowFARTransformer3DModel": Expected(
        rows=(
            "blocks AnyFlowTransformerBlock: hidden_states -> bare; time -; ffn.net.0.proj > ffn.net.2",
        ),
        facts={"block objects": ["attention_mask"]},
    ),
    "WanAnimate2Transformer3DModel": Expected(
        rows=("blocks WanAnimate2TransformerBlock: hidden_states -> bare; time -; ffn.0 > ffn.2",),
        facts={
            "listed_sample": True,
            "per_row": False,
            "block objects": ["kv_cache", "attention_mask"],
        },
    ),
}
