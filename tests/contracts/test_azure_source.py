"""What Scheduled Events of Azure have of their own."""

import pytest

from contracts.sources import SOON, Listen, left
from spotguard.notices import AzureSource
from spotguard.notices.metadata import MetadataClient
from spotguard.testing.metadata import FakeAzure, Reply, Request


@pytest.mark.parametrize(
    ("event_type", "kind", "action"),
    [
        ("Preempt", "preemption", "stop"),
        ("Terminate", "preemption", "stop"),
        ("Reboot", "maintenance", "stop"),
        ("Redeploy", "maintenance", "stop"),
        ("Freeze", "maintenance", "save"),
    ],
)
def test_what_each_event_asks_for(azure: FakeAzure, listen: Listen, event_type: str, kind: str, action: str) -> None:
    azure.schedule(event_type, in_s=40)
    notice = listen(AzureSource(azure.endpoint, SOON)).wait()
    assert (notice.kind, notice.action) == (kind, action)
    assert 35 < left(notice) <= 41


def test_events_of_other_machines_are_none_of_ours(azure: FakeAzure, listen: Listen) -> None:
    azure.schedule("Preempt", resources=("another",))
    listening = listen(AzureSource(azure.endpoint, SOON))
    azure.wait_for(4, "scheduledevents")
    assert listening.heard == []
    azure.schedule("Preempt", resources=("another", "MySpotVM"))
    assert listening.wait().action == "stop"


def test_an_event_that_begins_is_due_now_and_is_not_withdrawn_when_it_is_over(azure: FakeAzure, listen: Listen) -> None:
    event = azure.schedule("Freeze", in_s=900)
    listening = listen(AzureSource(azure.endpoint, SOON))
    listening.wait()
    azure.start(event)
    assert left(listening.wait(2)) < 1
    azure.withdraw(event)
    azure.wait_for(sum("scheduledevents" in one.path for one in azure.requests) + 3, "scheduledevents")
    assert len(listening.heard) == 2


@pytest.mark.parametrize("text", ["", "soon"])
def test_an_event_without_a_time_is_due_now(azure: FakeAzure, listen: Listen, text: str) -> None:
    azure.schedule("Preempt", text=text)
    assert left(listen(AzureSource(azure.endpoint, SOON)).wait()) < 1


def test_the_first_request_may_take_its_time(listen: Listen) -> None:
    with FakeAzure(first_s=3.0) as azure:  # longer than any other request may take
        azure.schedule("Preempt")
        assert listen(AzureSource(azure.endpoint, SOON)).wait().action == "stop"
        assert sum("scheduledevents" in one.path for one in azure.requests) == 1


def test_one_that_asks_too_often_is_throttled_and_hears_all_the_same(listen: Listen) -> None:
    with FakeAzure() as azure:  # 5 a second
        listening = listen(AzureSource(azure.endpoint, SOON))
        azure.wait_for(12)
        assert {exchange.reply.status for exchange in azure.exchanges} == {200, 429}
        assert listening.heard == []
        azure.schedule("Preempt")
        assert listening.wait().action == "stop"


def test_an_event_of_ours_is_not_lost_where_our_name_cannot_be_asked_for(listen: Listen) -> None:
    class Throttled(FakeAzure):
        throttling = False

        def answer(self, request: Request) -> Reply:
            return Reply(429) if self.throttling and "compute" in request.path else super().answer(request)

    with Throttled(limit=10_000) as azure:
        listening = listen(AzureSource(azure.endpoint, SOON))
        azure.wait_for(3, "scheduledevents")
        azure.compute["name"], azure.throttling = "renamed", True
        azure.schedule("Preempt")
        azure.wait_for(len(azure.requests) + 6)
        assert listening.heard == []
        azure.throttling = False
        assert listening.wait().action == "stop"


def test_an_event_that_may_begin_at_any_time_is_due_now_however_long_it_has_been(
    azure: FakeAzure, listen: Listen
) -> None:
    azure.schedule("Preempt", in_s=-3600)
    notice = listen(AzureSource(azure.endpoint, SOON)).wait()
    assert left(notice) < 1
    assert not notice.firm


def test_an_event_is_acknowledged_only_on_request_and_where_it_is_ours_alone(azure: FakeAzure, listen: Listen) -> None:
    alone, shared = azure.schedule("Preempt"), azure.schedule("Reboot", resources=("myspotvm", "another"))
    silent, telling = AzureSource(azure.endpoint, SOON), AzureSource(azure.endpoint, SOON, acknowledge=True)
    for source in (silent, telling):
        listening = listen(source)
        listening.wait(2)
        for notice in listening.heard:
            source.confirm(notice)
    assert azure.approved == [alone]
    assert shared in azure.events


def test_the_fake_refuses_what_azure_refuses(azure: FakeAzure) -> None:
    client, path = MetadataClient(azure.endpoint), "/metadata/scheduledevents?api-version=2020-07-01"
    header = {"Metadata": "true"}
    assert client.get(path).status == 400
    assert client.get(path, {**header, "X-Forwarded-For": "10.0.0.1"}).status == 400
    assert client.get(f"{path}&api-version=2019-01-01", header).status == 400
    assert client.ask("POST", path, header, body=b"{}").status == 400
    azure.limit = 5
    assert [client.get(path, header).status for _ in range(12)].count(429) >= 1
