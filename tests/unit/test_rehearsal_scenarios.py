"""What each platform delivers: the tables, the place where it is delivered, and the verdicts."""

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from spotguard.errors import ConfigError, DeadlineExceededError
from spotguard.guard.gate import slowed
from spotguard.notices import AwsSource, AzureSource, GoogleSource
from spotguard.notices.platforms import _LAYERS, detect_platform
from spotguard.rehearse.plan import Interruption, check_room, plan_interruptions
from spotguard.rehearse.record import Start
from spotguard.rehearse.recorder import Recorder
from spotguard.rehearse.report import judge
from spotguard.rehearse.scenario import (
    GRACES,
    Announce,
    Begin,
    Kill,
    Scenario,
    Signal,
    Withdraw,
    in_words,
    scenarios,
)
from spotguard.rehearse.site import MARKS, Site
from spotguard.rehearse.slow_store import SlowStore
from spotguard.stores import LocalObjectStore

NOWHERE = Path("/nowhere")


def table(platform: str, grace_s: float) -> dict[str, list[str]]:
    return {
        one.name: [f"{delivery.at_s:g} {in_words(delivery.act)}" for delivery in one.deliveries]
        for one in scenarios(platform, grace_s)
    }


# -- the tables --------------------------------------------------------------------------------------------------------------------


def test_every_platform_leaves_what_its_documentation_says_and_may_give_no_notice_at_all() -> None:
    assert GRACES == {"aws": 120, "gcp": 30, "azure": 30, "k8s": 30, "slurm": 60, "sagemaker": 120, "torchrun": 30}
    for platform, grace_s in GRACES.items():
        assert table(platform, grace_s)["no notice"] == ["0 SIGKILL"]
        for one in scenarios(platform, grace_s):
            times = [delivery.at_s for delivery in one.deliveries]
            assert times == sorted(times)
            assert (one.asks_s is None) == (not any(isinstance(each.act, Kill) for each in one.deliveries))
            if one.asks_s is not None:
                assert times[-1] >= one.asks_s + one.lead_s


def test_ec2_announces_two_minutes_ahead_signals_only_at_the_shutdown_and_freezes_at_once_to_hibernate() -> None:
    assert table("aws", 120) == {
        "terminate": ["0 terminate in 2 min", "120 SIGTERM to all processes", "121 SIGKILL"],
        "rebalance, terminate": [
            "0 rebalance",
            "6 terminate in 2 min",
            "126 SIGTERM to all processes",
            "127 SIGKILL",
        ],
        "hibernate": ["0 hibernate", "0 frozen", "1 SIGKILL"],
        "no notice": ["0 SIGKILL"],
    }
    leads = {one.name: (one.asks_s, one.lead_s) for one in scenarios("aws", 120)}
    assert (leads["rebalance, terminate"], leads["hibernate"]) == ((6, 120), (0, 0)), (
        "a recommendation asks for nothing"
    )


def test_compute_engine_signals_with_the_notice_unless_the_vm_has_a_notice_duration() -> None:
    assert table("gcp", 30)["preempted"] == ["0 preempted", "0 SIGTERM to all processes", "30 SIGKILL"]
    assert table("gcp", 150)["preempted"] == ["0 preempted", "120 SIGTERM to all processes", "150 SIGKILL"]
    assert table("gcp", 30)["maintenance, withdrawn"] == ["0 maintenance-event", "10 withdrawn"]


def test_azure_sends_no_signal_takes_events_back_freezes_and_tells_of_the_events_of_others() -> None:
    found = table("azure", 30)
    assert found["Preempt"] == ["0 Preempt in 30.0 s", "30 SIGKILL"]
    assert found["Preempt, withdrawn"] == ["0 Preempt in 30.0 s", "10 withdrawn"]
    assert found["Freeze, and Preempt of another VM"] == [
        "0 Preempt of another VM in 30.0 s",
        "0 Freeze in 10.0 s",
        "10 begins",
        "10 frozen for 2.0 s",
        "30 withdrawn",
    ]


@pytest.mark.parametrize(("platform", "name"), [("k8s", "pod deleted"), ("sagemaker", "job stopped")])
def test_a_container_gets_the_signal_in_its_process_1_alone(platform: str, name: str) -> None:
    assert table(platform, 30)[name] == ["0 SIGTERM to process 1", "30 SIGKILL"]


