"""The snippets of the recipes: they parse, hold what matters, and those that decide are run, with stand-ins for the scheduler."""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from spotguard import CheckpointStore
from spotguard.notices.platforms import detect_platform, reserve_of

ROOT = Path(__file__).parents[2]
RECIPES = ["aws-batch", "azure", "gce", "kubernetes", "sagemaker", "skypilot", "slurm", "systemd-ec2", "torchrun"]
PATIENCE = 60.0  # seconds until something that should come is an error


def snippets(page: str, language: str) -> list[str]:
    text = (ROOT / f"docs/how-to/{page}.md").read_text()
    return [match[1] for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def all_snippets(language: str) -> list[Any]:
    return [
        pytest.param(snippet, id=f"{page}-{number}")
        for page in RECIPES
        for number, snippet in enumerate(snippets(page, language))
    ]


def only(page: str, language: str) -> str:
    (snippet,) = snippets(page, language)
    return snippet


def yaml_of(page: str) -> Any:
    return pytest.importorskip("yaml").safe_load(only(page, "yaml"))


@pytest.mark.parametrize("snippet", all_snippets("bash"))
def test_what_is_for_a_shell_is_understood_by_one(snippet: str) -> None:
    subprocess.run(["bash", "-n"], input=snippet.encode(), check=True)


@pytest.mark.parametrize("snippet", all_snippets("python"))
def test_what_is_for_python_compiles(snippet: str) -> None:
    compile(snippet, "snippet", "exec")


@pytest.mark.parametrize("snippet", all_snippets("json"))
def test_what_is_json_parses(snippet: str) -> None:
    assert json.loads(snippet)


def test_every_recipe_leads_to_how_notices_work_and_back() -> None:
    about = (ROOT / "docs/explanation/notices.md").read_text()
    for page in RECIPES:
        assert "../explanation/notices.md" in (ROOT / f"docs/how-to/{page}.md").read_text(), page
        assert f"../how-to/{page}.md" in about


def test_every_source_and_option_that_a_recipe_names_is_there() -> None:
    import torch

    from spotguard import SpotGuard, TrainState, notices

    for page in ("azure", "gce"):
        for snippet in snippets(page, "python"):
            place = re.sub(r'"(?:gs|az)://[^"]+"', '"memory://recipe"', snippet)
            scope: dict[str, object] = {"state": TrainState(model=torch.nn.Linear(2, 2))}
            exec(place, scope)
            assert isinstance(scope["guard"], SpotGuard)
    about = (ROOT / "docs/explanation/notices.md").read_text()
    for name in re.findall(r"`(\w+Source)`", about):
        assert hasattr(notices, name), name


def test_kubernetes_replaces_what_was_stopped_and_counts_what_failed() -> None:
    spec = yaml_of("kubernetes")["spec"]
    pod, rules = spec["template"]["spec"], spec["podFailurePolicy"]["rules"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # a policy needs that
    assert all(rule["action"] == "Ignore" for rule in rules)
    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert rules[1]["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [143]}
    assert container["command"] == ["python", "train.py"]
    grace = {item["name"]: item["value"] for item in container["env"]}["SPOTGUARD_GRACE"]
    assert grace == f"{pod['terminationGracePeriodSeconds']}s"


def test_skypilot_starts_again_what_was_stopped() -> None:
    task = yaml_of("skypilot")
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    assert task["run"].startswith("exec ")


def accepted(service: str, operation: str, request: Any) -> None:
    """The request is one that AWS knows, by its own model."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model(service).operation_model(operation).input_shape
    report = ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()


def test_sagemaker_makes_the_training_process_1_and_waits_for_spot_machines() -> None:
    request = json.loads(only("sagemaker", "json"))
    accepted("sagemaker", "CreateTrainingJob", request)
    assert request["AlgorithmSpecification"]["ContainerEntrypoint"][0] == "python"
    assert request["EnableManagedSpotTraining"] is True
    times = request["StoppingCondition"]
    assert times["MaxWaitTimeInSeconds"] >= times["MaxRuntimeInSeconds"]  # or the request is refused


def test_batch_tries_again_what_was_reclaimed_or_stopped_and_nothing_else() -> None:
    job, template = (json.loads(snippet) for snippet in snippets("aws-batch", "json"))
    accepted("batch", "RegisterJobDefinition", job)
    accepted("ec2", "CreateLaunchTemplate", template)
    strategy = job["retryStrategy"]
    assert 1 <= strategy["attempts"] <= 10
    assert [rule["action"] for rule in strategy["evaluateOnExit"]] == ["RETRY", "RETRY", "RETRY", "EXIT"]
    assert {"onExitCode": "143", "action": "RETRY"} in strategy["evaluateOnExit"]
    assert template["LaunchTemplateData"]["MetadataOptions"]["HttpPutResponseHopLimit"] == 2


@pytest.mark.parametrize("page", ["kubernetes", "sagemaker"])
def test_an_entry_point_is_in_exec_form(page: str) -> None:
    (line,) = (line for line in only(page, "dockerfile").splitlines() if line.startswith("ENTRYPOINT"))
    assert json.loads(line.removeprefix("ENTRYPOINT "))[0] == "python"


TRAIN = """
import os, pathlib, time
import torch
from spotguard import SpotGuard, TrainState

here = pathlib.Path(__file__).parent
with SpotGuard(os.environ["RUN"], TrainState(model=torch.nn.Linear(2, 2)), every=10**9, notices="none") as guard:
    for step in guard.steps(int((here / "steps").read_text())):
        (here / "pid").write_text(str(os.getpid()))
        time.sleep(0.01)
        if (here / "broken").exists():
            raise ValueError("the loss is NaN")
"""


class Site:
    """A directory with a training script in it, and on the PATH what the scheduler would bring.

    The training goes on for ever until `ends` is called.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.run, self.bin = root, root / "run-17", root / "bin"
        self.bin.mkdir()
        self.mend()
        self.steps(10**9)
        self.program("python", f'exec {sys.executable} "$@"')
        self.program("spotguard", f'exec {sys.executable} -c "from spotguard.cli import main; main()" "$@"')
        self.program("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
        self.program("srun", 'exec "$@"')
        self.program("scontrol", f'echo "$@" >> {root}/scontrol')

    def program(self, name: str, line: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def steps(self, total: int) -> None:
        (self.root / "steps").write_text(str(total))

    def ends(self) -> None:
        """From its next start on the training comes to its end."""
        self.steps((CheckpointStore(self.run).latest() or pytest.fail("no checkpoint")).step + 3)

    def break_imports(self) -> None:
        """From its next start on the script cannot even begin."""
        (self.root / "train.py").write_text("import nothing_of_that_name")

    def break_loop(self) -> None:
        """From its next start on an exception ends the loop."""
        (self.root / "broken").touch()

    def mend(self) -> None:
        (self.root / "train.py").write_text(TRAIN)
        (self.root / "broken").unlink(missing_ok=True)

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **more}

    def start(self, command: list[str], **environment: str) -> "subprocess.Popen[bytes]":
        (self.root / "pid").unlink(missing_ok=True)
        return subprocess.Popen(command, cwd=self.root, env=self.environment(**environment), start_new_session=True)

    def pid(self, starter: "subprocess.Popen[bytes]") -> int:
        """Number of the training process, once it trains."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and starter.poll() is None:
            if (self.root / "pid").exists() and (text := (self.root / "pid").read_text()):
                return int(text)
            time.sleep(0.02)
        raise AssertionError("the training has not begun")

    def requeued(self) -> list[str]:
        path = self.root / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_", "INVOCATION_ID"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    place = Site(tmp_path)
    yield place
    if (tmp_path / "pid").exists() and (text := (tmp_path / "pid").read_text()):
        try:
            os.kill(int(text), signal.SIGKILL)
        except ProcessLookupError:
            return


class Recipe(Protocol):
    """As much of a scheduler as its recipe relies on."""

    def __init__(self, site: Site) -> None: ...

    def run(self, number: signal.Signals | None = None) -> str:
        """Start the training; it gets a signal once it trains. Returns what comes next: ``again``, ``done`` or ``failed``."""
        ...


class Slurm:
    """sbatch: the script is what counts."""

    def __init__(self, site: Site) -> None:
        script = only("slurm", "bash").replace("/scratch/run-17", str(site.run))
        assert "#SBATCH --signal=USR1@120" in script
        assert "B:" not in script  # that would signal the script, and not the training
        (site.root / "job.sh").write_text(script)
        self._site = site

    def run(self, number: signal.Signals | None = None) -> str:
        before = len(self._site.requeued())
        with self._site.start(["bash", "job.sh"], SLURM_JOB_ID="4711") as process:
            if number is not None:
                os.kill(self._site.pid(process), signal.SIGUSR1 if number == signal.SIGTERM else number)
            status = process.wait(PATIENCE)
        requeued = self._site.requeued()[before:]
        assert requeued in ([], ["requeue 4711"])
        return "again" if requeued else "failed" if status else "done"


class Torchrun:
    """Any scheduler that goes by the exit status, and signals the script alone."""

    def __init__(self, site: Site) -> None:
        (site.root / "job.sh").write_text(only("torchrun", "bash"))
        self._site = site

    def run(self, number: signal.Signals | None = None) -> str:
        with self._site.start(["bash", "job.sh"], RUN=str(self._site.run)) as process:
            if number is not None:
                training = self._site.pid(process)
                os.kill(process.pid if number == signal.SIGTERM else training, number)
            return {0: "done", 1: "failed", 143: "again"}[process.wait(PATIENCE)]


class Systemd:
    """systemd.service(5), systemd.kill(5)."""

    def __init__(self, site: Site) -> None:
        text = only("systemd-ec2", "ini").replace("/opt/train/.venv/bin/", f"{site.bin}/")
        self.text = text.replace("/opt/train", str(site.root)).replace("s3://my-bucket/run-17", str(site.run))
        parser = configparser.RawConfigParser(strict=True)
        parser.optionxform = str  # type: ignore[method-assign, assignment]
        parser.read_string(self.text)
        self.service, self._site = dict(parser["Service"]), site
        name, _, value = self.service["Environment"].partition("=")
        self._environment = {name: value}

    def run(self, number: signal.Signals | None = None) -> str:
        if not self._may_start():
            return "done"
        assert self.service["KillMode"] == "mixed"  # SIGTERM goes to the main process
        with self._site.start(shlex.split(self.service["ExecStart"]), **self._environment) as process:
            if number is not None:
                self._site.pid(process)
                process.send_signal(number)
            status = process.wait(min(PATIENCE, float(self.service["TimeoutStopSec"])))
        assert self.service["Restart"] == "on-abnormal"  # a signal, and no exit status but the one that is forced
        if status < 0 or str(status) in self.service["RestartForceExitStatus"].split():
            return "again"
        return "failed" if status else "done"

    def _may_start(self) -> bool:
        """``ExecCondition``: 1 to 254 skips the rest, and is no failure."""
        command = shlex.split(self.service["ExecCondition"])
        status = subprocess.run(command, env=self._site.environment(**self._environment), check=False).returncode
        assert status in (0, 1)
        return status == 0


class StartUpScript:
    """Compute Engine starts it at each boot, whatever it was; so what counts is whether it goes as far as the training."""

    def __init__(self, site: Site) -> None:
        script = next(snippet for snippet in snippets("gce", "bash") if snippet.startswith("#!/bin/bash"))
        (site.root / ".venv").mkdir()
        (site.root / ".venv/bin").symlink_to(site.bin)
        (site.root / "startup.sh").write_text(
            script.replace("gs://my-bucket/run-17", str(site.run)).replace("/opt/train", str(site.root))
        )
        self._site = site

    def run(self, number: signal.Signals | None = None) -> str:
        with self._site.start(["bash", "startup.sh"]) as process:
            if number is not None:
                assert self._site.pid(process) == process.pid  # exec: the signal reaches it
                process.send_signal(number)
            return {0: "done", 1: "failed", 143: "again", -signal.SIGKILL: "again"}[process.wait(PATIENCE)]


class Status:
    """The training alone, as one that starts containers sees it; a rule makes something of its exit status."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def run(self, number: signal.Signals | None = None) -> str:
        with self._site.start([f"{self._site.bin}/python", "train.py"], RUN=str(self._site.run)) as process:
            if number is not None:
                os.kill(self._site.pid(process), number)
            status = process.wait(PATIENCE)
        status = 128 - status if status < 0 else status
        (found,) = {rule(status) for rule in (kubernetes_does, batch_does, skypilot_does)}
        return found


def kubernetes_does(status: int) -> str:
    """After the exit of a container on a node that goes away if that was killed."""
    *ignored, last = yaml_of("kubernetes")["spec"]["podFailurePolicy"]["rules"]
    disrupted = [{"type": "DisruptionTarget"}] in [rule["onPodConditions"] for rule in ignored]
    if status in last["onExitCodes"]["values"] or (status == 137 and disrupted):
        return "again"
    return "failed" if status else "done"  # which counts against backoffLimit


def batch_does(status: int) -> str:
    job, _ = (json.loads(snippet) for snippet in snippets("aws-batch", "json"))
    if not status:
        return "done"
    for rule in job["retryStrategy"]["evaluateOnExit"]:
        if rule.get("onExitCode") == str(status) or rule.get("onReason") == "*":
            return {"RETRY": "again", "EXIT": "failed"}[rule["action"]]
    raise AssertionError("no rule for that")


def skypilot_does(status: int) -> str:
    """It looks at the machine itself to see that one was taken away."""
    if status == 137 or status in yaml_of("skypilot")["resources"]["job_recovery"]["recover_on_exit_codes"]:
        return "again"
    return "failed" if status else "done"  # which counts against max_restarts_on_errors


@pytest.mark.parametrize("recipe", [Slurm, Torchrun, Systemd, StartUpScript, Status])
def test_what_was_stopped_is_started_again_and_what_is_broken_or_finished_is_not(
    site: Site, recipe: type[Recipe]
) -> None:
    if recipe is Status:
        pytest.importorskip("yaml")
    scheduler = recipe(site)
    assert scheduler.run(signal.SIGTERM) == "again"
    site.break_imports()
    assert scheduler.run() == "failed"  # though the run says of the start before that it was stopped
    site.mend()
    assert scheduler.run(signal.SIGKILL) == "again"
    site.break_loop()
    assert scheduler.run() == "failed"
    site.mend()
    site.ends()
    assert scheduler.run() == "done"
    assert scheduler.run() == "done"  # by hand, or at the next boot


def test_the_recipe_for_slurm_has_its_signal_heard(site: Site) -> None:
    assert Slurm(site).run(signal.SIGTERM) == "again"
    assert json.loads((site.run / "exit.json").read_bytes())["notice"] == "SIGUSR1"


def test_a_machine_that_is_to_go_is_gone_before_systemd_starts_again(site: Site) -> None:
    assert float(Systemd(site).service["RestartSec"]) > 120


def test_systemd_waits_longer_than_the_guard_takes(site: Site) -> None:
    for page, cloud in (("systemd-ec2", "aws"), ("azure", "azure"), ("gce", "google")):
        (given, *_) = [*re.findall(r"TimeoutStopSec=(\d+)", (ROOT / f"docs/how-to/{page}.md").read_text()), ""]
        wait = float(given or Systemd(site).service["TimeoutStopSec"])
        variable = {"aws": "AWS_EC2_METADATA_SERVICE_ENDPOINT", "azure": "SPOTGUARD_AZURE_ENDPOINT"}
        platform = detect_platform({variable.get(cloud, "GCE_METADATA_HOST"): "http://host", "INVOCATION_ID": "1"})
        assert platform.cloud == cloud
        assert platform.grace_s is not None
        assert wait - (platform.grace_s - reserve_of(platform.grace_s)) >= 5  # to end, and to say how


def test_systemd_accepts_the_unit(site: Site) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    path = site.root / "train.service"
    path.write_text(Systemd(site).text)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "train.service" in line]
    assert complaints == [], textwrap.indent(done.stderr, "  ")
