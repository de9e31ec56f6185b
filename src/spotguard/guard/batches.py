"""What ``guard.batches(loader)`` hands to the loop."""

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Batches", "length_of"]


class Batches:
    """What `SpotGuard.batches` gives: to be iterated over, with the length of the loader, so that progress bars work."""

    def __init__(self, loader: Any, iterate: Callable[[Any], Iterator[Any]]) -> None:
        self._loader, self._iterate = loader, iterate

    def __iter__(self) -> Iterator[Any]:
        return self._iterate(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def length_of(loader: Any) -> int | None:
    """Number of its batches, where it knows that."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
