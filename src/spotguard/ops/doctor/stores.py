"""Can a run be kept there: opens, permissions, exclusive create, versions, space. What is written is taken away again."""

import contextlib
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from spotguard.checkpoint import Manifest
from spotguard.checkpoint.layout import RUN
from spotguard.errors import MissingExtraError, ObjectExistsError, ObjectNotFoundError, SpotguardError, StoreAccessError
from spotguard.ops.doctor.findings import Finding
from spotguard.pipeline.history import read_history
from spotguard.pipeline.identity import read_run
from spotguard.pipeline.objects import read_record
from spotguard.stores import LocalObjectStore, ObjectStore, PreflightStore, open_store

__all__ = ["examine_store", "newest_manifest", "open_run_place", "probe_key", "traceless"]

_TEMPORARY = {"tmpfs": "memory", "ramfs": "memory", "overlay": "the container", "aufs": "the container"}
_BODY = b"spotguard doctor finds out what this store does\n"
_PROBE = "probe-"  # those of S3's preflight have the same name, and old ones are swept away


def probe_key() -> str:
    """A key that nobody else has."""
    return _PROBE + secrets.token_hex(8)


@contextlib.contextmanager
def traceless(store: ObjectStore) -> Iterator[None]:
    """Directories that come to be inside the block are gone after it, if nobody has put anything into them."""
    missing = []
    if isinstance(store, LocalObjectStore):
        missing = [path for path in (store.root, *store.root.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:  # the innermost first
            with contextlib.suppress(OSError):
                path.rmdir()


def open_run_place(uri: str) -> tuple[ObjectStore | None, list[Finding]]:
    """Open the store that a URI names."""
    try:
        return open_store(uri), []
    except MissingExtraError as error:
        return None, [Finding("store", "problem", f"{uri} cannot be opened: {error}", "install it")]
    except SpotguardError as error:
        return None, [Finding("store", "problem", f"{uri} cannot be opened: {error}", "mend the URI")]


def examine_store(store: ObjectStore) -> list[Finding]:
    """Try what a run will need.

    Args:
        store: Where the run is kept, or will be.
    """
    findings = []
    try:
        history = read_history(store)
    except (SpotguardError, OSError) as error:
        return [Finding("store", "problem", f"{store.uri} cannot be read: {error}", _remedy(error))]
    if history.claims:
        text = f"{store.uri} holds a run of {history.newest_attempt} attempts and {len(history.manifests)} checkpoints"
        findings.append(Finding("store", "ok", text))
    else:
        findings.append(Finding("store", "ok", f"{store.uri} can be opened; there is no run yet"))
    advice = f"see 'spotguard resolve --explain {store.uri}'"
    findings += [Finding("store", "warning", text, advice) for text in history.damaged.values()]
    if history.manifests:
        findings += _identity(store)
    with traceless(store):
        findings += _preflight(store) if isinstance(store, PreflightStore) else []
        if not any(finding.level == "problem" for finding in findings):
            findings += _exclusive(store)
    if isinstance(store, LocalObjectStore):
        findings += _space(store, newest_manifest(store))
    return findings


def _identity(store: ObjectStore) -> list[Finding]:
    """A run with checkpoints does not start without the record that says whose they are."""
    try:
        read_run(store)
    except ObjectNotFoundError:
        text = f"{store.uri}/{RUN} is gone, and there are checkpoints: a start is refused"
    except SpotguardError as error:
        text = f"{error}: a start is refused"
    else:
        return []
    return [Finding("store", "problem", text, f"bring {RUN} back, or choose another place")]


def newest_manifest(store: ObjectStore) -> Manifest | None:
    """Of the checkpoint that the next start would try first; None where there is none, or none that can be read."""
    try:
        line = read_history(store).lineage
        if not line:
            return None
        key = line[0].manifest_key
        return read_record(store, key, lambda data: Manifest.from_bytes(data, key=f"{store.uri}/{key}"))
    except (SpotguardError, OSError):
        return None


def _preflight(store: PreflightStore) -> list[Finding]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            store.preflight()
        except (SpotguardError, OSError) as error:
            return [Finding("permissions", "problem", str(error), _remedy(error))]
    findings = [Finding("permissions", "ok", "what a run cannot do without is allowed")]
    from spotguard.stores.s3 import S3ObjectStore

    if isinstance(store, S3ObjectStore):
        able, bucket = store.able, store.address.bucket
        fix = f"aws s3api put-bucket-versioning --bucket {bucket} --versioning-configuration Status=Enabled"
        if able.versions:
            findings.append(Finding("versions", "ok", f"bucket {bucket} keeps what is overwritten or deleted"))
        else:
            text = f"bucket {bucket} does not keep versions: what somebody overwrites or deletes is lost"
            findings.append(Finding("versions", "warning", text, fix))
        if able.checksum is None:
            text = "the server compares no checksum with what it is sent; damage on the way to it is found on load"
            findings.append(Finding("checksum", "info", text))
        told = [str(warning.message) for warning in said if "does not keep versions" not in str(warning.message)]
        return findings + [Finding("permissions", "warning", text, "see docs/how-to/s3.md") for text in told]
    remedy = "see that no two trainers overlap, or use a store that creates exclusively: docs/how-to/object-stores.md"
    return findings + [Finding("store", "warning", str(warning.message), remedy) for warning in said]


def _exclusive(store: ObjectStore) -> list[Finding]:
    """The first exclusive create works, the second does not; and what is written can be deleted."""
    key = probe_key()
    try:
        with store.create(key, exclusive=True) as writer:
            writer.write(_BODY)
        written = [writer.info]
        try:
            with store.create(key, exclusive=True) as writer:
                writer.write(_BODY)
            written.append(writer.info)
        except ObjectExistsError:
            pass
        store.delete([info.ref for info in written if info is not None])
    except (SpotguardError, OSError) as error:
        return [Finding("exclusive", "problem", f"{store.uri} cannot be written to: {error}", _remedy(error))]
    if len(written) == 1:
        return [
            Finding(
                "exclusive", "ok", "it can be written to, and of two processes that create the same object one wins"
            )
        ]
    return [
        Finding(
            "exclusive",
            "problem",
            "two processes can create the same object: two trainers that write to this run could not be kept apart",
            "use another store, or promise by single_writer=True that there is never a second one",
        )
    ]


def _space(store: LocalObjectStore, newest: Manifest | None) -> list[Finding]:
    place = next(path for path in (store.root, *store.root.parents) if path.exists())
    free = shutil.disk_usage(place).free
    findings = []
    kind = _kind_of(place)
    if kind in _TEMPORARY:
        text = f"{place} is on {kind}: it goes with {_TEMPORARY[kind]}"
        findings.append(
            Finding("disk", "warning", text, "keep the run on a volume that outlives the machine, or in a bucket")
        )
    if newest is not None and free < 2 * newest.size:
        text = f"{free / 1e9:.1f} GB are free, and the newest checkpoint has {newest.size / 1e9:.1f} GB"
        fix = f"free space, or keep fewer: 'spotguard prune --keep 1 {store.uri}', keep=1"
        findings.append(Finding("disk", "warning" if free > newest.size else "problem", text, fix))
    else:
        findings.append(Finding("disk", "ok", f"{free / 1e9:.1f} GB are free"))
    return findings


def _kind_of(place: Path) -> str:
    """Type of the file system that a path is on."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        device = os.stat(place).st_dev  # noqa: PTH116 - what the kernel numbers in the third field
    except OSError:
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    found = [line.split(" - ", 1)[1].split()[0] for line in lines if line.split()[2] == number and " - " in line]
    return found[-1] if found else ""


def _remedy(error: Exception) -> str:
    if isinstance(error, StoreAccessError):
        return "give this user or role what is missing; docs/how-to/s3.md has a minimal policy for S3"
    return "mend that, and ask again"
