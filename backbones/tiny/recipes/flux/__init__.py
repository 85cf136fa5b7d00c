"""How `flux-tiny` was made: `python -m backbones.tiny.recipes.flux.<step>`.

Steps, in order: `text` (tokenizers), `vae`, `latents`, `dit` (plain, then guidance distilled), `elastic`,
`export`; `grid` looks at results. Pictures and captions are those of `backbones.tiny.recipes.data`. Every
step is seeded, bounded by `--minutes`, logs its progress and resumes from its own checkpoint in `runs/flux/`.
"""
