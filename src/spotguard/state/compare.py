"""Are two states the same, bit for bit? And if not, where is the first difference?"""

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["fingerprint", "first_difference"]


def first_difference(left: Any, right: Any, path: str = "") -> str | None:
    """Where two trees differ first, in words; None when they are equal bit for bit (NaN equals the same NaN, 0.0 is not -0.0).

    Example:
        >>> first_difference({"lr": 0.1, "w": torch.zeros(2)}, {"lr": 0.1, "w": torch.tensor([0.0, 1.0])})
        "['w']: 1 of 2 elements differ, first at 1: 0.0 and 1.0"
    """
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return _tensor_difference(left, right, path)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        mine, theirs = (
            {_plain(key): key for key in tree} for tree in (left, right)
        )  # 1 and True are the same to a dict
        for name, key in {**theirs, **mine}.items():
            if name not in mine or name not in theirs:
                return f"{path}[{key!r}]: only in the {'first' if name in mine else 'second'}"
            if (found := first_difference(left[key], right[theirs[name]], f"{path}[{key!r}]")) is not None:
                return found
        return None
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return f"{path}: {len(left)} and {len(right)} items"
        for index, pair in enumerate(zip(left, right, strict=True)):
            if (found := first_difference(*pair, f"{path}[{index}]")) is not None:
                return found
        return None
    same = _plain(left) == _plain(right)
    return None if same else f"{path}: {_short(left)} and {_short(right)}"


def fingerprint(tree: Any) -> str:
    """SHA-256 over the values of a tree: equal exactly when `first_difference` finds none.

    Example:
        >>> fingerprint([torch.ones(2), 1]) == fingerprint((torch.ones(2), 1))
        True
    """
    digest = hashlib.sha256()
    _feed(tree, digest.update)
    return digest.hexdigest()


def _feed(tree: Any, update: Any) -> None:
    if isinstance(tree, torch.Tensor):
        update(f"tensor {tree.dtype} {tuple(tree.shape)};".encode())
        update(_bytes(tree).numpy().data)
    elif isinstance(tree, Mapping):
        update(f"mapping {len(tree)};".encode())
        for key in sorted(tree, key=_plain):
            update(_plain(key))
            _feed(tree[key], update)
    elif isinstance(tree, (list, tuple)):
        update(f"sequence {len(tree)};".encode())
        for item in tree:
            _feed(item, update)
    else:
        update(_plain(tree))


def _tensor_difference(left: torch.Tensor, right: torch.Tensor, path: str) -> str | None:
    if left.dtype != right.dtype or left.shape != right.shape:
        return f"{path}: {left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}"
    one, other = _bytes(left), _bytes(right)
    if torch.equal(one, other):
        return None
    width = max(1, left.element_size())
    differs = (one != other).view(-1, width).any(dim=1)
    first = int(differs.nonzero()[0, 0])
    values = [_flat(tensor)[first].item() for tensor in (left, right)]
    return f"{path}: {int(differs.sum())} of {left.numel()} elements differ, first at {first}: {values[0]!r} and {values[1]!r}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return _flat(tensor).view(torch.uint8)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    whole = plain.cpu().resolve_conj().resolve_neg().contiguous()
    return whole.as_strided((whole.numel(),), (1,))  # view(-1) may keep a stride of 2 where there is one element


def _plain(value: Any) -> bytes:
    if isinstance(value, float):
        return b"float " + struct.pack("<d", value) + b";"
    if isinstance(value, (set, frozenset)):  # their order differs from process to process
        return b"".join([b"set ", *sorted(_plain(item) for item in value), b";"])
    return f"{type(value).__name__} {value!r};".encode()


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, torch.Tensor) else f"a tensor of shape {tuple(value.shape)}"
    return text if len(text) <= 60 else text[:57] + "..."
