"""The error tree. Every error says what to do next; every class is also the builtin a caller would already catch.

::

    SpotguardError (Exception)
    +-- ConfigError (ValueError)                     an argument or a setting is wrong
    |   +-- StateMismatchError                       the state on resume is not the state that was saved
    +-- StoreError (OSError)                         a store could not do what was asked
    |   +-- TransientStoreError                      worth a retry
    |   +-- ObjectExistsError (FileExistsError)      an exclusive create lost the race
    |   +-- ObjectNotFoundError (FileNotFoundError)
    |   +-- StoreAccessError (PermissionError)
    |   +-- DeadlineExceededError (TimeoutError)     the object was not written in time; nothing is visible
    +-- CheckpointError (Exception)
    |   +-- CheckpointDamagedError (ValueError)      proof of damage: a size or a digest differs
    |   +-- CheckpointNotFoundError (FileNotFoundError)
    |   +-- NoUsableCheckpointError (RuntimeError)   checkpoints were found and all were rejected
    |   +-- FormatTooNewError (RuntimeError)         written by a later release of spotguard
    +-- SaveError (RuntimeError)                     several saves in a row failed
    +-- FencedError (RuntimeError)                   a later attempt has taken over the run
    +-- MissingExtraError (ImportError)              an adapter's framework is not installed, or not in a release that is known

    Preempted (SystemExit)                           the final checkpoint is committed; leave with a code that is not 0

`Preempted` is outside the tree on purpose: ``except SpotguardError`` must not keep a process alive that has to go.
"""

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "DeadlineExceededError",
    "FencedError",
    "FormatTooNewError",
    "InexactResumeWarning",
    "MissingExtraError",
    "NoUsableCheckpointError",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "Preempted",
    "SaveError",
    "SpotguardError",
    "StateMismatchError",
    "StoreAccessError",
    "StoreError",
    "TransientStoreError",
]


class SpotguardError(Exception):
    """Root of every error that spotguard raises."""


class ConfigError(SpotguardError, ValueError):
    """An argument or a setting is wrong; the message names it and the remedy."""


class StateMismatchError(ConfigError):
    """What the script offers on resume is not what the checkpoint holds."""


class StoreError(SpotguardError, OSError):
    """A store could not do what was asked, and asking again would not help."""


class TransientStoreError(StoreError):
    """A store could not do what was asked now; a retry may succeed.

    Attributes:
        exhausted: The store has retried by itself, with patience; whoever asked need not do so again at once.
    """

    exhausted = False


class ObjectExistsError(StoreError, FileExistsError):
    """An exclusive create found the key taken."""


class ObjectNotFoundError(StoreError, FileNotFoundError):
    """The key, or that version of it, does not exist."""


class StoreAccessError(StoreError, PermissionError):
    """The store refused access. Never reported as "not found"."""


class DeadlineExceededError(StoreError, TimeoutError):
    """The deadline passed before the object was known to be whole. What a server was doing at that moment it may still bring to its end."""


class CheckpointError(SpotguardError):
    """Something about a checkpoint."""


class CheckpointDamagedError(CheckpointError, ValueError):
    """Proof of damage: bytes are missing, too many, or not those that were committed."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No committed checkpoint answers to that description."""


class NoUsableCheckpointError(CheckpointError, RuntimeError):
    """The run has checkpoints and every one of them was rejected. Training does not start from zero in silence."""


class FormatTooNewError(CheckpointError, RuntimeError):
    """Written by a later release of spotguard. Not damage: upgrade."""


class SaveError(SpotguardError, RuntimeError):
    """Several saves in a row failed; going on would mean training without a net."""


class FencedError(SpotguardError, RuntimeError):
    """A later attempt has claimed this run; this process must not write to it any more."""


class MissingExtraError(SpotguardError, ImportError):
    """An adapter needs a package that is not there, or is there in a release that it was not made for.

    Example:
        >>> print(MissingExtraError.of("lightning", "pytorch_lightning is not installed"))
        pytorch_lightning is not installed: pip install 'spotguard[lightning]'
    """

    @classmethod
    def of(cls, extra: str, what: str) -> "MissingExtraError":
        """What is wrong, and which extra mends it."""
        return cls(f"{what}: pip install 'spotguard[{extra}]'")


class InexactResumeWarning(UserWarning):
    """Something cannot be restored bit for bit; the message names it."""


class Preempted(SystemExit):
    """Raised at a step boundary once the final checkpoint is committed, or has failed twice: then an older one stands.

    It is a `SystemExit`: left alone, the process ends with `code`, which is not 0 while work remains, so that a
    scheduler starts it again; 0 only after a SIGTERM of SageMaker, which restarts by itself what it has interrupted. 143 is what a shell
    reports for a process ended by SIGTERM (128 + 15).

    Attributes:
        code: The exit status.
        checkpoint: Id of the checkpoint that the next start resumes from; None when there is none.

    Example:
        >>> exit = Preempted("0001-0000000420", reason="SIGTERM")
        >>> exit.code, exit.checkpoint
        (143, '0001-0000000420')
    """

    def __init__(self, checkpoint: str | None, *, reason: str, code: int = 143) -> None:
        super().__init__(code)
        self.checkpoint = checkpoint
        self.reason = reason

    def __str__(self) -> str:
        where = f"checkpoint {self.checkpoint} is committed" if self.checkpoint else "no checkpoint is committed"
        return f"stopped by {self.reason}: {where} (exit status {self.code})"
