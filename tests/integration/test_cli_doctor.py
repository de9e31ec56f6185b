"""``spotguard doctor``, in places that are really so."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from servers import S3Server
from spotguard import SpotGuard, TrainState
from spotguard.cli.app import app
from spotguard.errors import ConfigError, SpotguardError
from spotguard.stores.s3 import S3ObjectStore
from spotguard.testing.metadata import FakeAws, FakeAzure, FakeGoogle

Findings = list[dict[str, str]]


@pytest.fixture(autouse=True)
def a_machine_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform that the tests themselves run on is not what they are about."""
    for name in list(os.environ):
        if name.startswith(
            ("SLURM_", "KUBERNETES_", "AWS_EC2_METADATA", "GCE_METADATA", "TORCHELASTIC_", "SPOTGUARD_")
        ):
            monkeypatch.delenv(name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def examine(*arguments: object, status: int | None = None) -> Findings:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    problems = [finding for finding in report["findings"] if finding["level"] == "problem"]
    assert report["problems"] == len(problems)
    assert result.exit_code == (1 if problems else 0)
    if status is not None:
        assert result.exit_code == status, problems
    findings: Findings = report["findings"]
    return findings


def only(findings: Findings, check: str) -> dict[str, str]:
    (found,) = (finding for finding in findings if finding["check"] == check)
    return found


def train(uri: Path, steps: int = 6) -> None:
    with SpotGuard(uri, TrainState(model=torch.nn.Linear(2, 2)), every=1, notices="none") as guard:
        for _ in guard.steps(steps):
            pass


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(root.rglob("*"))}


def test_every_finding_has_a_level_and_says_something_and_every_problem_has_a_remedy(tmp_path: Path) -> None:
    for finding in examine(tmp_path / "run", "--grace", "0.1s"):
        assert finding["level"] in ("ok", "info", "warning", "problem")
        assert finding["what"]
        assert finding["fix"] or finding["level"] in ("ok", "info"), finding


def test_a_place_that_is_not_there_yet_is_tried_out_and_left_as_it_was(tmp_path: Path) -> None:
    found = examine(tmp_path / "deep" / "run")
    assert only(found, "exclusive")["level"] == "ok"
    assert "1 GB takes" in only(found, "save")["what"]
    assert files(tmp_path) == {}


def test_a_run_is_left_as_it_was(tmp_path: Path) -> None:
    train(tmp_path / "run")
    before = files(tmp_path)
    found = examine(tmp_path / "run")
    assert files(tmp_path) == before
    assert "1 attempts" in found[[finding["check"] for finding in found].index("store")]["what"]


@pytest.mark.parametrize("trouble", ["gone", "damaged"])
def test_a_run_that_a_start_would_refuse_is_a_problem(tmp_path: Path, trouble: str) -> None:
    train(tmp_path / "run")
    record = tmp_path / "run/run.json"
    record.unlink() if trouble == "gone" else record.write_bytes(b"{}")
    (found,) = (item for item in examine(tmp_path / "run", status=1) if item["level"] == "problem")
    assert "run.json" in found["what"]
    assert "a start is refused" in found["what"]
    with pytest.raises(SpotguardError, match=r"run\.json"):
        train(tmp_path / "run")


def test_a_table_for_people_has_the_same(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)], catch_exceptions=False)
    for finding in examine(tmp_path):
        assert finding["check"] in result.stdout
    assert "exclusive" in result.stdout


def test_what_a_save_takes_is_compared_with_what_a_stop_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path)
    assert only(examine(tmp_path), "save")["level"] == "info"
    fits = only(examine(tmp_path, "--grace", "10m"), "save")
    assert fits["level"] == "ok"
    assert "commits of attempt 1" in fits["what"]
    for grace in ("10ms", "0.001ms"):  # a step takes less, and more
        too_short = only(examine(tmp_path, "--grace", grace, status=1), "save")
        assert too_short["level"] == "problem"
        assert "every=" in too_short["fix"]
    monkeypatch.setenv("SPOTGUARD_GRACE", "0.001ms")
    assert only(examine(tmp_path, status=1), "save")["level"] == "problem"


