"""The session around a plain PyTorch loop: the only place where the parts meet."""

from spotguard.guard.spot_guard import SpotGuard

__all__ = ["SpotGuard"]
