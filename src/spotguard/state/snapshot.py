"""A copy of the state in host memory, in buffers that are kept: pages that are touched once are copied to at memory speed ever after."""

import contextlib
import dataclasses
import mmap
import os
import threading
from collections.abc import Mapping
from typing import Any

import torch

from spotguard.state.codec import Layout, encode

__all__ = ["HostBuffers", "ShardImage", "Snapshot"]

_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, which `mmap` does not name


@dataclasses.dataclass(frozen=True)
class ShardImage:
    """The bytes of one shard, ready to be written.

    Attributes:
        name: Member name, or ``rank-00000``.
        rank: The rank it belongs to; None for what is the same on every rank.
        data: The whole torch file. Valid until the next capture into the same buffers, and in this process: a forked child finds zeros.
    """

    name: str
    rank: int | None
    data: memoryview


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state at one step boundary.

    Attributes:
        step: Step boundaries passed.
        epoch: Epoch that goes on from here.
        batch: Batches of that epoch that are done.
        finished: The loop has come to its end.
        shards: One image for each member and rank.
    """

    step: int
    epoch: int
    batch: int
    finished: bool
    shards: tuple[ShardImage, ...]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(len(shard.data) for shard in self.shards)


class _Image:
    """One kept buffer, laid out as a torch file."""

    def __init__(self, pickle_size: int, sizes: list[int]) -> None:
        self.layout = Layout(pickle_size, sizes)
        self._pages = _kept_memory(self.layout.size)
        self._bytes = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._bytes.zero_()  # touch every page now, not during a save
        self.view = memoryview(self._pages)
        self.layout.write_frame(self.view)
        self._targets = [
            self._bytes[offset : offset + size] for offset, size in zip(self.layout.offsets, sizes, strict=True)
        ]

    def fits(self, pickle_size: int, sizes: list[int]) -> bool:
        return sizes == self.layout.sizes and pickle_size <= self.layout.room

    def fill(self, data: bytes, storages: list[torch.UntypedStorage]) -> None:
        self.layout.write_pickle(self.view, data)
        for target, storage in zip(self._targets, storages, strict=True):
            if len(target):
                source = torch.empty(0, dtype=torch.uint8, device=storage.device)
                target.copy_(source.set_(storage))


class HostBuffers:
    """The kept buffers of one process, one for each shard.

    Example:
        >>> buffers = HostBuffers()
        >>> image = buffers.capture("model", {"weight": torch.ones(2)})
        >>> from spotguard.state.codec import decode
        >>> decode(image, key="model")
        {'weight': tensor([1., 1.])}
    """

    def __init__(self) -> None:
        self._images: dict[str, _Image] = {}
        self._preparing: threading.Thread | None = None
        self._pid = os.getpid()

    def capture(self, name: str, tree: Any) -> memoryview:
        """Copy a tree of tensors and plain values into the buffer of that name, and return the torch file it now is."""
        if self._pid != os.getpid():  # it was forked: what is in its buffers is the parent's alone
            self._pid, self._preparing, self._images = os.getpid(), None, {}
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        data, storages = encode(tree)
        sizes = [storage.nbytes() for storage in storages]
        image = self._images.get(name)
        if image is None or not image.fits(len(data), sizes):
            self._images.pop(name, None)
            image = self._images[name] = _Image(len(data), sizes)
        image.fill(data, storages)
        return image.view

    def prepare(self, trees: Mapping[str, Any]) -> None:
        """Lay out buffers for these trees now, and touch their pages in the background, ahead of the first capture.

        Touching fresh pages takes some twenty times as long as copying into touched ones; nobody has to wait for it at the first save.
        """
        needs = []
        for name, tree in trees.items():
            data, storages = encode(tree)
            needs.append((name, len(data), [storage.nbytes() for storage in storages]))

        def touch() -> None:
            for name, pickle_size, sizes in needs:
                self._images[name] = _Image(pickle_size, sizes)

        self._preparing = threading.Thread(target=touch, name="spotguard-buffers", daemon=True)
        self._preparing.start()


def _kept_memory(size: int) -> mmap.mmap:
    """Memory of this process alone, in large pages where the system has them: it is hashed in six tenths of the time.

    A forked child, such as a worker of a data loader, finds zeros in its place. Pages that it shared would be copied one by one at the next
    capture, and taken twice. See madvise(2). A system that never promises more memory than it has (``vm.overcommit_memory=2``) counts
    them for each child all the same.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(_WIPE_ON_FORK)
    except OSError:  # before Linux 4.14
        return mmap.mmap(-1, size)
    with contextlib.suppress(OSError):  # a system without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
