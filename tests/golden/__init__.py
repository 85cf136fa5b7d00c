"""Golden cases: small recorded runs of the reference systems, and their runner (`python -m tests.golden`)."""
