"""What is true of the transformers that make sounds."""

from __future__ import annotations

from tests.zoo.expected.expected import Expected

# fmt: off
SOUNDS = {
    "AceStepTransformer1DModel": Expected(
        rows=(
            "layers AceStepTransformerBlock: hidden_states -> bare; time -; mlp.gate_proj * mlp.up_proj > "
            "mlp.down_proj",
        ),
    ),
    "LongCatAudioDiTTransformer": Expected(
        rows=(
            "blocks AudioDiTBlock: hidden_states -> bare; time timestep_embed; ffn.ff.0 > ffn.ff.3",
        ),
    ),
    "MiniMaxMusic3Transformer1DModel": Expected(
        rows=(
            "transformer_blocks MiniMaxMusic3TransformerBlock: hidden_states -> bare; time -; 2x ff_in > "
            "ff_out",
        ),
    ),
    "StableAudio3DiTModel": Expected(
        rows=(
            "transformer_blocks StableAudio3DiTBlock: hidden_states -> bare; time global_modulation; 2x "
            "ff.proj_in > ff.proj_out",
        ),
    ),
    "StableAudioDiTModel": Expected(
        rows=(
            "transformer_blocks StableAudioDiTBlock: hidden_states -> bare; time -; 2x ff.net.0.proj > "
            "ff.net.2",
        ),
    ),
}
