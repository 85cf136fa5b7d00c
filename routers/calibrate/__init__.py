"""Fit a bundle to a model: record the dense model, measure what each cheaper action costs, fit routers."""
