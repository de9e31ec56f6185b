"""The metadata services that we ship answer as those of the clouds do."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

from spotguard.notices import AwsSource
from spotguard.notices.answers import parse_time
from spotguard.notices.metadata import Answer, MetadataClient
from spotguard.testing import FakeAws, FakeAzure, FakeGoogle

EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
COMPUTE = "/metadata/instance/compute"
INSTANCE = "/computeMetadata/v1/instance"


@pytest.fixture
def google() -> Iterator[FakeGoogle]:
    with FakeGoogle(second_s=0.01) as fake:
        yield fake


def ask_google(google: FakeGoogle, path: str) -> Answer:
    return MetadataClient(google.endpoint).get(f"{INSTANCE}/{path}", {"Metadata-Flavor": "Google"})


def ask_azure(azure: FakeAzure, path: str, method: str = "GET", body: Any = None) -> Answer:
    data = None if body is None else json.dumps(body).encode()
    return MetadataClient(azure.endpoint).ask(method, path, {"Metadata": "true"}, body=data)


def test_the_old_item_of_ec2_tells_the_time_of_the_new_one_or_something_that_is_no_time(aws: FakeAws) -> None:
    source = AwsSource(aws.endpoint)
    assert source.get("spot/termination-time").status == 404
    aws.interrupt(in_s=120)
    told = source.get("spot/termination-time").text
    assert parse_time(told) == parse_time(json.loads(source.get("spot/instance-action").text)["time"])
    aws.items["spot/termination-time"] = "soon"
    assert (source.get("spot/termination-time").status, source.get("spot/termination-time").text) == (200, "soon")
    aws.clear()
    assert source.get("spot/termination-time").status == 404


def test_head_is_answered_without_a_body_and_other_methods_are_refused() -> None:
    with FakeAws(v2_only=False) as aws:
        client = MetadataClient(aws.endpoint)
        head = client.ask("HEAD", "/latest/meta-data/instance-type")
        assert (head.status, head.headers["content-length"], head.text) == (200, str(len("g5.xlarge")), "")
        assert client.ask("POST", "/latest/meta-data/instance-type", body=b"").status == 405


def test_google_lets_nobody_wait_for_a_directory_unless_for_all_of_it(google: FakeGoogle) -> None:
    assert ask_google(google, "scheduling/").text.split() == [
        "on-host-maintenance",
        "preemptible",
        "provisioning-model",
    ]
    assert "scheduling/" in ask_google(google, "").text.split()
    assert ask_google(google, "scheduling/?wait_for_change=true&timeout_sec=1").status == 400
    assert ask_google(google, "?wait_for_change=true&timeout_sec=1").status == 400
    whole = ask_google(google, "?recursive=true&wait_for_change=true&timeout_sec=1&last_etag=NONE")
    found = json.loads(whole.text)
    assert (found["maintenanceEvent"], found["scheduling"]["provisioningModel"]) == ("NONE", "SPOT")
    again = ask_google(google, f"?recursive=true&wait_for_change=true&timeout_sec=1&last_etag={whole.headers['etag']}")
    assert (again.status, again.text) == (200, whole.text), "on timeout the same again"
    assert ask_google(google, "nothing/?wait_for_change=true&timeout_sec=1").status == 404


def test_an_event_of_azure_tells_how_long_it_lasts_and_has_no_time_once_it_has_begun(azure: FakeAzure) -> None:
    preempt, freeze = azure.schedule("Preempt", in_s=30), azure.schedule("Freeze", in_s=900)
    azure.start(freeze)
    events = {event["EventId"]: event for event in json.loads(ask_azure(azure, EVENTS).text)["Events"]}
    assert parsedate_to_datetime(events[preempt]["NotBefore"]).tzinfo is not None
    assert (events[preempt]["DurationInSeconds"], events[freeze]["DurationInSeconds"]) == (-1, 5)
    assert (events[freeze]["EventStatus"], events[freeze]["NotBefore"]) == ("Started", "")


def test_an_approved_event_of_azure_begins_and_one_that_is_not_there_cannot_be_approved(azure: FakeAzure) -> None:
    event = azure.schedule("Preempt", in_s=30)
    assert ask_azure(azure, EVENTS, "POST", {"StartRequests": [{"EventId": "no such event"}]}).status == 400
    assert ask_azure(azure, EVENTS, "POST", {"StartRequests": []}).status == 400
    assert azure.approved == []
    for _ in range(2):
        assert ask_azure(azure, EVENTS, "POST", {"StartRequests": [{"EventId": event}]}).status == 200
    assert azure.events[event]["EventStatus"] == "Started"
    assert ask_azure(azure, EVENTS, "DELETE").status in (405, 501)


def test_azure_describes_the_vm_and_gives_single_values_as_text_alone(azure: FakeAzure) -> None:
    query = "?api-version=2021-02-01"
    assert json.loads(ask_azure(azure, f"{COMPUTE}{query}").text)["priority"] == "Spot"
    assert ask_azure(azure, f"{COMPUTE}/name{query}").status == 400
    assert ask_azure(azure, f"{COMPUTE}/name{query}&format=text").text == "myspotvm"
    assert ask_azure(azure, f"{COMPUTE}/colour{query}&format=text").status == 404
    assert ask_azure(azure, f"{COMPUTE}{query}", "POST", {}).status == 405


def test_what_was_answered_is_known_with_its_time_a_long_poll_when_it_ends() -> None:
    with FakeGoogle() as google:
        etag = ask_google(google, "preempted").headers["etag"]
        path = f"preempted?wait_for_change=true&timeout_sec=60&last_etag={etag}"
        waiting = threading.Thread(target=ask_google, args=(google, path))
        waiting.start()
        google.wait_for(2)
        assert [exchange.reply.text for exchange in google.exchanges] == ["FALSE\n"]
        began = time.monotonic()
        google.preempt()
        waiting.join()
        assert google.exchanges[1].reply.text == "TRUE\n"
        assert google.exchanges[0].at < began <= google.exchanges[1].at


def test_the_fakes_and_the_proxy_need_no_test_framework() -> None:
    code = "import sys; from spotguard.testing import FakeAws, FaultProxy; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
