"""What `edit profile` does."""
