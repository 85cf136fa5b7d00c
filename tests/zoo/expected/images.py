"""What is true of the transformers that make images."""

from __future__ import annotations

from tests.zoo.expected.expected import Expected

# fmt: off
IMAGES = {
    "DiTTransformer2DModel": Expected(
        rows=(
            "transformer_blocks BasicTransformerBlock: hidden_states -> bare; time -; ff.net.0.proj > "
            "ff.net.2",
        ),
    ),
    "PixArtTransformer2DModel": Expected(
        rows=(
            "transformer_blocks BasicTransformerBlock: hidden_states -> bare; time timestep; "
            "ff.net.0.proj > ff.net.2",
        ),
    ),
    "PriorTransformer": Expected(
        rows=(
            "transformer_blocks BasicTransformerBlock: hidden_states -> bare; time -; ff.net.0.proj > "
            "ff.net.2",
        ),
    ),
    "AuraFlowTransformer2DModel": Expected(
        rows=(
            "joint_transformer_blocks AuraFlowJointTransformerBlock: hidden_states, encoder_hidden_states "
            "-> 1, 0; time temb; ff.linear_1 * ff.linear_2 > ff.out_projection",
            "single_transformer_blocks AuraFlowSingleTransformerBlock: hidden_states -> bare; time temb; "
            "ff.linear_1 * ff.linear_2 > ff.out_projection",
        ),
    ),
    "BriaTransformer2DModel": Expected(
        rows=(
            "transformer_blocks BriaTransformerBlock: hidden_states, encoder_hidden_states -> 1, 0; time "
            "temb; ff.net.0.proj > ff.net.2",
            "single_transformer_blocks BriaSingleTransformerBlock: hidden_states, encoder_hidden_states "
            "-> 1, 0; time temb; proj_mlp > proj_out",
        ),
    ),
    "BriaFiboTransformer2DModel": Expected(
        rows=(
            "transformer_blocks BriaFiboTransformerBlock: hidden_states, encoder_hidden_states -> 1, 0; "
            "time temb; ff.net.0.proj > ff.net.2",
            "single_transformer_blocks BriaFiboSingleTransformerBlock: hidden_states -> bare; time temb; "
            "proj_mlp > proj_out",
        ),
        left={"caption_projection": "BriaFiboTextProjection: no output continues an argument"},
    ),
    "ChromaTransformer2DModel": Expected(
        rows=(
            "transformer_blocks ChromaTransformerBlock: hidden_states, encoder_hidden_states -> 1, 0; "
            "time -; ff.net.0.proj > ff.net.2",
            "single_transformer_blocks ChromaSingleTransformerBlock: hidden_states -> bare; time -; "
            "proj_mlp > proj_out",
        ),
        left={
            "distilled_guidance_layer.layers": "inside another module",
            "distilled_guidance_layer.norms": "inside another module",
        },
    ),
    "CogView3PlusTransformer2DModel": Expected(
        rows=(
            "transformer_blocks CogView3PlusTransformerBlock: hidden_states, encoder_hidden_states -> 0, "
            "1; time emb; ff.net.0.proj > ff.net.2",
        ),
    ),
    "CogView4Transformer2DModel": Expected(
        rows=(
            "transformer_blocks CogView4TransformerBlock: hidden_states, encoder_hidden_states -> 0, 1; "
            "time temb; ff.net.0.proj > ff.net.2",
        ),
    ),
    "ErnieImageTransformer2DModel": Expected(
        rows=(
            "layers ErnieImageSharedAdaLNBlock: x -> bare; time -; mlp.gate_proj * mlp.up_proj > "
            "mlp.linear_fc2",
        ),
        facts={
            "block rows": ["x axis 1", "temb.0 axis 1", "temb.1 axis 1", "temb.2 axis 1", "temb.3 axis 1",
                "temb.4 axis 1", "temb.5 axis 1"],
        },
    ),
    "FluxTransformer2DModel": Expected(
        rows=(
            "transformer_blocks FluxTransformerBlock: hidden_states, encoder_hidden_states -> 1, 0; time "
            "temb; ff.net.0.proj > ff.net.2",
            "single_transformer_blocks FluxSingleTransformerBlock: hidden_states, encoder_hidden_states "
            "-> 1, 0; time temb; proj_mlp > proj_out",
        ),
    ),
    "Flux2Transformer2DModel": Expected(
        rows=(
            "transformer_blocks Flux2TransformerBlock: hidden_states, encoder_hidden_states -> 1, 0; time "
            "temb_mod_img; 2x ff.linear_in > ff.linear_out",
            "single_transformer_blocks Flux2SingleTransformerBlock: hidden_states -> bare; time temb_mod; "
            "2x attn.to_qkv_mlp_proj > attn.to_out",
        ),
    ),
    "Flux3Transformer2DModel": Expected(
        rows=(
            "single_transformer_blocks Flux3SingleTransformerBlock: hidden_states, encoder_hidden_states "
            "-> 1, 0; time -; 2x ff.linear_in > ff.linear_out",
        ),
        left={"mode_blocks.image": "inside another module", "txt_mode_blocks": "no timestep argument"},
    ),
    "GlmImageTransformer2DModel": Expected(
        rows=(
            "transformer_blocks GlmImageTransformerBlock: hidden_states, encoder_hidden_states -> 0, 1; "
            "time temb; ff.net.0.proj > ff.net.2",
        ),
        left={"prior_projector.net": "inside another module"},
    ),
    "HiDreamImageTransformer2DModel": Expected(
        rows=(
            "double_stream_blocks HiDreamBlock: hidden_states, encoder_hidden_states -> 0, 1; time temb; "
            "block.ff_i.experts.0.w1 * block.ff_i.experts.0.w3 > block.ff_i.experts.0.w2 (all rows), "
            "block.ff_i.experts.1.w1 * block.ff_i.experts.1.w3 > block.ff_i.experts.1.w2 (all rows), "
            "block.ff_i.shared_experts.w1 * block.ff_i.shared_experts.w3 > block.ff_i.shared_experts.w2",
            "single_stream_blocks HiDreamBlock: hidden_states -> bare; time temb; block.ff_i.experts.0.w1 "
            "* block.ff_i.experts.0.w3 > block.ff_i.experts.0.w2 (all rows), block.ff_i.experts.1.w1 * "
            "block.ff_i.experts.1.w3 > block.ff_i.experts.1.w2 (all rows), block.ff_i.shared_experts.w1 * "
            "block.ff_i.shared_experts.w3 > block.ff_i.shared_experts.w2",
        ),
        left={"caption_projection": "TextProjection: no output continues an argument"},
        facts={"timestep": "timesteps"},
    ),
    "HunyuanDiT2DModel": Expected(
        rows=(
            "blocks HunyuanDiTBlock: hidden_states -> bare; time temb; ff.net.0.proj > ff.net.2",
        ),
        facts={"skips": True},
    ),
    "HunyuanImageTransformer2DModel": Expected(
        rows=(
            "transformer_blocks HunyuanImageTransformerBlock: hidden_states, encoder_hidden_states -> 0, "
            "1; time temb; ff.net.0.proj > ff.net.2",
            "single_transformer_blocks HunyuanImageSingleTransformerBlock: hidden_states, "
            "encoder_hidden_states -> 0, 1; time temb; proj_mlp > proj_out",
        ),
        left={"context_embedder.token_refiner.refiner_blocks": "inside another module"},
    ),
    "Ideogram4Transformer2DModel": Expected(
        rows=(
            "layers Ideogram4TransformerBlock: hidden_states -> bare; time -; feed_forward.w1 * "
            "feed_forward.w3 > feed_forward.w2",
        ),
        facts={"block rows": ["image_rotary_emb.0", "image_rotary_emb.1"]},
    ),
    "Krea2Transformer2DModel": Expected(
        rows=(
            "transformer_blocks Krea2TransformerBlock: hidden_states -> bare; time -; ff.gate * ff.up > "
            "ff.down",
        ),
        left={
            "text_fusion.layerwise_blocks": "inside another module",
            "text_fusion.refiner_blocks": "inside another module",
        },
    ),
    "LongCatImageTransformer2DModel": Expected(
        rows=(
            "transformer_blocks LongCatImageTransformerBlock: hidden_states, encoder_hidden_states -> 1, "
            "0; time temb; ff.net.0.proj > ff.net.2",
            "single_transformer_blocks LongCatImageSingleTransformerBlock: hidden_states, "
            "encoder_hidden_states -> 1, 0; time temb; proj_mlp > proj_out",
        ),
    ),
    "Lumina2Transformer2DModel": Expected(
        rows=(
            "layers Lumina2TransformerBlock: hidden_states -> bare; time temb; feed_forward.linear_1 * "
            "feed_forward.linear_3 > feed_forward.linear_2",
        ),
        left={
            "noise_refiner": "same argument names on other tokens",
            "context_refiner": "no timestep argument",
        },
    ),
    "LuminaNextDiT2DModel": Expected(
        rows=(
            "layers LuminaNextDiTBlock: hidden_states -> bare; time temb; feed_forward.linear_1 * "
            "feed_forward.linear_3 > feed_forward.linear_2",
        ),
    ),
    "NucleusMoEImageTransformer2DModel": Expected(
        rows=(
            "transformer_blocks NucleusMoEImageTransformerBlock: hidden_states -> bare; time temb; fixed "
            "width",
        ),
        facts={"block rows": ["attention_kwargs.attention_mask"]},
    ),
    "OmniGenTransformer2DModel": Expected(
        rows=(
            "layers OmniGenBlock: hidden_states -> bare; time -; 2x mlp.gate_up_proj > mlp.down_proj",
        ),
    ),
    "OvisImageTransformer2DModel": Expected(
        rows=(
            "transformer_blocks OvisImageTransformerBlock: hidden_states, encoder_hidden_states -> 1, 0; "
            "time temb; 2x ff.net.0.proj > ff.net.2",
            "single_transformer_blocks OvisImageSingleTransformerBlock: hidden_states, "
            "encoder_hidden_states -> 1, 0; time temb; 2x proj_mlp > proj_out",
        ),
    ),
    "PRXTransformer2DModel": Expected(
        rows=(
            "blocks PRXBlock: hidden_states -> bare; time temb; gate_proj * up_proj > down_proj",
        ),
    ),
    "QwenImageTransformer2DModel": Expected(
        rows=(
            "transformer_blocks QwenImageTransformerBlock: hidden_states, encoder_hidden_states -> 1, 0; "
            "time temb; img_mlp.net.0.proj > img_mlp.net.2",
        ),
    ),
    "QwenImage21Transformer2DModel": Expected(
        rows=(
            "transformer_blocks QwenImage21TransformerBlock: hidden_states -> bare; time modulation; "
            "img_mlp.gate_layer * img_mlp.proj > img_mlp.out",
        ),
        facts={"per_row": False},
    ),
    "SD3Transformer2DModel": Expected(
        rows=(
            "transformer_blocks JointTransformerBlock: hidden_states, encoder_hidden_states -> 1, 0; time "
            "temb; ff.net.0.proj > ff.net.2",
        ),
        facts={"double ends": ["encoder_hidden_states"]},
    ),
    "SanaTransformer2DModel": Expected(
        rows=(
            "transformer_blocks SanaTransformerBlock: hidden_states -> bare; time timestep; fixed width",
        ),
    ),
    "ZImageTransformer2DModel": Expected(
        rows=(
            "layers ZImageTransformerBlock: x -> bare; time adaln_input; feed_forward.w1 * "
            "feed_forward.w3 > feed_forward.w2",
        ),
        left={
            "noise_refiner": "same argument names on other tokens",
            "context_refiner": "no timestep argument",
        },
        facts={"sample": "x", "timestep": "t", "listed_sample": True},
    ),
    "BriaFibo2Transformer2DModel": Expected(
        rows=(
            "layers BriaFibo2TransformerBlock: x -> bare; time adaln_noisy; feed_forward.w1 * "
            "feed_forward.w3 > feed_forward.w2",
        ),
        left={
            "perceiver.layers": "inside another module",
            "noise_refiner": "same argument names on other tokens",
        },
    ),
    "JoyImageEditTransformer3DModel": Expected(
        rows=(
            "double_blocks JoyImageTransformerBlock: hidden_states, encoder_hidden_states -> 0, 1; time "
            "-; img_mlp.net.0.proj > img_mlp.net.2",
        ),
    ),
    "JoyImageEditPlusTransformer3DModel": Expected(
        rows=(
            "double_blocks JoyImageEditPlusTransformerBlock: hidden_states, encoder_hidden_states -> 0, "
            "1; time -; img_mlp.net.0.proj > img_mlp.net.2",
        ),
        facts={"double rows": ["image_rotary_emb.0", "image_rotary_emb.1"]},
    ),
}
