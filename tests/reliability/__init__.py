"""What the reliability bars ask for: small versions are slow tests, full ones commands."""
