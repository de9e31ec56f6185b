"""The commands. Tables for people, ``--json`` for programs; torch is not loaded for any of them but ``rehearse``."""

import functools
import io
import sys
from typing import Annotated

import typer

from spotguard.checkpoint import CheckpointId, Manifest, ShardRecord
from spotguard.checkpoint.layout import RUN, STOP
from spotguard.cli.doctor import doctor_command
from spotguard.cli.opening import existing_run
from spotguard.cli.output import age, bar, fail, size, table, to_json
from spotguard.cli.rehearse import rehearse_command
from spotguard.cli.s3 import s3_app
from spotguard.cli.status import status_command
from spotguard.errors import CheckpointDamagedError, ConfigError, ObjectNotFoundError, SpotguardError, StoreError
from spotguard.pipeline.checkpoint import Checkpoint, load_manifest
from spotguard.pipeline.checkpoint_store import CheckpointStore
from spotguard.pipeline.history import read_history
from spotguard.pipeline.identity import read_run
from spotguard.pipeline.objects import together, write_object
from spotguard.pipeline.restore import deleted_checkpoints, restore_checkpoint

__all__ = ["app", "main"]

app = typer.Typer(
    name="spotguard",
    help="Bit-exact resume and safe stops for PyTorch training on spot instances.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(s3_app)
app.command("status")(status_command)
app.command("doctor")(doctor_command)
app.command("rehearse", context_settings={"allow_interspersed_args": False})(rehearse_command)

Uri = Annotated[
    str, typer.Argument(help="The run: a directory, or a URI such as s3://bucket/run-17.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Which = Annotated[str, typer.Argument(help="A checkpoint id, a step, or 'latest'.", show_default=True)]


def main() -> None:
    """Entry point of the console script: errors of ours are a line on standard error; exit status 2 for wrong usage, 1 for the rest."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name in a bucket may have letters that a terminal has not
    try:
        app(prog_name="spotguard")
    except ConfigError as error:
        fail(str(error))
        sys.exit(2)
    except SpotguardError as error:
        fail(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command("ls")
def ls_command(
    uri: Uri,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="List those that were deleted and can be brought back ('restore').")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the checkpoints of a run, oldest first."""
    store = existing_run(uri)
    if deleted:
        return _list_deleted(store, as_json=as_json)
    history = read_history(store.objects)
    line = set(history.lineage)
    checkpoints = store.list()
    if as_json:
        fields = [{**_fields(item), "in_lineage": item.manifest.id in line} for item in checkpoints]
        return print(to_json(fields))  # noqa: T201
    rows = [
        (
            item.id,
            str(item.step),
            f"{item.manifest.epoch}/{item.manifest.batch}",
            size(item.manifest.size),
            age(item.manifest.created_at),
            " ".join(f"{name}={value:g}" for name, value in item.metrics.items()),
            ("finished" if item.manifest.finished else "") if item.manifest.id in line else "not in lineage",
        )
        for item in checkpoints
    ]
    table(f"{store.uri}", ("checkpoint", "step", "epoch/batch", "size", "age", "metrics", "note"), rows)
    unread = len(history.manifests) - len(checkpoints)
    if unread:
        fail(f"{unread} more cannot be read; 'spotguard resolve --explain {uri}' tells why")
    return None


@app.command("show")
def show_command(uri: Uri, which: Which = "latest", as_json: Json = False) -> None:
    """Show what one checkpoint consists of."""
    checkpoint = _pick(existing_run(uri), which)
    manifest = checkpoint.manifest
    if as_json:
        return print(manifest.to_bytes().decode())  # noqa: T201
    about = {
        "run": manifest.run_id,
        "attempt": str(manifest.attempt),
        "step": str(manifest.step),
        "epoch/batch": f"{manifest.epoch}/{manifest.batch}",
        "finished": "yes" if manifest.finished else "no",
        "world size": str(manifest.world_size),
        "parent": manifest.parent or "none",
        "written": manifest.created_at.isoformat(timespec="seconds"),
        "with": ", ".join(f"{name} {version}" for name, version in manifest.libraries.items()),
        "metrics": ", ".join(f"{name}={value:g}" for name, value in manifest.metrics.items()) or "none",
    }
    table(checkpoint.id, ("field", "value"), list(about.items()))
    rows = [(shard.name, size(shard.size), shard.digest, shard.key) for shard in manifest.shards]
    table("shards", ("member", "size", "digest", "key"), rows)
    return None


@app.command("verify")
def verify_command(
    uri: Uri,
    which: Annotated[str, typer.Argument(help="A checkpoint id, a step, 'latest' or 'all'.")] = "all",
    as_json: Json = False,
) -> None:
    """Read every byte and compare it with the manifest. Exit status 1 if anything is damaged."""
    store = existing_run(uri)
    identities = read_history(store.objects).manifests if which == "all" else [_pick(store, which).manifest.id]
    manifests = together(functools.partial(_manifest_or_damage, store), identities)
    results: list[dict[str, object]] = []
    proven = set[ShardRecord]()
    shards = {shard for item in manifests if isinstance(item, Manifest) for shard in item.shards}
    with bar("verifying", sum(shard.size for shard in shards)) as advance:
        for identity, manifest in zip(identities, manifests, strict=True):
            try:
                if isinstance(manifest, CheckpointDamagedError):
                    raise manifest
                Checkpoint(store.objects, manifest).verify(advance, proven=proven)
                results.append({"checkpoint": str(identity), "whole": True, "reason": ""})
            except CheckpointDamagedError as error:
                results.append({"checkpoint": str(identity), "whole": False, "reason": str(error)})
    if as_json:
        print(to_json(results))  # noqa: T201
    else:
        rows = [
            (str(item["checkpoint"]), "whole" if item["whole"] else "DAMAGED", str(item["reason"])) for item in results
        ]
        table(store.uri, ("checkpoint", "verdict", "reason"), rows)
    if not all(item["whole"] for item in results):
        raise typer.Exit(1)


@app.command("resolve")
def resolve_command(
    uri: Uri,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show every candidate, and why it was taken or not.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say which checkpoint the next start resumes from. Exit status 1 if there are checkpoints and none is usable."""
    store = existing_run(uri)
    with bar("verifying") as advance:
        resolution = store.resolve(advance, explain=explain)
    chosen = resolution.checkpoint
    if as_json:
        candidates = [vars(candidate) for candidate in resolution.candidates]
        fields = {
            "checkpoint": chosen.id if chosen else None,
            "candidates": candidates,
            "damaged_claims": resolution.damaged,
        }
        print(to_json(fields))  # noqa: T201
    elif explain:
        rows = [(candidate.id, candidate.verdict, candidate.reason) for candidate in resolution.candidates]
        table(store.uri, ("checkpoint", "verdict", "reason"), rows)
        for reason in resolution.damaged:
            fail(reason)
    if resolution.require() is not None:
        _require_identity(store)
    if not as_json:
        print(chosen.id if chosen else "a fresh start: the run has no checkpoint yet")  # noqa: T201


def _manifest_or_damage(store: CheckpointStore, identity: CheckpointId) -> Manifest | CheckpointDamagedError:
    try:
        return load_manifest(store.objects, identity)
    except CheckpointDamagedError as error:
        return error


def _require_identity(store: CheckpointStore) -> None:
    """A start is refused by a run with checkpoints that has lost the record of whose they are."""
    try:
        read_run(store.objects)
    except ObjectNotFoundError:
        raise StoreError(
            f"{store.uri}/{RUN} is gone: a start is refused. Bring it back, or choose another place"
        ) from None


@app.command("rollback")
def rollback_command(
    uri: Uri,
    step: Annotated[int, typer.Option("--step", help="Resume from the checkpoint at this step.", show_default=False)],
) -> None:
    """Resume from an older checkpoint from now on. Nothing is deleted; a running trainer is fenced off at its next save."""
    store = existing_run(uri)
    with bar("verifying", store.get(step).manifest.size) as advance:
        checkpoint = store.rollback(step=step, progress=advance)
    print(  # noqa: T201
        f"the next start resumes from {checkpoint.id} (step {checkpoint.step}): {checkpoint.manifest.parent}, committed again"
    )


@app.command("restore")
def restore_command(
    uri: Uri, which: Annotated[str, typer.Argument(help="The id of a deleted checkpoint.", show_default=False)]
) -> None:
    """Bring back a checkpoint whose manifest was deleted, from a bucket that keeps versions. Every byte is verified first."""
    store = existing_run(uri)
    with bar("verifying") as advance:
        checkpoint = restore_checkpoint(store.objects, CheckpointId.parse(which), advance)
    print(f"checkpoint {checkpoint.id} (step {checkpoint.step}) is back")  # noqa: T201


@app.command("prune")
def prune_command(
    uri: Uri,
    keep: Annotated[int, typer.Option("--keep", min=1, help="How many of the newest checkpoints to keep.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: Json = False,
) -> None:
    """Delete old checkpoints and what interrupted saves left behind; never the newest checkpoint."""
    store = existing_run(uri)
    plan = store.prune(keep, dry_run=dry_run)
    if as_json:
        fields = {
            "dry_run": dry_run,
            "checkpoints": [str(identity) for identity in plan.drop],
            "objects": [info.key for info in plan.objects],
            "bytes": plan.size,
            "kept": [str(identity) for identity in plan.kept],
        }
        return print(to_json(fields))  # noqa: T201
    verdicts = [(str(identity), "delete") for identity in plan.drop] + [
        (str(identity), "keep") for identity in plan.kept
    ]
    table(store.uri, ("checkpoint", "would" if dry_run else "done"), sorted(verdicts))
    print(  # noqa: T201
        f"{'would free' if dry_run else 'freed'} {size(plan.size)}: {len(plan.drop)} checkpoints, {len(plan.objects)} objects"
    )
    return None


@app.command("stop")
def stop_command(uri: Uri) -> None:
    """Ask the running trainer to save and leave at its next step boundary."""
    store = existing_run(uri)
    write_object(store.objects, STOP, b"requested by 'spotguard stop'\n")
    print(  # noqa: T201
        f"asked {store.uri} to stop; the trainer saves and leaves at its next step boundary, and takes the request away. "
        "If none is running, the next one to start leaves at its first boundary"
    )


def _list_deleted(store: CheckpointStore, *, as_json: bool) -> None:
    found = deleted_checkpoints(store.objects)
    if as_json:
        fields = [
            {
                "checkpoint": item.id,
                "step": item.manifest and item.manifest.step,
                "restorable": not item.missing,
                "reason": item.missing,
            }
            for item in found
        ]
        return print(to_json(fields))  # noqa: T201
    rows = [
        (item.id, size(item.manifest.size), age(item.manifest.created_at), item.missing or "can be restored")
        if item.manifest
        else (item.id, "", "", item.missing)
        for item in found
    ]
    table(f"{store.uri}, deleted", ("checkpoint", "size", "age", "note"), rows)
    return None


def _pick(store: CheckpointStore, which: str) -> Checkpoint:
    if which != "latest":
        return store.get(which)
    newest = read_history(store.objects).lineage
    if not newest:
        fail(f"{store.uri} has no checkpoint yet")
        raise typer.Exit(1)
    return store.get(str(newest[0]))


def _fields(checkpoint: Checkpoint) -> dict[str, object]:
    manifest = checkpoint.manifest
    return {
        "checkpoint": checkpoint.id,
        "attempt": manifest.attempt,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "batch": manifest.batch,
        "finished": manifest.finished,
        "bytes": manifest.size,
        "created_at": manifest.created_at.isoformat(),
        "metrics": checkpoint.metrics,
    }
