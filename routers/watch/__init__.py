"""What `edit profile` observes of a run."""
