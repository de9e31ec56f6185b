"""The examples are interrupted, and end as if they had not been."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from spotguard import CheckpointStore
from spotguard.cli.app import app
from spotguard.state.compare import first_difference

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    "command",
    [
        ["lightning_digits/train.py", "--epochs", "2", "--workers", "1"],
        ["from_modelcheckpoint/after.py", "--epochs", "3"],
    ],
    ids=" ".join,
)
def test_a_rehearsal_finds_the_example_safe(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = [sys.executable, str(EXAMPLES / command[0]), *command[1:]]
    result = CliRunner().invoke(
        app, ["rehearse", "--seed", "4", "--sigterm", "1", "--sigkill", "1", "--json", "--", *script]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["verdict"] == "safe", report
    assert [part["name"] for part in report["members"] if not part["identical"]] == []


def test_the_script_before_and_the_one_after_train_the_same_weights(tmp_path: Path) -> None:
    for name in ("before.py", "after.py"):
        script = str(EXAMPLES / "from_modelcheckpoint" / name)
        said = subprocess.run([sys.executable, script], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        assert "best " in said
    before = torch.load(tmp_path / "runs/before/last.ckpt", weights_only=True)["state_dict"]
    checkpoint = CheckpointStore(tmp_path / "runs/after").latest()
    assert checkpoint is not None
    assert first_difference(before, checkpoint.load()["model.ckpt"]["state_dict"]) is None
