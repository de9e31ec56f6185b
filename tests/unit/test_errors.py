"""The error tree: as drawn, and catchable by what a caller already catches."""

import pickle
import re

import pytest

from spotguard import errors
from spotguard.errors import ConfigError, Preempted, SpotguardError


def drawn() -> dict[str, tuple[str, list[str]]]:
    """Class to (parent in the tree, builtins in brackets), from the docstring."""
    assert errors.__doc__ is not None
    tree: dict[str, tuple[str, list[str]]] = {}
    path: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^( {4}[ |+-]*)(\w+)(?: \(([\w, ]+)\))?(?:\s{2,}\S.*)?$", line)
        if match is None:
            continue
        indent, name = len(match[1]), match[2]
        path = [(depth, parent) for depth, parent in path if depth < indent]
        tree[name] = (path[-1][1] if path else "", match[3].split(", ") if match[3] else [])
        path.append((indent, name))
    return tree


def real() -> dict[str, type[BaseException]]:
    found = {name: getattr(errors, name) for name in errors.__all__}
    return {name: value for name, value in found.items() if not issubclass(value, Warning)}


def test_every_error_is_drawn_and_every_drawn_error_exists() -> None:
    assert set(drawn()) == set(real())


@pytest.mark.parametrize("name", sorted(set(errors.__all__) - {"InexactResumeWarning"}))
def test_the_tree_is_as_drawn(name: str) -> None:
    parent, builtins = drawn()[name]
    bases = {base.__name__ for base in real()[name].__bases__}
    assert bases - {"Exception"} == ({parent} | set(builtins)) - {"", "Exception"}


def test_all_errors_but_the_exit_are_ours() -> None:
    assert {name for name, kind in real().items() if not issubclass(kind, SpotguardError)} == {"Preempted"}
    assert issubclass(Preempted, SystemExit)
    assert not issubclass(Preempted, Exception)


@pytest.mark.parametrize("kind", [kind for name, kind in sorted(real().items()) if name != "Preempted"])
def test_an_error_keeps_its_message_and_survives_pickling(kind: type[SpotguardError]) -> None:
    error = kind("what happened; what to do")
    assert str(error) == "what happened; what to do"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))


def test_preempted_is_an_exit_with_a_status_that_is_not_zero() -> None:
    exit_ = Preempted("0001-0000000420", reason="SIGTERM")
    assert (exit_.code, exit_.checkpoint, exit_.reason) == (143, "0001-0000000420", "SIGTERM")
    assert "0001-0000000420" in str(exit_)
    assert "SIGTERM" in str(exit_)
    assert "no checkpoint is committed" in str(Preempted(None, reason="SIGTERM"))


def test_config_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="names it"):
        raise ConfigError("names it")
