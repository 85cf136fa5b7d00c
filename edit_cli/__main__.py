"""`python -m edit_cli` is `edit`."""

from edit_cli.main import main

main()
