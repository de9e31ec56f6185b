"""Where we are running, told without the network, and how long it leaves us."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from spotguard.guard.budget import Budget, Outlook
from spotguard.guard.options import Options, read_options
from spotguard.notices import NoticeWatcher, PreemptionNotice
from spotguard.notices.platforms import Platform, auto_sources, detect_platform, reserve_of

AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"


def machine(folder: Path, **strings: str) -> Path:
    for name, text in strings.items():
        (folder / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("strings", "cloud"),
    [
        ({"sys_vendor": "Amazon EC2", "product_name": "g5.xlarge"}, "aws"),
        ({"sys_vendor": "Xen", "product_version": "4.11.amazon"}, "aws"),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, "google"),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": AZURE_TAG}, "azure"),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "none"}, None),  # plain Hyper-V
        ({"sys_vendor": "QEMU"}, None),
        ({}, None),
    ],
)
def test_the_cloud_is_known_by_what_the_firmware_says(
    tmp_path: Path, strings: dict[str, str], cloud: str | None
) -> None:
    assert detect_platform({}, dmi=machine(tmp_path, **strings)).cloud == cloud


@pytest.mark.parametrize(
    ("environment", "cloud"),
    [
        ({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1338/"}, "aws"),
        ({"GCE_METADATA_HOST": "127.0.0.1:80"}, "google"),
        ({"SPOTGUARD_AZURE_ENDPOINT": "http://127.0.0.1:1"}, "azure"),
        ({"AWS_EC2_METADATA_DISABLED": "TRUE"}, None),
    ],
)
def test_the_environment_comes_before_the_firmware(
    tmp_path: Path, environment: dict[str, str], cloud: str | None
) -> None:
    assert detect_platform(environment, dmi=machine(tmp_path, sys_vendor="Amazon EC2")).cloud == cloud


def test_a_metadata_service_that_is_switched_off_is_not_asked_but_the_machine_still_has_its_grace(
    tmp_path: Path,
) -> None:
    found = detect_platform({"NO_GCE_CHECK": "true"}, dmi=machine(tmp_path, product_name="Google Compute Engine"))
    assert (found.cloud, found.grace_s) == (None, 30.0)


@pytest.mark.parametrize(
    ("environment", "title", "grace"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "Kubernetes", 30.0),
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun", 30.0),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, "torchrun", 90.0),
        ({"SLURM_JOB_ID": "7"}, "SLURM", 30.0),
        ({"TRAINING_JOB_NAME": "x"}, "SageMaker", 120.0),
        ({"AWS_BATCH_JOB_ID": "x"}, "AWS Batch", 30.0),
        ({"RUNPOD_POD_ID": "x", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "RunPod", 5.0),
    ],
)
def test_the_shortest_grace_of_all_layers_counts(environment: dict[str, str], title: str, grace: float) -> None:
    found = detect_platform(environment, dmi=Path("/nowhere"))
    assert found.tightest is not None
    assert (found.tightest.title, found.grace_s) == (title, grace)


def test_a_pod_on_a_spot_vm_of_google_has_half_of_its_grace(tmp_path: Path) -> None:
    dmi = machine(tmp_path, product_name="Google Compute Engine")
    assert detect_platform({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, dmi=dmi).grace_s == 15.0


def test_slurm_may_send_other_signals() -> None:
    assert detect_platform({"SLURM_JOB_ID": "7"}, dmi=Path("/nowhere")).signals == ("SIGUSR1", "SIGUSR2")
    assert detect_platform({}, dmi=Path("/nowhere")).signals == ()


def test_one_process_of_a_node_polls() -> None:
    for platform in (Platform("aws"), Platform("google"), Platform("azure")):
        assert len(auto_sources(platform, {"LOCAL_RANK": "0"})) == len(auto_sources(platform, {})) == 1
        assert auto_sources(platform, {"LOCAL_RANK": "1"}) == ()
        assert auto_sources(platform, {"LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}) == ()
    assert auto_sources(Platform(), {}) == ()


@pytest.mark.parametrize("size", ["WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_process_that_is_alone_polls_whatever_rank_is_left_over_in_its_environment(size: str) -> None:
    assert len(auto_sources(Platform("aws"), {"LOCAL_RANK": "3", size: "1"})) == 1


def test_sagemaker_is_known_by_its_folder_too(tmp_path: Path) -> None:
    nowhere = Path("/nowhere")
    assert detect_platform({}, dmi=nowhere, sagemaker=tmp_path).title == "SageMaker"
    assert detect_platform({"TRAINING_JOB_NAME": "x"}, dmi=nowhere, sagemaker=tmp_path).title == "SageMaker"
    assert detect_platform({}, dmi=nowhere, sagemaker=tmp_path / "none").layers == ()


def test_where_the_platform_starts_again_what_it_has_interrupted_a_stop_is_no_failure() -> None:
    assert detect_platform({"TRAINING_JOB_NAME": "x"}, dmi=Path("/nowhere")).exit_code == 0
    for name in ("KUBERNETES_SERVICE_HOST", "SLURM_JOB_ID", "AWS_BATCH_JOB_ID", "TORCHELASTIC_RUN_ID"):
        assert detect_platform({name: "x"}, dmi=Path("/nowhere")).exit_code == 143
    assert detect_platform({}, dmi=Path("/nowhere")).exit_code == 143


@pytest.mark.parametrize(
    ("strings", "environment", "seconds"),
    [
        ({"sys_vendor": "Amazon EC2"}, {}, None),  # the machine's own shutdown, when the two minutes are over
        ({"chassis_asset_tag": AZURE_TAG}, {}, None),
        ({"product_name": "Google Compute Engine"}, {}, 30.0),
        ({"sys_vendor": "Amazon EC2"}, {"INVOCATION_ID": "x"}, 90.0),
        ({"product_name": "Google Compute Engine"}, {"INVOCATION_ID": "x"}, 30.0),
        ({"sys_vendor": "Amazon EC2"}, {"KUBERNETES_SERVICE_HOST": "x"}, 30.0),
        ({"product_name": "Google Compute Engine"}, {"KUBERNETES_SERVICE_HOST": "x"}, 15.0),
        ({"chassis_asset_tag": AZURE_TAG}, {"SLURM_JOB_ID": "x"}, 30.0),
        ({"sys_vendor": "Amazon EC2"}, {"TRAINING_JOB_NAME": "x"}, 120.0),
    ],
)
def test_a_signal_leaves_what_its_sender_leaves_and_not_the_lead_of_another_notice(
    tmp_path: Path, strings: dict[str, str], environment: dict[str, str], seconds: float | None
) -> None:
    found = detect_platform(environment, dmi=machine(tmp_path, **strings))
    assert found.signal_s == seconds
    deadline = Budget(found).deadline_of(notice(kind="signal", detail="SIGTERM"))
    assert deadline == (None if seconds is None else (1000.0 + seconds - reserve_of(seconds), False))


@pytest.mark.parametrize(
    ("strings", "said"),
    [
        ({"sys_vendor": "Amazon EC2"}, "below EC2's two minutes"),
        ({"product_name": "Google Compute Engine"}, "GKE leaves pods on spot VMs 15 s"),
    ],
)
def test_a_pod_cannot_have_more_than_its_machine(tmp_path: Path, strings: dict[str, str], said: str) -> None:
    found = detect_platform({"KUBERNETES_SERVICE_HOST": "x"}, dmi=machine(tmp_path, **strings))
    assert found.tightest is not None
    assert said in found.tightest.lengthen


# -- how long we have --------------------------------------------------------------------------------------------------------------


def notice(**fields: Any) -> PreemptionNotice:
    given = {"source": "s", "kind": "preemption", "detail": "d", "received": 1000.0, **fields}
    return PreemptionNotice(**given)


GCE = detect_platform({"GCE_METADATA_HOST": "x"}, dmi=Path("/nowhere"))


@pytest.mark.parametrize(
    ("budget", "heard", "deadline"),
    [
        (Budget(GCE), notice(deadline=1120.0), (1110.0, True)),
        (Budget(GCE), notice(deadline=1120.0, firm=False), (1110.0, False)),
        (Budget(GCE, grace_s=12.0), notice(deadline=1120.0, firm=False), (1010.0, True)),
        (Budget(GCE, grace_s=150.0), notice(deadline=1000.0, firm=False), (1000.0, False)),
        (Budget(GCE), notice(grace=150.0), (1140.0, False)),
        (Budget(GCE), notice(), (1025.0, False)),
        (Budget(GCE, grace_s=12.0), notice(), (1010.0, True)),
        (Budget(GCE, grace_s=12.0), notice(deadline=1120.0), (1010.0, True)),
        (Budget(GCE, grace_s=150.0), notice(grace=30.0), (1140.0, True)),
        (
            Budget(GCE),
            notice(deadline=990.0),
            (990.0, False),
        ),  # in the past: it was wrong, or the end may come at any moment
        (Budget(GCE), notice(deadline=1000.0), (1000.0, False)),
        (Budget(Platform()), notice(), None),
        (Budget(GCE), notice(action="save", deadline=1120.0), None),
        (Budget(GCE, grace_s=12.0), notice(kind="signal", detail="SIGINT"), None),  # a person, who can wait
        (Budget(GCE, grace_s=12.0), notice(kind="request"), None),
    ],
)
def test_the_deadline_is_the_notices_own_else_the_users_else_that_of_the_platform(
    budget: Budget, heard: PreemptionNotice, deadline: tuple[float, bool] | None
) -> None:
    assert budget.deadline_of(heard) == deadline


def test_several_notices_come_to_the_earliest_deadline_and_to_a_window_only_if_all_leave_one() -> None:
    now = time.monotonic()
    reboot = notice(kind="maintenance", received=now, deadline=now + 900)
    reclaimed = notice(received=now, deadline=now + 120)
    preempted = notice(received=now, grace=150.0)
    terminated = notice(received=now)
    sigterm = notice(kind="signal", detail="SIGTERM", received=now)
    interrupt = notice(kind="signal", detail="SIGINT", received=now)
    hint = notice(kind="rebalance", action="save", received=now, deadline=now + 1)
    passed = notice(received=now - 300, deadline=now - 180)
    outlook = Budget(GCE).outlook
    assert outlook([]) == outlook([hint]) == Outlook()
    assert outlook([reboot]) == Outlook(now + 890, now + 890, window=True, stop=True)
    assert outlook([reboot, hint, reclaimed]) == Outlook(now + 110, now + 110, window=True, stop=True)
    assert outlook([preempted]) == Outlook(now + 140, None, window=True, stop=True)
    assert outlook([terminated]) == Outlook(now + 25, None, window=False, stop=True)
    assert outlook([reclaimed, sigterm]) == Outlook(now + 25, now + 110, window=False, stop=True)
    assert outlook([interrupt]) == Outlook(None, None, window=False, stop=True)
    assert outlook([interrupt, reclaimed]) == Outlook(now + 110, now + 110, window=False, stop=True)
    assert outlook([passed]) == Outlook(now - 190, None, window=True, stop=True), "and we are still here"
    assert Budget(GCE, grace_s=60.0).outlook([reclaimed, sigterm]) == Outlook(now + 50, now + 50, stop=True)


def test_who_waits_for_us_is_named_first() -> None:
    budget = Budget(GCE)
    ordered = [
        notice(kind="signal", detail="SIGTERM"),
        notice(kind="signal", detail="SIGINT"),
        notice(deadline=1030.0),
        notice(deadline=1900.0),
        notice(action="save", deadline=1010.0),
    ]
    mixed = [ordered[index] for index in (3, 1, 4, 0, 2)]
    assert sorted(mixed, key=budget.urgency) == ordered


def test_the_reserve_is_a_sixth_and_at_most_ten_seconds() -> None:
    assert [reserve_of(left) for left in (120.0, 60.0, 30.0, 0.0, -5.0)] == [10.0, 10.0, 5.0, 0.0, 0.0]


# -- settings ----------------------------------------------------------------------------------------------------------------------


def options(**given: Any) -> Options:
    return read_options(
        "memory://platforms", **{"every": None, "keep": None, "notices": None, "exit_code": None} | given
    )


def test_the_sources_that_fit_are_started_and_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("SPOTGUARD_NOTICES", raising=False)
    assert [source.name for source in options().sources] == ["aws"]
    assert options(notices="none").sources == ()
    assert options(notices=[]).sources == ()
    assert [source.name for source in options(notices=["auto"]).sources] == ["aws"]
    monkeypatch.setenv("SPOTGUARD_NOTICES", "none")
    assert options().sources == ()


def test_the_grace_is_a_duration_from_code_or_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options(grace="1m30s").grace_s == 90.0
    assert options().grace_s is None
    monkeypatch.setenv("SPOTGUARD_GRACE", "45s")
    assert options().grace_s == 45.0
    monkeypatch.setenv("SPOTGUARD_GRACE", "soon")
    with pytest.raises(ValueError, match="SPOTGUARD_GRACE='soon'"):
        options()


def test_the_exit_status_is_the_platforms_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPOTGUARD_EXIT_CODE", raising=False)
    assert options().exit_code == 143
    monkeypatch.setenv("TRAINING_JOB_NAME", "x")
    assert options().exit_code == 0
    assert options(exit_code=85).exit_code == 85
    monkeypatch.setenv("SPOTGUARD_EXIT_CODE", "99")
    assert options().exit_code == 99
    with (
        pytest.raises(ValueError, match="exit_code=0: must be 1 to 255"),
        pytest.warns(UserWarning, match="is ignored"),
    ):
        options(exit_code=0)


# -- the slot for notices ----------------------------------------------------------------------------------------------------------


def test_a_stop_comes_before_a_save_and_the_earliest_deadline_before_the_others() -> None:
    watcher = NoticeWatcher(lambda _: None)
    for heard in (
        notice(source="hint", action="save", deadline=1.0),
        notice(source="late", deadline=1120.0),
        notice(source="early", deadline=1030.0),
        notice(source="whenever"),
    ):
        watcher.emit(heard)
    assert watcher.notice is not None
    assert watcher.notice.source == "early"


def test_a_notice_that_is_heard_again_is_no_news_unless_its_deadline_has_changed() -> None:
    heard: list[PreemptionNotice] = []
    watcher = NoticeWatcher(heard.append)
    for deadline in (1120.0, 1120.4, 1119.8, 1060.0, 1060.0):
        watcher.emit(notice(id="terminate", deadline=deadline))
    assert [one.deadline for one in heard] == [1120.0, 1060.0]


def test_a_notice_without_an_id_is_news_only_where_it_is_more_urgent() -> None:
    heard: list[PreemptionNotice] = []
    watcher = NoticeWatcher(heard.append)
    for deadline in (1120.0, 1120.0, 1121.0, 1119.5, 1300.0, None, 1060.0, 1060.0):
        watcher.emit(notice(deadline=deadline))
    watcher.emit(notice(action="save"))
    assert [one.deadline for one in heard] == [1120.0, 1060.0]
    assert watcher.standing == (heard[1],)


def test_what_is_withdrawn_uncovers_what_stood_behind_it() -> None:
    watcher = NoticeWatcher(lambda _: None)
    watcher.emit(notice(id="first", deadline=1030.0))
    watcher.emit(notice(id="second", deadline=1120.0))
    watcher.emit(notice(id="first", action="withdrawn"))
    assert watcher.notice is not None
    assert watcher.notice.id == "second"
    watcher.emit(notice(id="second", action="withdrawn"))
    assert watcher.notice is None


def test_a_withdrawal_of_what_was_never_heard_is_no_news() -> None:
    heard: list[PreemptionNotice] = []
    NoticeWatcher(heard.append).emit(notice(id="unknown", action="withdrawn"))
    assert heard == []


def test_a_save_that_is_made_is_not_asked_for_again_until_it_is_withdrawn_and_comes_back() -> None:
    watcher = NoticeWatcher(lambda _: None)
    hint = notice(id="rebalance", action="save")
    watcher.emit(hint)
    watcher.settle(hint)
    watcher.emit(hint)
    assert watcher.notice is None
    watcher.emit(notice(id="rebalance", action="withdrawn"))
    watcher.emit(hint)
    assert watcher.notice == hint


def test_nothing_of_this_machine_is_asked_over_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    detect_platform(dict(os.environ))
