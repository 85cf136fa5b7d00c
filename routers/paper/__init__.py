"""The paper's own checkpoints and their block-by-block policy."""
