"""The command line: look at a run, choose what it resumes from, clean up, stop it, rehearse it."""

from spotguard.cli.app import main

__all__ = ["main"]
