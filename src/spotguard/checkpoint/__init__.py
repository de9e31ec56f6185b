"""What a checkpoint is on paper: records, keys and digests. No I/O, no torch."""

from spotguard.checkpoint.digest import Digest, digest_of
from spotguard.checkpoint.layout import CheckpointId
from spotguard.checkpoint.records import Claim, ExitRecord, Manifest, RunRecord, ShardRecord, as_metrics

__all__ = [
    "CheckpointId",
    "Claim",
    "Digest",
    "ExitRecord",
    "Manifest",
    "RunRecord",
    "ShardRecord",
    "as_metrics",
    "digest_of",
]
