"""Every finding that says that something is wrong says what to do about it: over all that the doctor can find."""

import ast
from pathlib import Path

import pytest

from spotguard.ops import doctor
from spotguard.ops.doctor.findings import Finding

MODULES = sorted(Path(doctor.__file__).parent.glob("*.py"))


def made(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding"]


@pytest.mark.parametrize(
    "call", [pytest.param(call, id=f"{path.stem}-{call.lineno}") for path in MODULES for call in made(path)]
)
def test_every_finding_has_its_remedy_where_something_may_be_wrong(call: ast.Call) -> None:
    levels = {node.value for node in ast.walk(call.args[1]) if isinstance(node, ast.Constant)}
    if levels and levels <= {"ok", "info"}:
        return
    assert len(call.args) == 4, ast.unparse(call)
    assert not (isinstance(call.args[3], ast.Constant) and not call.args[3].value)


@pytest.mark.parametrize("level", ["warning", "problem"])
def test_one_without_a_remedy_cannot_be_made(level: doctor.Level) -> None:
    with pytest.raises(ValueError, match="what to do"):
        Finding("disk", level, "it is full")
