"""A fast tier that lacks the checkpoint which is resumed from gets it while it is read: a machine is new once, and may start often."""

import logging
import threading
from collections.abc import Sequence

from spotguard.checkpoint import Manifest, ShardRecord
from spotguard.errors import SpotguardError
from spotguard.pipeline.checkpoint import Checkpoint
from spotguard.pipeline.objects import create_object, retried
from spotguard.pipeline.tier import Tier

__all__ = ["Refill"]

logger = logging.getLogger(__name__)


class Refill:
    """Copies shards into the tiers that come before the one they are read from, one after the other, beside the reading.

    Nothing depends on it: what fails is told of in the log, and is made good by the next save.

    Args:
        tiers: Of the run, fastest first.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._tiers = tiers
        self._last: threading.Thread | None = None
        self._written: dict[tuple[Tier, str], ShardRecord] = {}

    def take(self, checkpoint: Checkpoint, shard: ShardRecord, data: memoryview) -> None:
        """A verified shard has come."""
        for tier in self._targets(checkpoint):
            arguments = (tier, shard, data, self._last)
            self._last = threading.Thread(target=self._write, args=arguments, name="spotguard-refill", daemon=True)
            self._last.start()

    def finish(self, checkpoint: Checkpoint) -> None:
        """All shards have come: commit the copies."""
        if self._last is not None:
            self._last.join()
        for tier in self._targets(checkpoint):
            shards = [self._written.get((tier, shard.key)) for shard in checkpoint.manifest.shards]
            if all(shard is not None for shard in shards):
                self._commit(tier, checkpoint.manifest.model_copy(update={"shards": tuple(shards)}))

    def _targets(self, checkpoint: Checkpoint) -> list[Tier]:
        place = next(number for number, tier in enumerate(self._tiers) if tier.store is checkpoint.store)
        return [
            tier
            for tier in self._tiers[:place]
            if tier.error is None and tier.admitted and not tier.holds(checkpoint.manifest.id)
        ]

    def _write(self, tier: Tier, shard: ShardRecord, data: memoryview, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()

        def write() -> str | None:
            with tier.store.create(shard.key) as writer:
                writer.write(data)
            return writer.info.version if writer.info else None

        try:
            version = retried(write)
        except (SpotguardError, OSError) as error:
            logger.warning("%s has not got a copy of %s: %s", tier.store.uri, shard.key, error)
        else:
            self._written[tier, shard.key] = shard.model_copy(update={"version": version})

    def _commit(self, tier: Tier, manifest: Manifest) -> None:
        try:
            create_object(tier.store, manifest.id.manifest_key, manifest.to_bytes())
        except (SpotguardError, OSError) as error:
            logger.warning("%s has not got a copy of checkpoint %s: %s", tier.store.uri, manifest.id, error)
        else:
            tier.last = manifest
            tier.known.note_whole(manifest)
            logger.info("%s has got a copy of checkpoint %s", tier.store.uri, manifest.id)
