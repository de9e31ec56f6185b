"""The checkpoint store alone, for scripts that keep their own loop."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from spotguard.checkpoint import CheckpointId, as_metrics
from spotguard.errors import CheckpointDamagedError, CheckpointNotFoundError, ConfigError
from spotguard.pipeline.checkpoint import Checkpoint, Progress, load_manifest
from spotguard.pipeline.history import claim_and_look, open_run, read_history
from spotguard.pipeline.objects import together
from spotguard.pipeline.resolver import Resolution, resolve
from spotguard.pipeline.restore import DeletedCheckpoint, deleted_checkpoints, restore_checkpoint
from spotguard.pipeline.rollback import roll_back
from spotguard.pipeline.sweeper import Known, SweepPlan, missing_metrics, sweep
from spotguard.policies import RetentionPolicy, as_retention_policy, metrics_of
from spotguard.stores import ObjectStore, open_store

__all__ = ["CheckpointStore", "LocalCheckpointStore"]


class CheckpointStore:
    """Committed, verified checkpoints below one URI.

    Saving claims an attempt, which fences off every older writer; reading claims nothing.

    Args:
        uri: A path, ``file:///path`` or ``memory://name``; or an `ObjectStore`.

    Example:
        >>> store = CheckpointStore("memory://doc-store")
        >>> _ = store.save({"model": {"weight": [1.0]}}, step=1000, metrics={"val_loss": 0.4})
        >>> _ = store.save({"model": {"weight": [2.0]}}, step=1200, metrics={"val_loss": 0.3})
        >>> store.latest().step, store.latest().load()
        (1200, {'model': {'weight': [2.0]}})
        >>> store.rollback(step=1000).step, store.latest().step
        (1000, 1000)
    """

    def __init__(self, uri: "str | os.PathLike[str] | ObjectStore") -> None:
        self.objects = uri if isinstance(uri, ObjectStore) else open_store(uri)
        self.uri = self.objects.uri
        self._attempt: int | None = None
        self._run_id = ""
        self._previous: Checkpoint | None = None
        self._used: tuple[int, int] | None = None  # step and sequence of the last save

    def save(self, members: Mapping[str, Any], *, step: int, metrics: Mapping[str, float] | None = None) -> Checkpoint:
        """Commit a checkpoint; durable when this returns.

        Args:
            members: Name to state, each of tensors and plain values; each becomes one torch file.
            step: Its number; a later save at the same step supersedes the earlier one.
            metrics: Recorded for retention and for people.

        Raises:
            ConfigError: A name or a state cannot be saved.
            FencedError: A later attempt has claimed the run.
            StoreError: The store failed; nothing was committed.
        """
        from spotguard.checkpoint.layout import check_member_name
        from spotguard.pipeline.commit import commit
        from spotguard.state.codec import check_loadable
        from spotguard.state.snapshot import HostBuffers, ShardImage, Snapshot

        if type(step) is not int or step < 0:
            raise ConfigError(f"save(step={step!r}): a step is a whole number, 0 or more")
        recorded = as_metrics(metrics)
        if not isinstance(members, Mapping):
            raise ConfigError(
                f"save({type(members).__name__}): pass names and states, as in {{'model': model.state_dict()}}"
            )
        buffers = HostBuffers()
        images = []
        for name, tree in members.items():
            check_member_name(name)
            check_loadable(name, tree)
            images.append(ShardImage(name, None, buffers.capture(name, tree)))
        if not images:
            raise ConfigError("save({}): there is nothing to save; pass {'model': model.state_dict()}")
        if self._attempt is None:
            self._run_id = open_run(self.objects).run_id
            # Before looking: from here on nobody else can sweep away what is found.
            claim, history = claim_and_look(self.objects)
            self._previous = resolve(self.objects, run_id=self._run_id, history=history).require()
            self._attempt, self._used = claim.attempt, None
        before = self._previous.manifest if self._previous else None
        sequence = self._used[1] + 1 if self._used and self._used[0] == step else 0
        self._used = step, sequence  # also if this save fails: its objects are never written over
        manifest, _ = commit(
            self.objects,
            Snapshot(step, 0, 0, finished=False, shards=tuple(images)),
            run_id=self._run_id,
            attempt=self._attempt,
            sequence=sequence,
            previous=before,
            metrics=recorded,
        )
        self._previous = Checkpoint(self.objects, manifest)
        return self._previous

    def list(self) -> Sequence[Checkpoint]:
        """Every committed checkpoint whose manifest is intact, oldest first, those left behind by a rollback included."""

        def read(identity: CheckpointId) -> Checkpoint | None:
            try:
                return Checkpoint(self.objects, load_manifest(self.objects, identity))
            except CheckpointDamagedError:
                return None

        found = together(read, read_history(self.objects).manifests)
        return [checkpoint for checkpoint in found if checkpoint is not None]

    def resolve(self, progress: Progress | None = None, *, explain: bool = False) -> Resolution:
        """What to resume from and why; see `Resolution`. With `explain` also what was deleted and can be brought back."""
        return resolve(self.objects, progress=progress, explain=explain)

    def latest(self) -> Checkpoint | None:
        """The newest committed and verified checkpoint, else an older one; None when the run is new.

        Raises:
            NoUsableCheckpointError: There are checkpoints and every one is damaged.
        """
        return self.resolve().require()

    def get(self, identity: "str | int") -> Checkpoint:
        """One checkpoint, by id or, in the current lineage, by step.

        Raises:
            CheckpointNotFoundError: There is none.
        """
        return Checkpoint(self.objects, load_manifest(self.objects, self._find(identity)))

    def load(self, identity: "str | int | None" = None) -> dict[str, Any]:
        """State of one checkpoint, verified; of the latest by default.

        Raises:
            CheckpointNotFoundError: There is none.
        """
        checkpoint = self.latest() if identity is None else self.get(identity)
        if checkpoint is None:
            raise CheckpointNotFoundError(f"{self.uri} holds no checkpoint yet")
        return checkpoint.load()

    def verify(self, identity: "str | int", progress: Progress | None = None) -> None:
        """Read every byte of one checkpoint; raises CheckpointDamagedError with what is wrong."""
        self.get(identity).verify(progress)

    def rollback(self, *, step: int, progress: Progress | None = None) -> Checkpoint:
        """Resume from `step` from now on. Nothing is deleted; a running trainer is fenced off.

        Returns:
            The checkpoint that the next start resumes from: that one, committed again as the first of a new attempt.

        Raises:
            CheckpointNotFoundError: The lineage has no checkpoint at that step, or retention deleted it meanwhile.
            CheckpointDamagedError: It is damaged.
            FencedError: Somebody else has started meanwhile.
        """
        checkpoint = roll_back(self.objects, self._find(step), progress)
        self._attempt, self._previous = None, None
        return checkpoint

    def deleted(self) -> Sequence[DeletedCheckpoint]:
        """Checkpoints whose manifest was deleted and is still kept, oldest first.

        Raises:
            ConfigError: The store does not keep what is deleted.
        """
        return deleted_checkpoints(self.objects)

    def restore(self, identity: str, progress: Progress | None = None) -> Checkpoint:
        """Bring back a deleted checkpoint, by its id, once every byte of it is verified.

        Raises:
            CheckpointNotFoundError: No deleted checkpoint of that id is kept.
            CheckpointDamagedError: A shard is gone or damaged; nothing has been changed.
            ConfigError: The store does not keep what is deleted.
        """
        return restore_checkpoint(self.objects, CheckpointId.parse(identity), progress)

    def prune(self, keep: RetentionPolicy | int, *, dry_run: bool = False) -> SweepPlan:
        """Delete what the policy does not want; never the newest checkpoint, and nothing that a running save may need.

        Raises:
            ConfigError: The policy goes by a metric that no checkpoint has, though they have others: all but the newest would go.
        """
        policy, known = as_retention_policy(keep), Known()
        if metrics_of(policy):  # else there is nothing to be read for this
            manifests = known.read_manifests(self.objects, known.look(self.objects)).values()
            if wrong := missing_metrics(policy, manifests):
                raise ConfigError(f"{self.uri}, keep={policy}: {wrong}. Nothing has been deleted")
        return sweep(self.objects, policy, owner=self._attempt, dry_run=dry_run, known=known)

    def _find(self, identity: "str | int") -> CheckpointId:
        history = read_history(self.objects)
        if isinstance(identity, str) and not identity.isdecimal():
            wanted = CheckpointId.parse(identity)
            if wanted in history.manifests:
                return wanted
        else:
            for candidate in [*history.lineage, *reversed(history.manifests)]:
                if candidate.step == int(identity):
                    return candidate
        known = ", ".join(str(item) for item in history.manifests[-5:]) or "none"
        raise CheckpointNotFoundError(
            f"{self.uri} has no checkpoint {identity!r}; the newest are: {known} (see 'spotguard ls')"
        )


class LocalCheckpointStore(CheckpointStore):
    """A `CheckpointStore` in a directory.

    Example:
        >>> import tempfile
        >>> LocalCheckpointStore(tempfile.mkdtemp()).latest() is None
        True
    """

    def __init__(self, path: "str | os.PathLike[str]") -> None:
        super().__init__(path)
        from spotguard.stores import LocalObjectStore

        if not isinstance(self.objects, LocalObjectStore):
            raise ConfigError(
                f"LocalCheckpointStore({os.fspath(path)!r}): that is not a local path; use CheckpointStore(uri)"
            )