def test_slurm_sends_what_was_asked_for_then_sigcont_and_sigterm_and_waits_for_killwait() -> None:
    limit, both = table("slurm", 60)["time limit"], ["SIGCONT to all processes", "SIGTERM to all processes"]
    assert limit == ["0 SIGUSR1 to all processes", *(f"60 {one}" for one in both), "90 SIGKILL"]
    assert table("slurm", 60)["preempted"] == [f"{at} {one}" for at in (0, 60) for one in both] + ["60 SIGKILL"]
    assert table("slurm", 60)["preempted without GraceTime"] == [*(f"0 {one}" for one in both), "0 SIGKILL"]


def test_torchrun_gets_the_signal_itself_and_has_its_own_time_to_kill_its_workers() -> None:
    assert table("torchrun", 30)["torchrun stopped"] == ["0 SIGTERM to the command", "35 SIGKILL"]


def test_a_platform_that_nobody_knows_is_refused_with_the_names_of_those_that_are() -> None:
    with pytest.raises(ConfigError, match="aws, gcp, azure, k8s, slurm, sagemaker, torchrun"):
        scenarios("moon", 30)
    with pytest.raises(ConfigError, match="--platform"):
        Site(None, 30, NOWHERE)


# -- the plan ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_behind_a_notice_come_as_many_steps_as_it_may_take(seed: int) -> None:
    found = scenarios("aws", 10)
    plan = plan_interruptions(4000, seed=seed, sigterm=1, sigkill=1, scenarios=found, steps_per_s=100)
    assert sorted(item.kind for item in plan) == sorted(["SIGTERM", "SIGKILL", *(one.name for one in found)])
    ends = [item.step + (100 * item.scenario.trains_s if item.scenario else 0) for item in plan]
    assert all(end < after.step for end, after in zip(ends, plan[1:], strict=False))
    assert ends[-1] < 4000
    assert plan == plan_interruptions(4000, seed=seed, sigterm=1, sigkill=1, scenarios=found, steps_per_s=100)


def test_a_run_that_is_shorter_than_the_notices_is_told_which_grace_would_fit() -> None:
    found = scenarios("aws", 30)
    with pytest.raises(ConfigError, match=r"trained for 20.0 s. With a grace of 30.0 s .* --grace 8s, or train longer"):
        check_room(found, train_s=20, grace_s=30, least_s=7)
    with pytest.raises(ConfigError, match=r"would not be seen: train longer"):
        check_room(found, train_s=15, grace_s=30, least_s=7)
    check_room(found, train_s=80, grace_s=30, least_s=7)
    check_room(scenarios("k8s", 30), train_s=1, grace_s=30, least_s=1)  # a signal is followed at once


