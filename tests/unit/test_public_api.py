"""What `import spotguard` offers, and what it costs."""

import importlib
import json
import subprocess
import sys

import pytest

import spotguard

HEAVY = {
    "torch",
    "boto3",
    "botocore",
    "pydantic",
    "pydantic_settings",
    "numpy",
    "awscrt",
    "fsspec",
    "rich",
    "typer",
    "tenacity",
    "jinja2",
}


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded after running some code in a new process."""
    code += "\nimport json, sys; print(json.dumps(sorted(name.split('.')[0] for name in sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(json.loads(run.stdout))


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert spotguard.__all__ == sorted(spotguard.__all__)
    assert set(dir(spotguard)) >= set(spotguard.__all__)
    for name in spotguard.__all__:
        assert getattr(spotguard, name).__name__ == name


def test_every_name_is_exported_where_it_lives() -> None:
    for name in spotguard.__all__:
        home = importlib.import_module(getattr(spotguard, name).__module__)
        assert name in home.__all__


def test_nothing_else_is_there() -> None:
    for name in ("S3", "guard_", "torch", "_no"):
        with pytest.raises(AttributeError, match=name):
            getattr(spotguard, name)


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert spotguard.__version__ == version("spotguard")


def test_importing_the_package_loads_nothing_heavy() -> None:
    before = modules_after("")
    assert not (modules_after("import spotguard; dir(spotguard); spotguard.__all__") - before) & HEAVY


@pytest.mark.parametrize(
    "name", ["Preempted", "SpotguardError", "PreemptionNotice", "NoticeSource", "EverySteps", "KeepNewest"]
)
def test_plain_names_load_no_torch(name: str) -> None:
    assert "torch" not in modules_after(f"from spotguard import {name}")


def test_listing_and_verifying_checkpoints_loads_no_torch() -> None:
    code = "from spotguard import CheckpointStore; CheckpointStore('memory://x').list(); CheckpointStore('memory://x').resolve()"
    assert not modules_after(code) & {"torch", "boto3", "numpy"}
