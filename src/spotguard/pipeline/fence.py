"""Who may still write to a run: the newest attempt, and no older one."""

from spotguard.checkpoint.layout import claim_key
from spotguard.errors import FencedError
from spotguard.pipeline.history import list_claims
from spotguard.stores import ObjectStore

__all__ = ["ClaimGoneError", "check_fence"]


class ClaimGoneError(FencedError):
    """The claim of this very attempt is not there any more."""


def check_fence(store: ObjectStore, attempt: int) -> None:
    """Refuse to write to a run that a later attempt has claimed.

    Raises:
        FencedError: Names that attempt.
        ClaimGoneError: The claim of this one is gone.
    """
    claimed = list_claims(store)
    newest = max(claimed, default=0)
    if attempt not in claimed:
        raise ClaimGoneError(
            f"the claim of this attempt, {store.uri}/{claim_key(attempt)}, is gone: the run was moved or deleted while it was "
            "being trained. "
            "Bring the directory back and start again"
        )
    if newest > attempt:
        raise FencedError(
            f"attempt {newest} has taken over {store.uri}, this process is attempt {attempt} and must not write to it any more. "
            f"See {claim_key(newest)} for its host; if that start was a mistake, stop it and start this one again"
        )