def test_a_torn_event_log_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    train(tmp_path)
    (log,) = (tmp_path / "events").iterdir()
    log.write_bytes(b'{"event": "CheckpointCommitted"}\nnull\n\xff\n' + log.read_bytes()[:-9])
    assert "attempt 1" in only(examine(tmp_path, "--grace", "10m"), "save")["what"]


def test_the_tightest_layer_is_named_with_what_lengthens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "12")
    layers = [finding for finding in examine() if finding["check"] == "grace"]
    assert ["Kubernetes" in layers[0]["what"], "torchrun" in layers[1]["what"]] == [True, True]
    assert "torchrun is the tightest: 10.0 s" in layers[2]["what"]
    assert "--shutdown-timeout" in layers[2]["fix"]


def test_a_platform_without_an_answer_from_its_metadata_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1/")
    assert only(examine(status=1), "metadata")["level"] == "problem"
    monkeypatch.setenv("SPOTGUARD_NOTICES", "none")
    assert "metadata" not in [finding["check"] for finding in examine()]


def test_the_metadata_service_is_asked_where_the_guard_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for fake in (FakeAws(), FakeGoogle(), FakeAzure(limit=1000)):
        with monkeypatch.context() as environment, fake:
            for name, value in fake.environment.items():
                environment.setenv(name, value)
            examine()
        assert fake.requests


def test_a_place_that_cannot_be_written_to_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert only(examine(tmp_path / "file" / "run", status=1), "exclusive")["fix"]


def test_a_scheme_that_is_not_known_is_a_problem_and_not_a_traceback() -> None:
    assert "scheme" in only(examine("gopher://run", status=1), "store")["what"]


def test_a_setting_that_makes_no_sense_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTGUARD_KEEP", "many")
    assert "SPOTGUARD_KEEP" in only(examine(status=1), "settings")["what"]


def test_a_grace_that_is_no_duration_is_wrong_usage() -> None:
    with pytest.raises(ConfigError, match="--grace"):
        examine("--grace", "soon")


def test_several_ranks_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert only(examine(status=1), "ranks")["fix"]


STARTED = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-c", "from spotguard.cli import main; main()", "doctor", "--json"])
"""


def test_signals_that_whoever_started_it_keeps_away_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    done = subprocess.run([sys.executable, "-c", STARTED], check=False, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = [finding for finding in json.loads(done.stdout)["findings"] if finding["check"] == "signals"]
    assert {finding["what"].split()[0]: finding["level"] for finding in found} == {
        "SIGTERM": "problem",
        "SIGUSR1": "warning",
    }


def in_namespace(*command: str) -> Findings:
    """Run it as a container would: the command is process 1."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this machine lets nobody make a process namespace")
    done = subprocess.run([*unshare, *command], check=False, capture_output=True, text=True)
    findings: Findings = json.loads(done.stdout)["findings"]
    return findings


DOCTOR = f"{sys.executable} -c 'from spotguard.cli import main; main()' doctor --json"


def test_a_shell_that_is_really_process_1_is_a_problem() -> None:
    found = only(in_namespace("sh", "-c", f"{DOCTOR}; echo"), "pid-1")
    assert found["level"] == "problem"
    assert "exec" in found["fix"]


def test_a_shell_that_gave_way_is_not_there_any_more() -> None:
    found = only(in_namespace("sh", "-c", f"exec {DOCTOR}"), "pid-1")
    assert "python" in found["what"]
    assert found["level"] in ("ok", "info")


def test_a_bucket_is_tried_out_and_left_as_it_was(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    seaweedfs.use(monkeypatch)
    for bucket, level in ((seaweedfs.versioned, "ok"), (seaweedfs.plain, "warning")):
        uri = f"s3://{bucket}/{secrets.token_hex(8)}"
        found = examine(uri)
        assert only(found, "permissions")["level"] == "ok"
        assert only(found, "versions")["level"] == level
        assert only(found, "clock")["level"] == "ok"
        assert "1 GB takes" in only(found, "save")["what"]
        store = S3ObjectStore(uri)
        assert [*store._list_versions("")] == []


def test_every_permission_that_is_missing_is_named(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    moto.restricted("s3:PutObject", "s3:DeleteObject", denied=True).use(monkeypatch)
    found: Any = only(examine(f"s3://{moto.plain}/{secrets.token_hex(8)}", status=1), "permissions")
    assert "s3:PutObject" in found["what"]
    assert "s3.md" in found["fix"]
