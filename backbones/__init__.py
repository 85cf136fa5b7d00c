"""What can be generated with: a torch-free registry, one adapter per family, and the loader."""
