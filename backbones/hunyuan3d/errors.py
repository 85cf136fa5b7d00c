"""What can be wrong with the user's files or results. No torch here."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which key, file or setting, and what is allowed."""


class NoSurfaceError(RuntimeError):
    """The field does not cross the asked level anywhere."""
