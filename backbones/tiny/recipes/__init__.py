"""How `qwen-image-tiny` was made: `python -m backbones.tiny.recipes.<step>`.

Steps, in order: `data`, `vae`, `latents`, `dit`, `elastic`, `classifier`, `export`; `grid` looks at results.
Every step is seeded, logs its progress, resumes from its own checkpoint in `runs/`, and is described in
docs/tiny-models.md.
"""
