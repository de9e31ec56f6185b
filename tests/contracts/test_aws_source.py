"""What the instance metadata service of EC2 has of its own."""

import datetime as dt
import email.utils
import json
import time

import pytest

from contracts.sources import SOON, Listen, left
from spotguard.guard.budget import Budget
from spotguard.notices import AwsSource
from spotguard.notices.metadata import MetadataClient
from spotguard.notices.platforms import Platform
from spotguard.testing.metadata import FakeAws, Reply, Request


def test_a_wall_clock_that_is_off_changes_nothing_where_the_service_says_what_time_it_is(
    listen: Listen,
) -> None:
    """The notice of 120 s is by a clock that is three minutes behind ours."""

    class Behind(FakeAws):
        def answer(self, request: Request) -> Reply:
            reply = super().answer(request)
            now = dt.datetime.now(dt.timezone.utc) - dt.timedelta(minutes=3)
            return reply._replace(headers={**reply.headers, "Date": email.utils.format_datetime(now, usegmt=True)})

    with Behind() as aws:
        aws.interrupt(in_s=120 - 180)
        notice = listen(AwsSource(aws.endpoint, SOON)).wait()
    assert 115 < left(notice) <= 121
    assert notice.firm


def test_the_deadline_is_the_time_of_the_notice(aws: FakeAws, listen: Listen) -> None:
    aws.interrupt("stop", in_s=90)
    notice = listen(AwsSource(aws.endpoint, SOON)).wait()
    assert 85 < left(notice) <= 91
    assert "spot stop at" in notice.detail


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ('{"action": "terminate"}', 119, 121),
        ('{"action": "terminate", "time": "soon"}', 119, 121),
        ('{"action": "terminate", "time": 7}', 119, 121),
        ("not JSON at all", 119, 121),
        ('{"action": "hibernate", "time": "2099-09-18T08:22:00Z"}', 0, 1),
    ],
)
def test_whatever_stands_there_is_a_notice(aws: FakeAws, listen: Listen, text: str, least: float, most: float) -> None:
    aws.items["spot/instance-action"] = text
    notice = listen(AwsSource(aws.endpoint, SOON)).wait()
    assert least - 0.5 <= left(notice) <= most


def test_a_notice_of_long_ago_that_still_stands_is_passed_over_with_one_warning(
    aws: FakeAws, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    aws.interrupt(in_s=-660)  # EC2 has not done it
    listening = listen(AwsSource(aws.endpoint, SOON))
    aws.wait_for(6, "instance-action")
    assert listening.heard == []
    assert sum("still stands" in record.getMessage() for record in caplog.records) == 1
    aws.interrupt(in_s=60)
    assert listening.wait().action == "stop"


@pytest.mark.parametrize(
    "text",
    [
        '{"action": "terminate", "time": "TIME"}',
        '{"action": "hibernate", "time": "TIME"}',
        '{"action": "terminate"}',
    ],
)
def test_what_is_due_already_or_is_a_guess_binds_nobody(aws: FakeAws, listen: Listen, text: str) -> None:
    instant = dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=20)
    aws.items["spot/instance-action"] = text.replace("TIME", instant.isoformat(timespec="seconds"))
    notice = listen(AwsSource(aws.endpoint, SOON)).wait()
    assert not notice.firm
    deadline = Budget(Platform("aws")).deadline_of(notice)
    assert deadline is not None
    assert not deadline.firm


def test_one_that_lies_ahead_is_firm(aws: FakeAws, listen: Listen) -> None:
    aws.interrupt(in_s=60)
    deadline = Budget(Platform("aws")).deadline_of(listen(AwsSource(aws.endpoint, SOON)).wait())
    assert deadline is not None
    assert deadline.firm


