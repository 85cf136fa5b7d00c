"""What `edit export` does, one file per format."""
