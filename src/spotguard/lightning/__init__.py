"""Lightning: bit-exact resume and a safe stop, from a callback.

>>> from spotguard.lightning import SpotGuardCallback
>>> guard = SpotGuardCallback("memory://doc-lightning", every="10m")
>>> guard.resume_path() is None  # nothing to resume from yet
True
>>> guard.close()
"""

from spotguard.lightning.callback import SpotGuardCallback

__all__ = ["SpotGuardCallback"]
