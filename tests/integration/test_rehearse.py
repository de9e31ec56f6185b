"""``spotguard rehearse`` on real scripts: real processes, real signals, real stores."""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spotguard.cli.app import app
from spotguard.rehearse import plan_interruptions

SCRIPT = """
import sys
import torch
from spotguard import SpotGuard, TrainState

{seed}
torch.set_num_threads(1)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
data = torch.utils.data.TensorDataset(torch.linspace(-1, 1, 160).view(40, 4), torch.ones(40, 1))
loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
seen = 0
try:
    with SpotGuard("runs/here", TrainState(model=model, optimizer=optimizer)) as guard:
        for epoch in guard.epochs(4):
            for x, y in guard.batches(loader):
                loss = torch.nn.functional.mse_loss(torch.nn.functional.dropout(model(x), 0.2), y)
                optimizer.zero_grad()
                ({loss}).backward()
                optimizer.step()
                seen += 1
except SystemExit as stop:
    sys.exit({leave})
"""


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rehearse a command in an empty directory, by the command line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["rehearse", *arguments])

    return run


def _script(seed: str = "torch.manual_seed(0)", loss: str = "loss", leave: str = "stop.code") -> str:
    Path("train.py").write_text(SCRIPT.format(seed=seed, loss=loss, leave=leave))
    return "train.py"


def test_a_script_with_all_of_its_state_in_the_guard_is_safe(rehearse: Any) -> None:
    result = rehearse("--seed", "3", "--sigterm", "1", "--sigkill", "2", "--json", "--", sys.executable, _script())
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["verdict"], report["reasons"]) == ("safe", [])
    assert [start["exit_code"] for start in report["interrupted"]] == [
        {"SIGTERM": 143, "SIGKILL": -9}[item["kind"]] for item in report["plan"]
    ] + [0]
    assert [member["name"] for member in report["members"]][:2] == ["model", "optimizer"]
    left_out = [member["name"] for member in report["members"] if not member["identical"]]
    assert left_out == ["random generators: numpy", "random generators: python"], (
        "not seeded by the script, and not used"
    )
    shards = ["model", "optimizer", "rank-00000"]
    expected = plan_interruptions(40, seed=3, sigterm=1, sigkill=2, shards=shards)
    assert [(item["kind"], item["step"], item["target"]) for item in report["plan"]] == [
        (item.kind, item.step, item.target) for item in expected
    ]
    for before, after in zip(report["interrupted"], report["interrupted"][1:], strict=False):
        assert before["last_step"] - before["lost_steps"] == after["first_step"]
    for start in report["interrupted"]:
        assert sum(start["spent"].values()) == pytest.approx(start["ended"] - start["began"])
    page = Path("rehearsal/report.html").read_text()
    assert "the same state bit for bit" in page
    assert not re.search(r"(src|href)=|url\((?!#)|@import|<script", page), "the page opens without a network"
    assert not Path("runs").exists(), "the rehearsal keeps away from the real run"


def test_state_outside_the_guard_is_found_and_the_first_difference_named(rehearse: Any) -> None:
    script = _script(loss="loss * (1 + seen)")
    shell = f"{sys.executable} {script}; exit $?"  # through a shell, as launchers do: 137 in place of -9
    result = rehearse("--seed", "1", "--sigterm", "0", "--sigkill", "1", "--", "sh", "-c", shell)
    assert result.exit_code == 1, result.output
    assert re.search(
        r"parts of the final state differ, first model: \['(weight|bias)'\]: \d+ of \d elements differ", result.output
    )
    assert "Something that training depends on is not in TrainState" in result.output
    assert "UNSAFE" in result.output


def test_a_script_that_ends_with_0_after_a_sigterm_is_unsafe(rehearse: Any) -> None:
    result = rehearse("--sigterm", "1", "--sigkill", "0", "--", sys.executable, _script(leave="0"))
    assert result.exit_code == 1, result.output
    assert "exit status 0 after SIGTERM, 143 was expected: a scheduler would take the work for done" in result.output


def test_a_script_that_does_not_seed_torch_cannot_be_compared_and_is_told_what_to_do(rehearse: Any) -> None:
    result = rehearse("--", sys.executable, _script(seed="torch.seed()"))
    assert result.exit_code == 1, result.output
    assert "INCONCLUSIVE" in result.output
    assert "torch.manual_seed(0)" in result.output


@pytest.mark.parametrize(
    ("body", "remedy"),
    [
        ("print('no guard here')", "never opened a SpotGuard"),
        ("raise RuntimeError('the disk is purple')", "the disk is purple"),
        ("import time; time.sleep(60)", "give it more with --timeout"),
    ],
)
def test_a_script_that_does_not_work_when_left_alone_is_an_error_of_use(rehearse: Any, body: str, remedy: str) -> None:
    Path("train.py").write_text(body)
    result = rehearse("--timeout", "2s", "--", sys.executable, "train.py")
    assert result.exit_code == 2
    assert remedy in result.output


def test_a_command_that_does_not_exist_is_an_error_of_use(rehearse: Any) -> None:
    result = rehearse("--", "no-such-command-here")
    assert result.exit_code == 2
    assert "command not found" in result.output


def test_nothing_that_a_start_leaves_behind_lives_on(rehearse: Any) -> None:
    Path("train.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('pid', 'w').write(str(child.pid))\n"
    )
    rehearse("--", sys.executable, "train.py")
    stat = Path("/proc", Path("pid").read_text(), "stat")
    deadline = time.monotonic() + 30  # the signal has been sent; dying takes the kernel a moment
    while time.monotonic() < deadline:
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # dead, and waiting to be reaped
            return
        time.sleep(0.01)
    pytest.fail("the child of a child is still alive")


def test_only_files_of_an_earlier_rehearsal_are_cleared_away(rehearse: Any) -> None:
    Path("rehearsal").mkdir()
    for name in ("notes.txt", "untouched-mine.log", "interrupted-09.log"):
        Path("rehearsal", name).write_text("kept?")
    Path("train.py").write_text("pass")
    rehearse("--", sys.executable, "train.py")
    assert sorted(os.listdir("rehearsal")) == ["notes.txt", "untouched-01.log", "untouched-mine.log"]
