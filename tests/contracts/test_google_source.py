"""What the metadata server of Compute Engine has of its own."""

import time

import pytest

from contracts.sources import SOON, Listen, Raw
from spotguard.notices import GoogleSource
from spotguard.notices.metadata import MetadataClient
from spotguard.testing._service import Service as Fake
from spotguard.testing.metadata import FakeGoogle, Reply, Request


def test_a_change_is_heard_by_the_poll_that_waits_for_it(google: FakeGoogle, listen: Listen) -> None:
    listening = listen(GoogleSource(google.address))
    google.wait_for(2, "preempted")  # the second waits
    assert google.requests[-1].query.get("timeout_sec") == ["60"] or len(google.requests) > 2
    google.preempt()
    notice = listening.wait()
    assert (notice.grace, notice.deadline) == (30.0, None)


def test_the_duration_of_the_notice_is_added(google: FakeGoogle, listen: Listen) -> None:
    google.preempt()
    assert listen(GoogleSource(google.address, notice_duration=120)).wait().grace == 150.0


@pytest.mark.parametrize("value", ["MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"])
def test_maintenance_of_the_host_is_a_save_and_may_be_withdrawn(google: FakeGoogle, listen: Listen, value: str) -> None:
    listening = listen(GoogleSource(google.address, floor=SOON))
    google.maintain(value)
    assert (listening.wait().kind, listening.wait().action) == ("maintenance", "save")
    google.maintain("NONE")
    assert listening.wait(2).action == "withdrawn"


def test_a_key_that_is_not_there_yet_is_asked_for_seldom_and_heard_when_it_is(
    google: FakeGoogle, listen: Listen
) -> None:
    google.put("preempted", None)
    google.put("maintenance-event", None)
    listening = listen(GoogleSource(google.address, floor=SOON))
    google.wait_for(6)
    google.preempt()
    assert listening.wait().kind == "preemption"


def test_how_often_a_key_may_be_missing_can_be_set(
    google: FakeGoogle, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCE_METADATA_DETECT_RETRIES", "1")
    google.put("preempted", None)
    google.put("maintenance-event", None)
    listen(GoogleSource(google.address, floor=0.5))
    google.wait_for(2)
    time.sleep(0.8)
    assert len(google.requests) == 2


def test_an_answer_of_somebody_else_is_no_news(listen: Listen) -> None:
    class Portal(Fake):
        def answer(self, request: Request) -> Reply:
            return Reply(200, "TRUE")

    with Portal() as portal:
        listening = listen(GoogleSource(portal.address, floor=SOON))
        portal.wait_for(4)
        assert listening.heard == []


def test_a_server_that_does_not_wait_is_not_asked_in_a_hurry(google: FakeGoogle, listen: Listen) -> None:
    google._second_s = 0.0  # answers a long poll at once
    listen(GoogleSource(google.address, floor=0.5))
    google.wait_for(4)
    time.sleep(0.2)
    assert len(google.requests) <= 6


def test_where_the_name_of_the_server_is_not_known_its_address_is_asked(
    google: FakeGoogle, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _, port = google.address.partition(":")
    monkeypatch.setattr("spotguard.notices.google._NAME", f"nobody.invalid:{port}")
    monkeypatch.setattr("spotguard.notices.google._ADDRESS", host)
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"):
        monkeypatch.delenv(name, raising=False)
    google.preempt()
    assert listen(GoogleSource(floor=SOON)).wait().kind == "preemption"
    assert google.requests[0].headers["host"] == f"nobody.invalid:{port}"


def test_the_patience_of_googles_library_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_TIMEOUT", "0.2")
    with Raw(b"", hold=True) as raw, pytest.raises(TimeoutError):
        GoogleSource(raw.endpoint.removeprefix("http://")).get("instance/zone")


def test_a_mode_that_is_not_supported_is_told_of(
    google: FakeGoogle,
    listen: Listen,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("GCE_METADATA_MTLS_MODE", "strict")
    listen(GoogleSource(google.address))
    google.wait_for(1)
    assert "GCE_METADATA_MTLS_MODE=strict is not supported" in caplog.text


def test_the_fake_refuses_what_google_refuses(google: FakeGoogle) -> None:
    client, path = MetadataClient(google.endpoint), "/computeMetadata/v1/instance/preempted"
    flavor = {"Metadata-Flavor": "Google"}
    assert client.get(path).status == 403
    assert client.get(path, {**flavor, "X-Forwarded-For": "10.0.0.1"}).status == 403
    assert client.get("/computeMetadata/v1/instance/nothing", flavor).status == 404
    found = client.get(path, flavor)
    assert (found.status, found.text, found.headers["metadata-flavor"]) == (200, "FALSE", "Google")
    google._second_s = 0.01
    again = client.get(f"{path}?wait_for_change=true&timeout_sec=5&last_etag={found.headers['etag']}", flavor)
    assert (again.status, again.text) == (200, "FALSE"), "on timeout the value, unchanged"
    assert client.get(f"{path}?wait_for_change=true&timeout_sec=500000&last_etag=NONE", flavor).status == 200
