"""``spotguard rehearse --platform``: what each platform delivers, to real processes, with times scaled down."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from spotguard.cli.app import app

SCRIPT = """
import os, sys, time
import torch
from spotguard import SpotGuard, TrainState
from spotguard.notices import AwsSource, AzureSource, GoogleSource

torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = torch.utils.data.TensorDataset(torch.linspace(-1, 1, 1600).view(400, 4), torch.ones(400, 1))
loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, num_workers={workers})
try:
    with SpotGuard("runs/here", TrainState(model=model, optimizer=optimizer), {arguments}) as guard:
        for epoch in guard.epochs({epochs}):
            for x, y in guard.batches(loader):
                loss = torch.nn.functional.mse_loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                time.sleep(0.01)
except SystemExit as stop:
    os._exit(stop.code)  # the interpreter takes its time to end, and the times here are short
"""


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rehearse a command in an empty directory, by the command line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["rehearse", "--seed", "1", "--json", *arguments])

    return run


def script(epochs: int, arguments: str = "", workers: int = 0) -> str:
    """Trains for a little more than a second per epoch."""
    Path("train.py").write_text(SCRIPT.format(epochs=epochs, arguments=arguments, workers=workers))
    return "train.py"


def report_of(result: Result, status: int = 0) -> dict[str, Any]:
    assert result.exit_code == status, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def starts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By what has befallen them last."""
    return {start["strikes"][-1]["interruption"]["kind"]: start for start in report["interrupted"] if start["strikes"]}


def delivered(start: dict[str, Any]) -> list[str]:
    return [done["what"] for done in start["strikes"][-1]["delivered"]]


def test_ec2_tells_in_its_metadata_and_the_time_is_used(rehearse: Any) -> None:
    train = script(9, "notices=[AwsSource(interval=0.1)]")
    report = report_of(rehearse("--platform", "aws", "--grace", "3s", "--", sys.executable, train))
    assert (report["verdict"], report["reasons"], report["notes"]) == ("safe", [], [])
    found = starts(report)
    assert set(found) == {"terminate", "rebalance, terminate", "hibernate", "no notice"}
    for name in ("terminate", "rebalance, terminate"):
        assert found[name]["exit_code"] == 143
        assert 0 < found[name]["trained_in_window_s"] < found[name]["window_s"] < 3
        assert found[name]["committed_after_notice"] >= 1
        assert found[name]["lost_steps"] == 0
    assert delivered(found["rebalance, terminate"]) == ["rebalance", "terminate in 3.0 s"]
    assert delivered(found["hibernate"]) == ["hibernate", "frozen", "SIGKILL"]
    assert [found[name]["exit_code"] for name in ("hibernate", "no notice")] == [-9, -9]


def test_compute_engine_tells_and_signals_at_once_and_takes_maintenance_back(rehearse: Any) -> None:
    report = report_of(rehearse("--platform", "gcp", "--grace", "3s", "--", sys.executable, script(4)))
    assert (report["verdict"], report["reasons"], report["notes"]) == ("safe", [], [])
    kinds = [strike["interruption"]["kind"] for start in report["interrupted"] for strike in start["strikes"]]
    assert sorted(kinds) == ["maintenance, withdrawn", "no notice", "preempted"]
    assert starts(report)["preempted"]["exit_code"] == 143
    assert delivered(starts(report)["preempted"]) == ["preempted", "SIGTERM to all processes"]


def test_azure_tells_of_events_of_which_only_one_asks_to_go(rehearse: Any) -> None:
    train = script(9, "notices=[AzureSource(interval=0.3)]")
    report = report_of(rehearse("--platform", "azure", "--grace", "3s", "--", sys.executable, train))
    assert (report["verdict"], report["reasons"]) == ("safe", [])
    kinds = [strike["interruption"]["kind"] for start in report["interrupted"] for strike in start["strikes"]]
    assert sorted(kinds) == ["Freeze, and Preempt of another VM", "Preempt", "Preempt, withdrawn", "no notice"]


