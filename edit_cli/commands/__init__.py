"""The commands of `edit`, one thin file each."""