@pytest.mark.parametrize(
    ("path", "status"),
    [("rebalance", 500), ("rebalance", 403), ("target-lifecycle-state", 403), ("maintenance", 503), ("termination", 0)],
)
def test_trouble_with_one_path_puts_off_no_other(listen: Listen, path: str, status: int) -> None:
    class Partly(FakeAws):
        def answer(self, request: Request) -> Reply:
            if path not in request.path:
                return super().answer(request)
            return Reply(status) if status else Reply(200, "no time at all")

    with Partly() as aws:
        listening = listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(20, "instance-action")
        assert sum(path in one.path for one in aws.requests) < 10
        aws.interrupt()
        assert listening.wait().kind == "preemption"


def test_the_notice_of_older_services_is_heard_where_there_is_no_other(aws: FakeAws, listen: Listen) -> None:
    instant = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=100)
    aws.items["spot/termination-time"] = instant.isoformat(timespec="seconds").replace("+00:00", "Z")
    listening = listen(AwsSource(aws.endpoint, SOON))
    assert 95 < left(listening.wait()) <= 101


def test_with_both_the_newer_one_is_heard(aws: FakeAws, listen: Listen) -> None:
    aws.interrupt(in_s=100)
    aws.items["spot/termination-time"] = json.loads(aws.items["spot/instance-action"])["time"]
    listening = listen(AwsSource(aws.endpoint, SOON))
    aws.wait_for(2, "termination-time")
    assert [one.detail.partition(" at")[0] for one in listening.heard] == ["EC2: spot terminate"]


def test_a_token_that_is_still_good_is_used_while_there_is_no_new_one(listen: Listen) -> None:
    class Stingy(FakeAws):
        def answer(self, request: Request) -> Reply:
            if request.method == "PUT" and self._tokens:
                return Reply(503)
            return super().answer(request)

    with Stingy() as aws:
        aws.lifetime_s = 50  # less than the minute that is kept in hand
        listening = listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(6, "instance-action")
        aws.interrupt()
        assert listening.wait().action == "stop"


@pytest.mark.parametrize("given", ["0.3", "soon", "-1", "nan"])
def test_the_patience_of_botocore_is_taken_over_where_it_makes_sense(
    listen: Listen, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    monkeypatch.setenv("AWS_METADATA_SERVICE_TIMEOUT", given)
    monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "2")
    with FakeAws(v2_only=False, hop_limit_hang=given == "0.3") as aws:
        began = time.monotonic()
        AwsSource(aws.endpoint).get("instance-type")
        assert (time.monotonic() - began) < 2.0
        asked = [one.method for one in aws.requests]
    assert asked == (["PUT", "PUT", "GET"] if given == "0.3" else ["PUT", "GET"])
    assert ("AWS_METADATA_SERVICE_TIMEOUT" in caplog.text) is (given != "0.3")


def test_an_expired_token_is_renewed_and_the_question_asked_again(aws: FakeAws, listen: Listen) -> None:
    listening = listen(AwsSource(aws.endpoint, SOON))
    aws.wait_for(5)
    aws.retire_tokens()
    aws.interrupt()
    assert listening.wait().action == "stop"
    assert sum(one.method == "PUT" for one in aws.requests) == 2


def test_a_token_is_renewed_before_it_expires(aws: FakeAws, listen: Listen) -> None:
    aws.lifetime_s = 30  # less than the minute that is kept in hand
    listen(AwsSource(aws.endpoint, SOON))
    aws.wait_for(3, "/latest/api/token")