def test_a_container_whose_process_1_is_the_training_is_safe(rehearse: Any) -> None:
    report = report_of(rehearse("--platform", "sagemaker", "--", sys.executable, script(2)))
    assert report["verdict"] == "safe"
    assert report["grace_s"] == 120
    stopped = starts(report)["job stopped"]
    assert (stopped["exit_code"], stopped["stopped"]) == (0, 0)  # another status would be a failure there


def test_a_shell_as_process_1_keeps_the_signal_to_itself_and_that_is_told(rehearse: Any) -> None:
    command = f"{sys.executable} {script(4)}; exit $?"
    report = report_of(rehearse("--platform", "k8s", "--grace", "2s", "--", "sh", "-c", command), 1)
    assert report["verdict"] == "unsafe"
    assert "process 1, sh, has no handler for it" in report["reasons"][0]
    assert "exec python train.py" in report["reasons"][0]
    assert starts(report)["pod deleted"]["stopped"] is None


def test_slurm_signals_the_whole_step_with_the_workers_of_the_loader(rehearse: Any) -> None:
    report = report_of(rehearse("--platform", "slurm", "--grace", "20s", "--", sys.executable, script(2, workers=1)))
    assert (report["verdict"], report["reasons"], report["notes"]) == ("safe", [], [])
    assert [starts(report)[name]["exit_code"] for name in ("time limit", "preempted")] == [143, 143]
    assert delivered(starts(report)["time limit"]) == ["SIGUSR1 to all processes"]


def test_torchrun_makes_1_of_every_status_and_the_run_itself_tells(rehearse: Any) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    report = report_of(rehearse("--platform", "torchrun", "--grace", "20s", "--", *torchrun, script(2)))
    assert (report["verdict"], report["reasons"]) == ("safe", [])
    stopped = starts(report)["torchrun stopped"]
    assert (stopped["exit_code"], stopped["exit_state"], stopped["stopped"]) == (1, "preempted", 143)


def test_a_save_that_does_not_fit_into_the_grace_is_told_with_the_figures(rehearse: Any) -> None:
    train = script(3)
    options = ["--platform", "k8s", "--grace", "1s", "--slow-store", "400ms"]
    report = report_of(rehearse(*options, "--", sys.executable, train), 1)
    assert report["verdict"] == "unsafe"
    (reason,) = report["reasons"]
    assert re.search(r"killed after 'pod deleted' .* needed \d+\.\d s, 1\.0 s given", reason)
    assert "set terminationGracePeriodSeconds in the pod" in reason
    assert all(member["identical"] is not False for member in report["members"]), "no bit is wrong for all that"
    page = Path("rehearsal/report.html").read_text()
    assert "on k8s, with a grace of 1.0 s, writing made slow: 400.0 ms for every object" in page
    assert "--platform k8s --grace 1s --slow-store 0.4s" in page


def test_a_run_that_is_shorter_than_the_notice_is_told_so(rehearse: Any) -> None:
    result = rehearse("--platform", "aws", "--", sys.executable, script(1))
    assert result.exit_code == 2
    assert "With a grace of 2 min the notices take" in result.output
    assert "train longer" in result.output


def test_what_makes_no_sense_is_an_error_of_use(rehearse: Any) -> None:
    for options, told in [
        (["--platform", "moon"], "write one of aws, gcp, azure, k8s, slurm, sagemaker, torchrun"),
        (["--grace", "10s"], "name the platform with --platform"),
        (["--slow-store", "very"], "such as 2s, or a rate, such as 10MB/s"),
    ]:
        result = rehearse(*options, "--", sys.executable, "train.py")
        assert (result.exit_code, told in result.output) == (2, True), result.output


def test_torchrun_that_is_not_there_is_an_error_of_use(rehearse: Any) -> None:
    result = rehearse("--platform", "torchrun", "--", sys.executable, script(1))
    assert result.exit_code == 2
    assert "write the command as you start it, torchrun and all" in result.output
