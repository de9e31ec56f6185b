"""The documentation names everything there is, and nothing that is not."""

import re
from pathlib import Path

import pytest
import typer

import spotguard
from spotguard.cli.app import app
from spotguard.settings import Settings

ROOT = Path(__file__).parents[2]


def read(path: str) -> str:
    return (ROOT / path).read_text()


def test_every_command_is_documented_and_has_help() -> None:
    commands = getattr(typer.main.get_command(app), "commands")  # noqa: B009 - of a group, which mypy cannot know
    documented = set(re.findall(r"`spotguard ([a-z0-9]+)", read("docs/reference/cli.md")))
    assert documented - {"COMMAND"} == set(commands)
    assert all(command.help for command in commands.values())


def test_every_public_name_is_documented() -> None:
    page = read("docs/reference/python.md")
    assert [name for name in spotguard.__all__ if f"`{name}`" not in page] == []


def test_every_setting_is_documented_with_its_default() -> None:
    page = read("docs/reference/settings.md")
    for name, field in Settings.model_fields.items():
        row = next((line for line in page.splitlines() if f"`SPOTGUARD_{name.upper()}`" in line), "")
        assert row, name
        assert field.default is None or f"`{field.default}`" in row, row


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", read(page)):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_every_page_can_be_reached_from_the_first() -> None:
    readme = read("README.md")
    assert [
        path.name for path in ROOT.glob("docs/**/*.md") if f"({path.relative_to(ROOT).as_posix()})" not in readme
    ] == []


def test_the_layers_that_are_told_to_contributors_are_those_of_the_tree() -> None:
    told = set(re.findall(r"`(\w+)`", read("CONTRIBUTING.md").partition("**Layers.**")[2].partition("**Modules**")[0]))
    packages = {path.parent.name for path in (ROOT / "src/spotguard").glob("*/__init__.py")} - {"testing"}
    assert packages <= told


def test_the_version_is_the_one_that_is_installed() -> None:
    assert f'version = "{spotguard.__version__}"' in read("pyproject.toml")


def test_the_package_tells_type_checkers_that_it_has_types() -> None:
    assert (Path(spotguard.__file__).parent / "py.typed").exists()
