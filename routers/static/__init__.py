"""Smaller models without routers."""
