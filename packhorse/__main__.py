"""`python -m packhorse`: the command."""

from packhorse.trainer.cli.main import main

main()
