"""Opening a run that a command is about."""

import typer

from spotguard.cli.output import fail
from spotguard.pipeline.checkpoint_store import CheckpointStore
from spotguard.pipeline.history import read_history

__all__ = ["existing_run"]


def existing_run(uri: str) -> CheckpointStore:
    """Open a run that is there: a typing error must not look like an empty run."""
    store = CheckpointStore(uri)
    if next(iter(store.objects.list("")), None) is None:
        fail(f"there is nothing at {store.uri}; check the URI")
        raise typer.Exit(1)
    if not read_history(store.objects).claims:
        fail(f"{store.uri} is not a run of spotguard: it has no attempts/ in it")
        raise typer.Exit(1)
    return store
