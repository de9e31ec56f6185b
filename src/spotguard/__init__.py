"""Bit-exact resume and safe stops for PyTorch training on spot instances.

Names are bound when they are first used: ``import spotguard`` loads neither torch nor boto3.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spotguard.checkpoint.records import Manifest
    from spotguard.errors import Preempted, SpotguardError
    from spotguard.guard.spot_guard import SpotGuard
    from spotguard.notices.base import NoticeSource, PreemptionNotice
    from spotguard.pipeline.checkpoint import Checkpoint
    from spotguard.pipeline.checkpoint_store import CheckpointStore, LocalCheckpointStore
    from spotguard.pipeline.s3_checkpoint_store import S3CheckpointStore
    from spotguard.policies.retention import KeepAll, KeepBest, KeepNewest, KeepYoungerThan
    from spotguard.policies.save import AutoInterval, EveryEpochs, EverySeconds, EverySteps
    from spotguard.state.train_state import TrainState

__all__ = [
    "AutoInterval",
    "Checkpoint",
    "CheckpointStore",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "KeepAll",
    "KeepBest",
    "KeepNewest",
    "KeepYoungerThan",
    "LocalCheckpointStore",
    "Manifest",
    "NoticeSource",
    "Preempted",
    "PreemptionNotice",
    "S3CheckpointStore",
    "SpotGuard",
    "SpotguardError",
    "TrainState",
]

_HOME = {
    "AutoInterval": "policies.save",
    "Checkpoint": "pipeline.checkpoint",
    "CheckpointStore": "pipeline.checkpoint_store",
    "EveryEpochs": "policies.save",
    "EverySeconds": "policies.save",
    "EverySteps": "policies.save",
    "KeepAll": "policies.retention",
    "KeepBest": "policies.retention",
    "KeepNewest": "policies.retention",
    "KeepYoungerThan": "policies.retention",
    "LocalCheckpointStore": "pipeline.checkpoint_store",
    "Manifest": "checkpoint.records",
    "NoticeSource": "notices.base",
    "Preempted": "errors",
    "PreemptionNotice": "notices.base",
    "S3CheckpointStore": "pipeline.s3_checkpoint_store",
    "SpotGuard": "guard.spot_guard",
    "SpotguardError": "errors",
    "TrainState": "state.train_state",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("spotguard")
    if name in _HOME:
        value = getattr(importlib.import_module(f"spotguard.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'spotguard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
