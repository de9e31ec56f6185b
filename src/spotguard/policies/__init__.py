"""Decisions as small objects that compose: when to save, what to keep. Pure: no clock, no I/O."""

from spotguard.policies.final_save import (
    FinalPlan,
    FinalSave,
    SaveTimes,
    p95,
    plan_final_save,
    time_left,
    with_margin,
)
from spotguard.policies.retention import (
    KeepAll,
    KeepBest,
    KeepNewest,
    KeepYoungerThan,
    RetentionPolicy,
    as_retention_policy,
    metrics_of,
)
from spotguard.policies.save import (
    AutoInterval,
    Due,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    SavePoint,
    SavePolicy,
    as_save_policy,
)

__all__ = [
    "AutoInterval",
    "Due",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "FinalPlan",
    "FinalSave",
    "KeepAll",
    "KeepBest",
    "KeepNewest",
    "KeepYoungerThan",
    "RetentionPolicy",
    "SavePoint",
    "SavePolicy",
    "SaveTimes",
    "as_retention_policy",
    "as_save_policy",
    "metrics_of",
    "p95",
    "plan_final_save",
    "time_left",
    "with_margin",
]
