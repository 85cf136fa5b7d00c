"""What every run of a trained bundle needs."""
