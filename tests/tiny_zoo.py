"""Tiny random pipelines of many families, saved as folders: of our own small configurations, in seconds.

python -m tests.tiny_zoo qwen-edit FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.tiny_pipelines import (
    WORDS,
    make_flux,
    make_qwen_image,
    make_tokenizer,
    qwen_vl_config,
    write_defaults,
)

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rename(folder: Path, pipeline: str, **components: Any) -> Path:
    """The folder as another pipeline class saves the same components; others of it are absent."""
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": pipeline, **components}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def chat_tokenizer(folder: Path) -> Any:
    """A tokenizer with the special tokens and the chat template of Qwen models."""
    tokenizer = make_tokenizer(f"system user assistant {WORDS}")
    tokenizer.add_special_tokens({"additional_special_tokens": [
        "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    ]})  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def flow_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def kl_vae(channels: int = 4, levels: int = 4, **config: Any) -> Any:
    """A random AutoencoderKL that makes a picture 8 times smaller."""
    from diffusers import AutoencoderKL

    settings = {
        "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0, "scaling_factor": 1.0,
        **config,
    }  # fmt: skip
    return AutoencoderKL(
        block_out_channels=(8,) * levels, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, latent_channels=channels, norm_num_groups=4, **settings,
    )  # fmt: skip


def make_qwen_edit(folder: Path, pipeline: str = "QwenImageEditPipeline") -> Path:
    """A Qwen-Image pipeline whose text encoder also sees pictures."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    make_qwen_image(folder)
    tokenizer = chat_tokenizer(folder)
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    config = qwen_vl_config(
        tokenizer,
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    pictures = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    for part in (pictures, tokenizer):
        part.save_pretrained(folder / "processor")
    return rename(folder, pipeline, processor=["transformers", "Qwen2VLProcessor"])


def make_flux_like(folder: Path, pipeline: str, channels: int = 16) -> Path:
    """A FLUX.1 pipeline of another class. channels: of its transformer's input."""
    from diffusers import FluxTransformer2DModel

    make_flux(folder)
    if channels != 16:
        config = dict(FluxTransformer2DModel.load_config(folder / "transformer"))
        config |= {"in_channels": channels, "out_channels": 16}
        torch.manual_seed(0)
        FluxTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    return rename(folder, pipeline)


def qwen3(tokenizer: Any, width: int, layers: int = 2, causal: bool = False) -> Any:
    """A random Qwen3 text encoder."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer) + 8, hidden_size=width, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=2048,
    )  # fmt: skip
    return (Qwen3ForCausalLM if causal else Qwen3Model)(config)


def make_flux2_klein(folder: Path) -> Path:
    """FLUX.2 klein: the text's width is that of three layers of Qwen3."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    tokenizer = chat_tokenizer(folder)
    encoder = qwen3(tokenizer, 16, layers=28, causal=True)  # it takes the 9th, 18th and 27th
    pipe = Flux2KleinPipeline(
        scheduler=flow_scheduler(),
        vae=AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, norm_num_groups=4,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=32,
            axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False,
        ),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    write_defaults(folder, width=64, height=64, steps=2, max_sequence_length=32)
    return folder


def make_z_image(folder: Path) -> Path:
    """Z-Image: a list of samples, and refiners before the blocks."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    tokenizer = chat_tokenizer(folder)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, qk_norm=True, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for name in ("x_pad_token", "cap_pad_token"):  # made of memory that nothing was written to
        torch.nn.init.normal_(getattr(transformer, name))
    pipe = ZImagePipeline(
        scheduler=flow_scheduler(), vae=kl_vae(4), text_encoder=qwen3(tokenizer, 16), tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    write_defaults(folder, width=64, height=64, steps=2, max_sequence_length=32)
    return folder


def make_sd3(folder: Path) -> Path:
    """Stable Diffusion 3 without its third text encoder."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS)
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        scheduler=flow_scheduler(), vae=kl_vae(4),
        text_encoder=CLIPTextModelWithProjection(config), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
            pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
        ),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    write_defaults(folder, width=64, height=64, steps=2)
    return folder


def t5(tokenizer: Any, kind: str = "T5EncoderModel", **config: Any) -> Any:
    """A random T5 or UMT5 encoder of width 32."""
    import transformers

    settings = getattr(transformers, "UMT5Config" if kind.startswith("UMT5") else "T5Config")(
        vocab_size=len(tokenizer) + 8, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **config
    )
    return getattr(transformers, kind)(settings)


