"""Going back to an older checkpoint: it is committed again, as the first of a new attempt; the shards stay where they are.

::

    claim an attempt, as the child of the checkpoint              older processes are fenced off; until the commit nobody sweeps
    is its manifest still there? -> CheckpointNotFoundError
    create the manifest of the new attempt, which names the same shards      <- from here on the rollback is in force
    is a later attempt claimed? -> FencedError

Why no sweep takes the shards away. A sweep lists claims and manifests, looks for new claims, deletes manifests, looks for new claims
again, and deletes shards. If it began before our claim: a claim that it sees ends it, so shards go only if we claim after its second look,
and then the manifests are gone before ours can be written, which we find out. If it began after our claim: it sees an attempt that has not
decided, and deletes nothing; or our manifest, and keeps what that names; or a later attempt that has committed, which we are told of in
the end.

Why a kill does no harm. Without its commit a claim is passed over: the run goes on from where it was, which every sweep keeps. With it
the run goes on from the target. A sweep that is killed has deleted less.
"""

from spotguard._time import utc_now
from spotguard.checkpoint import CheckpointId
from spotguard.errors import CheckpointDamagedError, CheckpointNotFoundError, FencedError
from spotguard.pipeline.checkpoint import Checkpoint, Progress, load_manifest
from spotguard.pipeline.fence import check_fence
from spotguard.pipeline.history import claim_attempt, list_claims
from spotguard.pipeline.objects import create_object
from spotguard.stores import ObjectStore

__all__ = ["roll_back"]


def roll_back(store: ObjectStore, target: CheckpointId, progress: Progress | None = None) -> Checkpoint:
    """Have the run go on from a checkpoint, once every byte of it is verified. Nothing is deleted.

    Args:
        store: The run.
        target: The checkpoint to go back to.
        progress: Called with the number of bytes verified, for each piece.

    Returns:
        The checkpoint that the next start resumes from: the same shards, as the first commit of a new attempt.

    Raises:
        CheckpointDamagedError: It is damaged; nothing has been changed.
        CheckpointNotFoundError: Retention deleted it meanwhile. Older processes are fenced off, nothing else has been changed.
        FencedError: A later attempt has started meanwhile.
    """
    Checkpoint(store, load_manifest(store, target)).verify(progress)
    attempt = claim_attempt(store, rollback_to=target).attempt
    try:
        manifest = load_manifest(store, target)
    except CheckpointDamagedError as error:
        raise CheckpointNotFoundError(
            f"{store.uri}: checkpoint {target} was deleted by retention a moment ago. The run goes on from where it was; "
            "'spotguard ls' shows what else there is"
        ) from error
    check_fence(store, attempt)
    changes = {"attempt": attempt, "sequence": 0, "parent": str(target), "created_at": utc_now()}
    again = manifest.model_copy(update=changes)
    create_object(store, again.id.manifest_key, again.to_bytes())
    if (newest := max(list_claims(store), default=0)) != attempt:
        raise FencedError(
            f"attempt {newest} of {store.uri} has started at the same time, and may go on from either: "
            "stop it, and see what 'spotguard resolve' says"
        )
    return Checkpoint(store, again)
