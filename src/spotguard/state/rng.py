"""Random number generators, in a plain encoding: tensors, numbers and strings that ``torch.load(weights_only=True)`` reads."""

import random
import sys
from typing import Any

import torch

__all__ = [
    "RngState",
    "capture_rng",
    "decode_generator",
    "encode_generator",
    "is_generator",
    "restore_rng",
    "unsaved_device",
]

RngState = dict[str, Any]


def capture_rng() -> RngState:
    """State of the global generators of python, numpy, torch CPU and every CUDA device that is in use.

    Example:
        >>> before = capture_rng()
        >>> first = torch.rand(()), random.random()
        >>> _ = restore_rng(before)
        >>> (torch.rand(()), random.random()) == first
        True
    """
    state: RngState = {"python": encode_generator(random), "torch": torch.get_rng_state()}
    if _numpy() is not None:
        state["numpy"] = _encode_numpy(_numpy().random.get_state(legacy=False))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: RngState) -> list[str]:
    """Put the global generators back.

    Returns:
        What could not be put back, in words; empty when all of it could.
    """
    missing = []
    decode_generator(random, state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        try:
            import numpy as np
        except ImportError:
            missing.append("the numpy generator (numpy is not installed here)")
        else:
            np.random.set_state(_decode_numpy(state["numpy"]))
    if "cuda" in state:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index, device_state in enumerate(state["cuda"][:found]):
            torch.cuda.set_rng_state(device_state, index)
        if found != len(state["cuda"]):
            missing.append(f"the CUDA generators ({len(state['cuda'])} devices were saved, {found} are here)")
    return missing


def unsaved_device() -> str | None:
    """Kind of the accelerator here whose generators this release neither saves nor restores; None when there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if accelerator is None or accelerator.type == "cuda" else accelerator.type


def is_generator(value: object) -> bool:
    """Whether this is a random number generator of python, numpy or torch."""
    if isinstance(value, random.SystemRandom):  # draws from the operating system and has no state
        return False
    return isinstance(value, (random.Random, torch.Generator)) or _is_numpy_generator(value)


def encode_generator(generator: Any) -> Any:
    """State of one generator object (or of the `random` module) in the plain encoding."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if _is_numpy_generator(generator):
        return _encode_numpy(
            generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state(legacy=False)
        )
    version, words, gauss = generator.getstate()
    return {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss}


def decode_generator(generator: Any, state: Any) -> None:
    """Put a generator object (or the `random` module) into a state that `encode_generator` gave."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif _is_numpy_generator(generator):
        if hasattr(generator, "bit_generator"):
            generator.bit_generator.state = _decode_numpy(state)
        else:
            generator.set_state(_decode_numpy(state))
    else:
        generator.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))


def _numpy() -> Any:
    """The numpy module if anybody has imported it; without it there is nothing of its to save."""
    return sys.modules.get("numpy")


def _is_numpy_generator(value: object) -> bool:
    numpy = _numpy()
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _encode_numpy(value: Any) -> Any:
    """Arrays become int64 tensors, tagged with their dtype; whole numbers above 64 bits become text."""
    if isinstance(value, dict):
        return {key: _encode_numpy(item) for key, item in value.items()}
    numpy = _numpy()
    if isinstance(value, numpy.ndarray):
        return {"array": torch.from_numpy(value.astype("int64")), "dtype": str(value.dtype)}
    if isinstance(value, int) and value.bit_length() > 63:
        return {"integer": str(value)}
    return value.item() if isinstance(value, numpy.generic) else value


def _decode_numpy(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"array", "dtype"}:
            return value["array"].numpy().astype(value["dtype"])
        if set(value) == {"integer"}:
            return int(value["integer"])
        return {key: _decode_numpy(item) for key, item in value.items()}
    return value