def make_wan(folder: Path) -> Path:
    """Wan 2.1, text to video: 5 frames are 2 of the transformer's."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS)
    pipe = WanPipeline(
        scheduler=flow_scheduler(), tokenizer=tokenizer, text_encoder=t5(tokenizer, "UMT5EncoderModel"),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
            out_channels=16, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    write_defaults(folder, width=32, height=32, steps=2, frames=5, max_sequence_length=16)
    return folder


def make_wan_halves(folder: Path) -> Path:
    """Wan 2.2: two transformers, each for a part of the steps."""
    make_wan(folder)
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    config = WanTransformer3DModel.load_config(folder / "transformer")
    WanTransformer3DModel.from_config(config).save_pretrained(folder / "transformer_2")
    return rename(
        folder, "WanPipeline", transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.6
    )


def make_ltx2(folder: Path) -> Path:
    """LTX 2: a video with its sound, of one transformer with streams of both."""
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    torch.manual_seed(0)
    tokenizer, width, layers = chat_tokenizer(folder), 16, 2
    tokenizer.model_max_length = 16
    connectors: dict[str, Any] = {}
    for kind in ("video", "audio"):
        connectors |= {
            f"{kind}_connector_num_attention_heads": 2, f"{kind}_connector_attention_head_dim": 8,
            f"{kind}_connector_num_layers": 1, f"{kind}_connector_num_learnable_registers": None,
        }  # fmt: skip
    pipe = LTX2Pipeline(
        scheduler=flow_scheduler(), tokenizer=tokenizer, text_encoder=qwen3(tokenizer, width, layers),
        vae=AutoencoderKLLTX2Video(
            latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
            layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
            downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
            patch_size=1, patch_size_t=1,
        ),
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, resolution=32, mel_bins=8,
            sample_rate=16000, mel_hop_length=160,
        ),
        connectors=LTX2TextConnectors(
            caption_channels=width, text_proj_in_factor=layers + 1, connector_rope_base_seq_len=32,
            rope_double_precision=False, rope_type="split", **connectors,
        ),
        transformer=LTX2VideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
            audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2, caption_channels=width,
            rope_double_precision=False, rope_type="split",
        ),
        vocoder=LTX2Vocoder(
            in_channels=16, hidden_channels=16, out_channels=2, upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    write_defaults(folder, width=32, height=32, steps=2, frames=5, fps=25, max_sequence_length=16)
    return folder


def make_stable_audio(folder: Path) -> Path:
    """Stable Audio: sound of two channels at 16 kHz."""
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
    )
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS)
    tokenizer.model_max_length = 10
    pipe = StableAudioPipeline(
        scheduler=EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        vae=AutoencoderOobleck(
            encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
            audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
        ),
        text_encoder=t5(tokenizer), tokenizer=tokenizer,
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32
        ),
        transformer=StableAudioDiTModel(
            sample_size=8, in_channels=3, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            num_key_value_attention_heads=2, out_channels=3, cross_attention_dim=32, time_proj_dim=8,
            global_states_input_dim=64, cross_attention_input_dim=32,
        ),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    write_defaults(folder, steps=2, seconds=2)
    return folder


MAKE: Mapping[str, Callable[[Path], Path]] = {
    "qwen-edit": make_qwen_edit,
    "qwen-edit-plus": lambda folder: make_qwen_edit(folder, "QwenImageEditPlusPipeline"),
    "flux-kontext": lambda folder: rename(make_flux(folder), "FluxKontextPipeline"),
    "flux-fill": lambda folder: make_flux_like(folder, "FluxFillPipeline", 16 + 16 + 256),
    "flux-img2img": lambda folder: rename(make_flux(folder), "FluxImg2ImgPipeline"),
    "flux2-klein": make_flux2_klein,
    "z-image": make_z_image,
    "sd3": make_sd3,
    "wan": make_wan,
    "wan-2.2": make_wan_halves,
    "ltx2": make_ltx2,
    "stable-audio": make_stable_audio,
}
"""Folder makers by name."""

if __name__ == "__main__":
    MAKE[sys.argv[1]](Path(sys.argv[2]))