def test_a_service_that_is_switched_off_is_told_of_once_and_asked_again_much_later(
    listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeAws(off=True) as aws:
        listening = listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(2)
        time.sleep(10 * SOON)
        assert len(aws.requests) == 2  # for a token, and without one
        assert listening.heard == []
    assert sum("switched off" in record.getMessage() for record in caplog.records) == 1


def test_one_that_is_switched_on_again_is_heard(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("aws", "imds"):
        monkeypatch.setattr(f"spotguard.notices.{module}.OFF_S", 10 * SOON)
    with FakeAws(off=True) as aws:
        listening = listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(4)
        assert listening.heard == []
        aws.interrupt()
        aws.off = False
        assert listening.wait().action == "stop"


def test_where_tokens_hang_the_first_version_is_asked(listen: Listen) -> None:
    with FakeAws(v2_only=False, hop_limit_hang=True) as aws:
        aws.interrupt()
        assert listen(AwsSource(aws.endpoint, SOON)).wait().action == "stop"


def test_where_tokens_hang_and_are_needed_the_hop_limit_is_told_of(
    listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeAws(hop_limit_hang=True) as aws:
        listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(1, "instance-action")
        until = time.monotonic() + 10
        while "http-put-response-hop-limit 2" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
    assert "http-put-response-hop-limit 2" in caplog.text


def test_without_the_first_version_nothing_is_asked_without_a_token(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_V1_DISABLED", "true")
    with FakeAws(v2_only=False) as aws:
        aws.fail_next(404, times=3)
        listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(4)
        asked = [one.method for one in aws.requests[:4]]
    assert asked == ["PUT"] * 4


def test_the_variables_that_botocore_reads_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AwsSource()._imds.client.base == "http://169.254.169.254"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6")
    assert AwsSource()._imds.client.base == "http://[fd00:ec2::254]"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1338/")
    assert AwsSource()._imds.client.base == "http://127.0.0.1:1338/"


def test_where_it_is_disabled_nothing_is_asked(aws: FakeAws, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", aws.endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "True")
    listening = listen(AwsSource(interval=SOON))
    assert listening.ends()
    assert aws.requests == []


def test_advice_to_rebalance_is_a_save(aws: FakeAws, listen: Listen) -> None:
    aws.rebalance()
    notice = listen(AwsSource(aws.endpoint, SOON)).wait()
    assert (notice.kind, notice.action, notice.deadline) == ("rebalance", "save", None)


def test_maintenance_is_a_save_and_may_be_completed(aws: FakeAws, listen: Listen) -> None:
    aws.maintain("system-reboot", in_s=3600)
    listening = listen(AwsSource(aws.endpoint, SOON))
    notice = listening.wait()
    assert (notice.kind, notice.action) == ("maintenance", "save")
    assert 3590 < left(notice) <= 3601
    aws.items["events/maintenance/scheduled"] = aws.items["events/maintenance/scheduled"].replace("active", "completed")
    assert listening.wait(2).action == "withdrawn"


def test_auto_scaling_that_takes_the_instance_is_a_notice_without_a_time_to_train_through(
    aws: FakeAws, listen: Listen
) -> None:
    aws.items["autoscaling/target-lifecycle-state"] = "Terminated"
    listening = listen(AwsSource(aws.endpoint, SOON))
    notice = listening.wait()
    assert (notice.kind, notice.action, notice.deadline) == ("maintenance", "stop", None)
    aws.items["autoscaling/target-lifecycle-state"] = "InService"
    assert listening.wait(2).action == "withdrawn"


def test_the_fake_refuses_what_ec2_refuses(aws: FakeAws) -> None:
    client = MetadataClient(aws.endpoint)
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    assert client.ask("PUT", "/latest/api/token").status == 400
    assert client.ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "99999"}).status == 400
    assert client.ask("PUT", "/2021-01-03/api/token", ttl).status == 403
    assert client.ask("PUT", "/latest/api/token", {**ttl, "X-Forwarded-For": "10.0.0.1"}).status == 403
    assert client.get("/latest/meta-data/instance-type").status == 401
    token = client.ask("PUT", "/latest/api/token", ttl).text
    assert client.get("/latest/meta-data/instance-type", {"X-aws-ec2-metadata-token": token}).text == "g5.xlarge"


def test_a_wall_clock_that_jumps_afterwards_changes_no_deadline(
    aws: FakeAws, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.interrupt(in_s=120)
    listening = listen(AwsSource(aws.endpoint, SOON))
    listening.wait()
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + 86400)
    aws.wait_for(len(aws.requests) + 6)
    assert len(listening.heard) == 1
    assert left(listening.heard[0]) > 100
