"""The commands of `edit`, one thin file each. help.py shows them, presets.py fills their options."""