# -- the place ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", list(GRACES))
def test_nothing_of_the_real_place_shows_through(
    platform: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for marks, _ in _LAYERS:
        for mark in marks.split("|"):
            monkeypatch.setenv(mark, "from the real place")
    for name in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST", "SPOTGUARD_AZURE_ENDPOINT"):
        monkeypatch.setenv(name, "http://192.0.2.1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "real")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    dmi = tmp_path / "dmi"
    dmi.mkdir()
    (dmi / "product_name").write_text("Google Compute Engine")
    with Site(platform, None, NOWHERE) as site:
        found = detect_platform(site.environment, dmi=dmi)
        names = {"aws": ["aws"], "gcp": ["gcp"], "azure": ["azure"], "k8s": ["kubernetes"], "torchrun": []}
        assert [layer.name for layer in found.layers] == names.get(platform, [platform])
        assert found.cloud == {"aws": "aws", "gcp": "google", "azure": "azure"}.get(platform)
        assert "192.0.2.1" not in str(site.environment)
        assert site.layer is not None
        assert site.grace_s == GRACES[platform]


def test_where_we_really_are_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with Site(None, None, NOWHERE) as site:
        assert dict(site.environment) == dict(os.environ)
        assert site.scenarios == ()


def test_every_variable_by_which_a_platform_is_known_is_a_mark() -> None:
    assert {mark for marks, _ in _LAYERS for mark in marks.split("|")} <= set(MARKS)


def test_torchrun_is_told_its_time_and_a_time_that_the_user_has_set_is_that_of_the_platform(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "100")
    with Site("torchrun", None, NOWHERE) as site:
        assert site.grace_s == 100
    with Site("torchrun", 7.5, NOWHERE) as site:
        assert (site.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"], site.grace_s) == ("8", 8)


def test_the_services_tell_what_is_announced_and_it_is_known_when_that_was_heard() -> None:
    with Site("aws", 120, NOWHERE) as site:
        source = AwsSource(site.environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"])
        site.perform(Announce("rebalance"))
        site.perform(Announce("terminate", 120))
        assert source.get("spot/instance-action").status == 200
        assert [at is None for at in site.heard] == [True, False]
        site.refresh()
        assert source.get("spot/instance-action").status == 404
        assert site.heard == ()
    with Site("gcp", 30, NOWHERE) as site:
        google = GoogleSource(site.environment["GCE_METADATA_HOST"])
        site.perform(Announce("preempted"))
        site.perform(Announce("maintenance-event"))
        assert google.get("instance/preempted").text == "TRUE"
        assert google.get("instance/maintenance-event").text == "TERMINATE_ON_HOST_MAINTENANCE"
        site.perform(Withdraw())
        assert google.get("instance/maintenance-event").text == "NONE"
        assert None not in site.heard
    with Site("azure", 30, NOWHERE) as site:
        azure, path = AzureSource(site.environment["SPOTGUARD_AZURE_ENDPOINT"]), "/metadata/scheduledevents"
        site.perform(Announce("Preempt of another VM", 30))
        site.perform(Announce("Freeze", 10))
        site.perform(Begin())
        events = json.loads(azure.get(f"{path}?api-version=2020-07-01").text)["Events"]
        assert [(one["EventType"], one["Resources"], one["EventStatus"]) for one in events] == [
            ("Preempt", ["anothervm"], "Scheduled"),
            ("Freeze", ["myspotvm"], "Started"),
        ]
        site.perform(Withdraw())
        assert [at is None for at in site.heard] == [False, False, False, True]


# -- a slow store ------------------------------------------------------------------------------------------------------------------


def test_a_slow_store_is_written_as_a_time_or_as_a_rate() -> None:
    assert SlowStore.parse("10MB/s") == SlowStore(bytes_per_s=10e6)
    assert SlowStore.parse("500 kB/s") == SlowStore(bytes_per_s=5e5)
    assert SlowStore.parse("2s") == SlowStore(latency_s=2.0)
    assert [SlowStore.parse(SlowStore.parse(text).text).text for text in ("2s", "10MB/s")] == ["2s", "10MB/s"]
    for text in ("slow", "0MB/s", "-1s", "10MB"):
        with pytest.raises(ConfigError, match="such as 2s, or a rate, such as 10MB/s"):
            SlowStore.parse(text)


def test_a_slow_store_takes_its_time_for_all_writers_together_and_keeps_deadlines(tmp_path: Path) -> None:
    store = slowed(LocalObjectStore(tmp_path), bytes_per_s=1e6)
    began = time.monotonic()
    with store.create("a") as first, store.create("b") as second:
        assert first.write(b"x" * 100_000) + second.write(b"y" * 100_000) == 200_000
    assert time.monotonic() - began >= 0.19
    with store.open("a") as reader:
        assert reader.read() == b"x" * 100_000
    with pytest.raises(DeadlineExceededError), store.create("c", deadline=time.monotonic() + 0.1) as writer:
        writer.write(b"z" * 1_000_000)
    late = slowed(LocalObjectStore(tmp_path), latency_s=5.0)
    with pytest.raises(DeadlineExceededError), late.create("d", deadline=time.monotonic() + 0.1) as writer:
        writer.write(b"z")
    assert [info.key for info in store.list("")] == ["a", "b"]


# -- the verdicts ------------------------------------------------------------------------------------------------------------------

UNTOUCHED = Start(
    number=1, began=0.0, ended=50.0, exit_code=0, opened=1.0, uri="runs/1", last_step=100, finished=True, saves=(2.0,)
)


def scenario(platform: str, name: str, grace_s: float = 30.0) -> Scenario:
    return next(one for one in scenarios(platform, grace_s) if one.name == name)


def start(
    one: Scenario, until_s: float, *, heard_s: float | None = 0.0, stopping_s: float | None = None, **end: Any
) -> Start:
    """A start in which a scenario has begun at 10 s, and that ended so many seconds later."""
    recorder, began = Recorder(1, 0.0), 10.0
    recorder.heard({"at": "hello", "uri": "runs/1"}, 1.0)
    recorder.heard({"at": "fresh", "rng": {}}, 2.0)
    recorder.heard({"at": "boundary", "step": 8}, began)
    recorder.strike(Interruption(one.name, 8, scenario=one), {"at": "boundary", "step": 8}, began)
    trouble, told = end.pop("trouble", ""), []
    for delivery in one.deliveries:
        if delivery.at_s <= until_s:
            recorder.delivered(delivery, trouble if isinstance(delivery.act, Signal) else "", began + delivery.at_s)
            told.append(None if heard_s is None else began + delivery.at_s + heard_s)
    if stopping_s is not None:
        recorder.heard({"at": "stopped", "seconds": 0.5, "code": 143}, began + stopping_s + 0.5)
    if end.pop("finished", False):
        recorder.heard({"at": "finished", "step": 100}, began + until_s)
    given = {"exit_code": 143 if stopping_s is not None else -9, "timed_out": False, "log": "log", **end}
    return recorder.result(ended=began + until_s, heard=told, **given)


def verdict(first: Start, one: Scenario, platform: str = "k8s") -> tuple[str, str, str]:
    """What is thought of that start, followed by one that comes to the end."""
    second = dataclasses.replace(UNTOUCHED, number=2)
    with Site(platform, 30, NOWHERE) as site:
        plan = [Interruption(one.name, 8, scenario=one)]
        starts = [first] if first.finished else [first, second]
        word, reasons, notes = judge(UNTOUCHED, starts, plan, [], layer=site.layer)
    return word, "\n".join(reasons), "\n".join(notes)


def test_to_stop_in_time_is_safe() -> None:
    for platform, name in [("k8s", "pod deleted"), ("aws", "terminate"), ("azure", "Preempt"), ("gcp", "preempted")]:
        one = scenario(platform, name)
        assert verdict(start(one, 25.0, stopping_s=20.0), one, platform)[:2] == ("safe", ""), name
        late = start(one, 30.5, stopping_s=29.0, exit_code=-15)  # by the shutdown, on its way out: 143 for all who ask
        assert verdict(late, one, platform)[:2] == ("safe", "")


def test_to_be_killed_without_a_lead_is_safe() -> None:
    for platform, name in [
        ("aws", "hibernate"),
        ("aws", "no notice"),
        ("slurm", "preempted without GraceTime"),
    ]:
        one = scenario(platform, name)
        assert verdict(start(one, 1.0), one, platform)[0] == "safe"


def test_a_save_that_takes_longer_than_the_grace_is_told_with_both_figures_and_a_remedy() -> None:
    one = scenario("k8s", "pod deleted")
    first = dataclasses.replace(start(one, 30.0), saves=(41.0,))
    word, reasons, _ = verdict(first, one)
    assert word == "unsafe"
    assert "needed 41.0 s, 30.0 s given" in reasons
    assert "set terminationGracePeriodSeconds in the pod" in reasons


def test_a_script_that_counts_on_more_time_is_told_so() -> None:
    one = scenario("azure", "Preempt")
    word, reasons, _ = verdict(start(one, 30.0), one, "azure")
    assert word == "unsafe"
    assert "30.0 s were given, and 2.0 s would have been enough" in reasons
    assert "SPOTGUARD_GRACE" in reasons


def test_a_notice_that_nobody_asked_for_is_told_of() -> None:
    one = scenario("azure", "Preempt")
    word, reasons, _ = verdict(start(one, 30.0, heard_s=None), one, "azure")
    assert word == "unsafe"
    assert "nobody asked the metadata service" in reasons
    assert "notices='none'" in reasons
    one = scenario("aws", "terminate", 4.0)  # only the shutdown was heard
    word, _, notes = verdict(start(one, 4.5, heard_s=None, stopping_s=4.0), one, "aws")
    assert word == "safe"
    assert "EC2 is asked every 5 s" in notes


def test_an_exit_that_hangs_is_told_apart_from_a_save_that_is_too_slow() -> None:
    one = scenario("k8s", "pod deleted")
    word, reasons, _ = verdict(start(one, 30.0, stopping_s=3.0, exit_code=-9), one)
    assert word == "unsafe"
    assert "it had stopped after 3.5 s, and had still not ended when the 30.0 s were over" in reasons


def test_a_signal_that_process_1_drops_is_told_with_the_remedy() -> None:
    one = scenario("k8s", "pod deleted")
    trouble = "dropped: process 1, sh, has no handler for it"
    for first in (start(one, 30.0, trouble=trouble), start(one, 20.0, trouble=trouble, finished=True, exit_code=0)):
        word, reasons, _ = verdict(first, one)
        assert word == "unsafe"
        assert "process 1, sh, has no handler" in reasons
        assert "exec python train.py" in reasons


@pytest.mark.parametrize(
    ("platform", "name"),
    [
        ("azure", "Freeze, and Preempt of another VM"),
        ("gcp", "maintenance, withdrawn"),
        ("azure", "Preempt, withdrawn"),
    ],
)
def test_to_leave_where_training_was_to_go_on_is_unsafe(platform: str, name: str) -> None:
    one = scenario(platform, name)
    word, reasons, _ = verdict(start(one, 40.0, stopping_s=38.0), one, platform)
    assert word == "unsafe"
    assert "asks nobody to go" in reasons
    assert verdict(start(one, 40.0, finished=True, exit_code=0), one, platform)[0] == "safe"
    word, reasons, _ = verdict(start(one, 9.0, finished=True, exit_code=0), one, platform)
    assert word == "unsafe"
    assert "did not come to pass" in reasons


def test_to_leave_at_a_recommendation_is_unsafe() -> None:
    one = scenario("aws", "rebalance, terminate")
    word, reasons, _ = verdict(start(one, 4.0, stopping_s=2.0), one, "aws")
    assert word == "unsafe"
    assert "before it was told to go" in reasons


def test_to_leave_before_a_notice_was_taken_back_is_only_a_pity() -> None:
    one = scenario("azure", "Preempt, withdrawn")
    for first in (
        start(one, 9.0, stopping_s=8.0),  # before
        start(one, 12.0, stopping_s=10.1, heard_s=0.3),  # before it could know
    ):
        word, _, notes = verdict(first, one, "azure")
        assert word == "safe"
        assert "need not have ended" in notes


def test_to_come_to_the_end_within_the_window_puts_nothing_to_the_test() -> None:
    one = scenario("aws", "terminate")
    word, reasons, _ = verdict(start(one, 20.0, finished=True, exit_code=0), one, "aws")
    assert word == "unsafe"
    assert "Ask for a smaller --grace" in reasons
    one = scenario("k8s", "pod deleted")
    word, reasons, _ = verdict(start(one, 20.0, finished=True, exit_code=0), one)
    assert word == "unsafe"
    assert "a signal handler of its own" in reasons


def test_under_torchrun_the_run_itself_tells_how_it_ended() -> None:
    one = scenario("torchrun", "torchrun stopped")
    stopped = start(one, 5.0, stopping_s=1.0, exit_code=1, exit_state="preempted")
    assert verdict(stopped, one, "torchrun")[0] == "safe"
    word, reasons, _ = verdict(dataclasses.replace(stopped, exit_code=0), one, "torchrun")
    assert word == "unsafe"
    assert "a scheduler would take the work for done" in reasons
    word, reasons, _ = verdict(start(one, 31.0, exit_code=1, exit_state="unknown"), one, "torchrun")
    assert word == "unsafe"
    assert "--shutdown-timeout" in reasons or "would have been enough" in reasons


def test_steps_that_were_lost_though_there_was_a_notice_are_noted() -> None:
    one = scenario("azure", "Preempt")
    first = dataclasses.replace(start(one, 20.0, stopping_s=1.0), lost_steps=7)
    word, _, notes = verdict(first, one, "azure")
    assert word == "safe"
    assert re.search(r"nothing new was committed, and 7 steps had to be done again: .* 30.0 s were given", notes)


def test_the_documentation_names_every_scenario() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/rehearse-a-platform.md").read_text()
    for platform, grace_s in GRACES.items():
        assert f"`{platform}`" in page
        for one in scenarios(platform, grace_s):
            assert f"| {one.name} |" in page, one.name
