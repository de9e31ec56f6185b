"""What the doctor makes of a metadata service, over real HTTP on loopback."""

import contextlib
import email.utils
import http.server
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from spotguard.ops.doctor import Finding, examine_clock
from spotguard.ops.doctor.asking import Asked, ask
from spotguard.ops.doctor.metadata import examine_metadata

Reply = tuple[int, str] | tuple[int, str, dict[str, str]] | None
"""Status, body, headers; None never answers."""
Service = Callable[[str, str, dict[str, str]], Reply]


@contextlib.contextmanager
def serving(service: Service, *, ahead_s: float = 0.0) -> Iterator[str]:
    """A server that answers by a function of method, path and headers, with a clock of its own."""
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            reply = service(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            if reply is None:
                over.wait(30)
                return
            body = reply[1].encode()
            self.send_response(reply[0])
            for name, value in (reply[2] if len(reply) == 3 else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = answer  # noqa: N815 - names that http.server looks for

        def date_time_string(self, timestamp: float | None = None) -> str:
            return email.utils.formatdate(time.time() + ahead_s, usegmt=True)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()


NOWHERE = "http://127.0.0.1:1"


def aws(service: Service, *, ahead_s: float = 0.0) -> Asked:
    with serving(service, ahead_s=ahead_s) as base:
        return examine_metadata("aws", {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"{base}/"})


def by_check(asked: Asked) -> dict[str, Finding]:
    return {finding.check: finding for finding in asked.findings}


def imds(
    method: str,
    path: str,
    headers: dict[str, str],
    *,
    v1: bool = True,
    kind: str = "spot",
    items: Mapping[str, str] | None = None,
) -> Reply:
    """EC2's, in order."""
    if method == "PUT":
        return (200, "TOKEN") if headers.get("x-aws-ec2-metadata-token-ttl-seconds") else (400, "")
    if headers.get("x-aws-ec2-metadata-token") != "TOKEN" and not v1:
        return 401, ""
    known = {"instance-life-cycle": kind, "instance-id": "i-0123", **(items or {})}
    body = known.get(path.removeprefix("/latest/meta-data/"), "")
    return (200, body) if body else (404, "")


def test_ec2_that_answers_is_fine() -> None:
    found = by_check(aws(lambda *request: imds(*request, v1=False)))
    assert {check: finding.level for check, finding in found.items()} == {"metadata": "ok", "machine": "ok"}
    assert "IMDSv2" in found["metadata"].what


def test_imdsv1_beside_it_is_worth_a_word() -> None:
    assert by_check(aws(imds))["imds"].level == "info"


MAINTENANCE = """[{"NotBefore": "21 Jan 2029 09:00:43 GMT", "Code": "system-reboot", "State": "%s"}]"""


@pytest.mark.parametrize(
    ("path", "body", "what"),
    [
        ("spot/instance-action", '{"action": "terminate"}', "terminate"),
        ("events/recommendations/rebalance", '{"noticeTime": "2029-10-27T08:22:00Z"}', "rebalance"),
        ("autoscaling/target-lifecycle-state", "Terminated", "Auto Scaling"),
        ("events/maintenance/scheduled", MAINTENANCE % "active", "system-reboot not before 21 Jan 2029"),
    ],
)
def test_a_notice_that_stands_is_said(path: str, body: str, what: str) -> None:
    found = by_check(aws(lambda *request: imds(*request, items={path: body})))
    assert found["notice"].level == "warning"
    assert what in found["notice"].what


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("events/maintenance/scheduled", "[]"),
        ("events/maintenance/scheduled", MAINTENANCE % "completed"),
        ("events/maintenance/scheduled", "no JSON"),
    ],
)
def test_what_is_no_notice_is_not_said(path: str, body: str) -> None:
    assert "notice" not in by_check(aws(lambda *request: imds(*request, items={path: body})))


def test_an_auto_scaling_group_is_said() -> None:
    found = by_check(aws(lambda *request: imds(*request, items={"autoscaling/target-lifecycle-state": "InService"})))
    assert found["group"].level == "ok"


@pytest.mark.parametrize(("mode", "fix"), [("", "ENDPOINT_MODE=ipv6"), ("ipv6", "unset")])
def test_a_service_that_answers_at_its_other_address_only_is_found(mode: str, fix: str) -> None:
    with serving(imds) as base:
        addresses = {"": NOWHERE, "ipv6": base} if not mode else {"": base, "ipv6": NOWHERE}
        environment = {"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": mode}
        found = by_check(examine_metadata("aws", environment, ec2=addresses))
    assert found["metadata"].level == "problem"
    assert fix in found["metadata"].fix


def test_a_machine_that_nobody_preempts_is_said() -> None:
    assert by_check(aws(lambda *request: imds(*request, kind="on-demand")))["machine"].level == "info"


def test_a_token_that_does_not_come_back_is_the_hop_limit() -> None:
    found = by_check(aws(lambda method, path, headers: None if method == "PUT" else imds(method, path, headers)))
    assert found["hop-limit"].level == "warning"
    assert "--instance-id i-0123 --http-put-response-hop-limit 2" in found["hop-limit"].fix


