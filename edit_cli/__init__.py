"""The `edit` command: one thin file per command."""

__version__ = "0.1.0"
