"""What `edit calibrate` does."""