def test_a_token_that_does_not_come_back_where_imdsv1_is_off_is_a_problem() -> None:
    found = by_check(aws(lambda method, path, headers: None if method == "PUT" else (401, "")))
    assert found["hop-limit"].level == "problem"


def test_a_service_that_is_switched_off_is_a_problem() -> None:
    found = by_check(aws(lambda *request: (403, "")))
    assert found["metadata"].level == "problem"
    assert "--http-endpoint enabled" in found["metadata"].fix


def test_a_service_without_tokens_is_read_by_imdsv1() -> None:
    found = by_check(aws(lambda method, *rest: (405, "") if method == "PUT" else imds(method, *rest)))
    assert found["metadata"].level == "ok"
    assert "IMDSv1" in found["metadata"].what


def test_nobody_there_is_a_problem() -> None:
    for cloud in ("aws", "google", "azure"):
        names = ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST", "SPOTGUARD_AZURE_ENDPOINT")
        found = examine_metadata(cloud, dict.fromkeys(names, NOWHERE)).findings
        assert [finding.level for finding in found] == ["problem"], cloud


def test_no_cloud_asks_nobody() -> None:
    assert examine_metadata(None).findings == []


def google(
    path: str,
    headers: dict[str, str],
    *,
    preempted: str = "FALSE",
    maintenance: str = "NONE",
    flavor: str = "Google",
) -> Reply:
    if headers.get("metadata-flavor") != "Google":
        return 403, ""
    known = {"preempted": preempted, "maintenance-event": maintenance, "scheduling/preemptible": "TRUE"}
    body = known.get(path.removeprefix("/computeMetadata/v1/instance/"), "")
    return (200 if body else 404), body, {"Metadata-Flavor": flavor}


@pytest.mark.parametrize(
    ("answers", "levels"),
    [
        ({}, {"metadata": "ok", "machine": "ok"}),
        ({"preempted": "TRUE"}, {"metadata": "ok", "notice": "warning", "machine": "ok"}),
        ({"maintenance": "TERMINATE_ON_HOST_MAINTENANCE"}, {"metadata": "ok", "notice": "warning", "machine": "ok"}),
        ({"flavor": "a captive portal"}, {"metadata": "problem"}),
    ],
)
def test_google_is_asked_in_its_own_way(answers: dict[str, str], levels: dict[str, str]) -> None:
    with serving(lambda _, path, headers: google(path, headers, **answers)) as base:
        found = by_check(examine_metadata("google", {"GCE_METADATA_HOST": base.removeprefix("http://")}))
    assert {check: finding.level for check, finding in found.items()} == levels


def azure(path: str, headers: dict[str, str], *, events: Reply = (200, '{"Events": []}')) -> Reply:
    if headers.get("metadata") != "true":
        return 400, ""
    return events if "scheduledevents" in path else (200, '{"priority": "Spot", "name": "vm"}')


@pytest.mark.parametrize(
    ("events", "level"),
    [((200, '{"Events": []}'), "ok"), (None, "info"), ((429, ""), "warning")],
    ids=["ok", "late", "busy"],
)
def test_azures_scheduled_events_may_take_two_minutes_to_begin(events: Reply, level: str) -> None:
    with serving(lambda _, path, headers: azure(path, headers, events=events)) as base:
        found = by_check(examine_metadata("azure", {"SPOTGUARD_AZURE_ENDPOINT": base}))
    assert {check: finding.level for check, finding in found.items()} == {
        "metadata": "ok",
        "machine": "ok",
        "events": level,
    }


EVENT = '{"Events": [{"EventType": "%s", "EventStatus": "Scheduled", "Resources": ["%s"], "NotBefore": ""}, null]}'


@pytest.mark.parametrize(("name", "notices"), [("VM", ["a notice of Azure stands: Preempt"]), ("vm-2", [])])
def test_an_event_that_is_about_this_machine_is_a_notice_and_one_about_another_is_not(
    name: str, notices: list[str]
) -> None:
    with serving(lambda _, path, headers: azure(path, headers, events=(200, EVENT % ("Preempt", name)))) as base:
        found = examine_metadata("azure", {"SPOTGUARD_AZURE_ENDPOINT": base}).findings
    assert [finding.what for finding in found if finding.check == "notice"] == notices


def test_a_redirect_is_not_followed_and_a_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def service(method: str, path: str, headers: dict[str, str]) -> Reply:
        asked.append(path)
        return 302, "", {"Location": "/elsewhere"}

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving(service) as base:
        assert ask(base, "/here").status == 302
    assert asked == ["/here"]


@pytest.mark.parametrize(("ahead_s", "level"), [(0.0, "ok"), (10.0, "warning"), (-100.0, "problem")])
def test_a_clock_that_is_off_shortens_the_two_minutes(ahead_s: float, level: str) -> None:
    found = aws(imds, ahead_s=ahead_s)
    assert found.skew_s is not None
    finding = examine_clock(None, found.skew_s)
    assert finding.level == level
    if ahead_s:
        assert ("behind" in finding.what) == (ahead_s > 0)


def test_without_anybody_to_ask_the_clock_is_not_known() -> None:
    assert examine_clock(None, None).level == "info"
