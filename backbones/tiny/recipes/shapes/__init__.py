"""How `hunyuan3d-tiny` was made: `python -m backbones.tiny.recipes.shapes.<step>`.

Steps, in order: `dataset`, `vae`, `dit`, `evaluate`, `export`, `silhouettes`. Every step is seeded, logs its
progress, resumes from what it left in `runs/shapes/`, and is described in docs/hunyuan3d-tiny.md. Every shape
is made by code: procedural solids (`solids`), and emoji art inflated to puffy solids (`inflate`).

Axes everywhere: x right, y up, z towards the viewer of the picture.
"""
