"""Run the command line from a checkout: ``python cli.py train``."""

from kiop_fast.cli import main

main()
