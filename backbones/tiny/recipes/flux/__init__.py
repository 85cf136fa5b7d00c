"""How `flux-tiny` was made: `python -m backbones.tiny.recipes.flux.<step>`.

Steps, in order: `text` (tokenizers), `vae`, `dit` (taught by the packaged qwen-image-tiny, elastic) and
`export`; `grid` and `probe` look at results. Pictures, captions and latents are those of
`backbones.tiny.recipes` (`data`, `latents`). Every step is seeded, bounded by `--minutes`, logs its
progress and resumes from its own checkpoint in `runs/flux/`.
"""
