"""The identity of a run: one record, created once, that everybody finds."""

import time
import uuid

import spotguard
from spotguard._time import utc_now
from spotguard.checkpoint import CheckpointId, RunRecord
from spotguard.checkpoint.layout import MANIFESTS, RUN, parse_manifest_key
from spotguard.errors import ObjectExistsError, ObjectNotFoundError, StoreError
from spotguard.pipeline.objects import read_record, retried, write_object
from spotguard.stores import ObjectStore, PreflightStore

__all__ = ["find_run", "open_run", "read_run"]

# How often, and how far apart, a start looks for the run record that another one is creating.
_PATIENCE, _PAUSE_S = 20, 0.05


def find_run(store: ObjectStore) -> RunRecord | CheckpointId | None:
    """The identity of the run. Where there is none, a checkpoint that ought to have one, or None in an empty place.

    It is the first that whoever is going to write does, so a place that is not fit for a run, or not open to us, is found out here.
    """
    if isinstance(store, PreflightStore):
        store.preflight()
    try:
        return read_run(store)
    except ObjectNotFoundError:
        keys = [info.key for info in retried(lambda: list(store.list(MANIFESTS)))]
    return next((identity for key in keys if (identity := parse_manifest_key(key))), None)


def read_run(store: ObjectStore) -> RunRecord:
    """The identity of the run.

    Raises:
        ObjectNotFoundError: It has none.
        StoreError: It cannot be read.
    """
    return read_record(store, RUN, lambda data: RunRecord.from_bytes(data, key=f"{store.uri}/{RUN}"))


def open_run(store: ObjectStore, record: RunRecord | None = None) -> RunRecord:
    """Read the identity of the run, or give it one.

    Args:
        store: The run.
        record: The identity that it has elsewhere, to be given to this place if it has none.

    Raises:
        StoreError: There are checkpoints, and the record that says whose they are is gone.
    """
    for tries in range(2 * _PATIENCE):
        found = find_run(store)
        if isinstance(found, RunRecord):
            return found
        if found is not None and record is None:
            raise StoreError(
                f"{store.uri} holds checkpoints ({found.manifest_key}) but no {RUN}: it was copied or deleted in part. "
                f"Bring {RUN} back, or choose another place"
            )
        ours = record or RunRecord(run_id=uuid.uuid4().hex, created_at=utc_now(), spotguard=spotguard.__version__)
        try:
            write_object(store, RUN, ours.to_bytes(), exclusive=True)
        except (ObjectExistsError, ObjectNotFoundError):
            # Another start came first: its record counts. If none appears, it died between taking the name and giving it content
            # (on a mount without hard links). What it left is removed, and with it its means to come back.
            if tries >= 1:
                time.sleep(_PAUSE_S)
            if tries == _PATIENCE:
                store.discard_partials(lambda key: key == RUN)
            continue
        return ours
    raise StoreError(f"{store.uri}/{RUN} can be neither read nor created")
