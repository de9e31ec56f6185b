"""Hugging Face `Trainer`: bit-exact resume and a safe stop, from a callback.

>>> from spotguard.transformers import SpotGuardTrainerCallback
>>> guard = SpotGuardTrainerCallback("memory://doc-transformers", every="10m")
>>> guard.resume_path() is None  # nothing to resume from yet
True
>>> guard.close()
"""

from spotguard.transformers.callback import SpotGuardTrainerCallback

__all__ = ["SpotGuardTrainerCallback"]
