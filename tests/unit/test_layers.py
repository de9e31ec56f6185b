"""The layers of the package: who may import whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import spotguard

ROOT = Path(spotguard.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
LAYERS = {
    **dict.fromkeys(["checkpoint", "early", "errors", "events", "_retry", "_time", "settings"], 0),
    **dict.fromkeys(["policies", "stores", "notices", "coordination"], 1),
    "state": 2,
    "pipeline": 3,
    "guard": 4,
    **dict.fromkeys(["lightning", "fabric", "transformers", "dcp"], 5),
    **dict.fromkeys(["ops", "rehearse", "cli", "__main__"], 6),
    "testing": 3.5,  # contract suites and fakes: may use L0 to L3; nobody uses them but a rehearsal
}
WORDS = {"errors", "_time"}  # what all of L0 may use
FRONT = {"cli", "__main__"}  # the command line starts its neighbours


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether at module level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, id(node) not in inside) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or "", id(node) not in inside
            yield from ((f"{node.module}.{name.name}", id(node) not in inside) for name in node.names)


def ours(path: Path) -> set[str]:
    found = {name.split(".")[1] for name, _ in imports(path) if name.startswith("spotguard.")}
    return {name for name in found if name in LAYERS}


def identifier(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=identifier)
def test_every_module_has_its_layer_and_imports_nothing_above_it(path: Path) -> None:
    package = package_of(path)
    assert package in LAYERS, f"{package} is in no layer; add it to the table and to the design"
    for other in ours(path) - {package}:
        assert LAYERS[other] <= LAYERS[package], f"{package} (L{LAYERS[package]}) imports {other} (L{LAYERS[other]})"
        if LAYERS[other] == LAYERS[package]:
            assert other in WORDS or package in FRONT, f"{package} and {other} are in one layer"


@pytest.mark.parametrize("path", MODULES, ids=identifier)
def test_only_the_state_and_the_adapters_import_torch_at_module_level(path: Path) -> None:
    if package_of(path) in ("state", "coordination") or LAYERS[package_of(path)] == 5:
        return
    eager = [
        name for name, top in imports(path) if top and name.split(".")[0] in ("torch", "numpy", "boto3", "botocore")
    ]
    assert not eager


@pytest.mark.parametrize("path", [*MODULES, ROOT / "__init__.py"], ids=identifier)
def test_no_module_is_longer_than_500_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", MODULES, ids=identifier)
def test_nothing_outside_the_contract_suites_imports_a_test_framework(path: Path) -> None:
    if package_of(path) != "testing":
        assert not [name for name, _ in imports(path) if name.split(".")[0] in ("pytest", "hypothesis")]
        assert "testing" not in ours(path) or package_of(path) == "rehearse"
