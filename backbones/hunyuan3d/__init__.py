"""Hunyuan3D shape generation: image in, mesh out. Both DiTs, shape VAE, conditioner, pipeline, surfaces.

Written independently from a description of the published checkpoints; contains none of Tencent's code.
"""
