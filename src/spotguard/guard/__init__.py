"""The session around a plain PyTorch loop: the only place where the parts meet."""

from spotguard.guard.session import SpotGuard

__all__ = ["SpotGuard"]
