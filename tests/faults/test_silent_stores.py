"""A store that takes connections and says nothing: nobody waits for it longer than there is time."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from faults.places import Job, start
from faults.scenario import check_content, snapshot_at
from servers import S3Server
from spotguard.errors import DeadlineExceededError, ObjectNotFoundError, StoreError
from spotguard.events import CheckpointCommitted
from spotguard.pipeline.objects import outcomes, together
from spotguard.pipeline.resolver import resolve
from spotguard.pipeline.writer import Writer
from spotguard.stores import LocalObjectStore
from spotguard.stores.s3 import S3ObjectStore, S3Options
from spotguard.testing.object_store import get, put
from spotguard.testing.proxy import FaultProxy, Reset, Stall, Status, matching

MIB = 1 << 20


@pytest.fixture(autouse=True)
def threads_are_ended() -> None:
    """Those that wait for a silent store are left behind: they are daemons."""


@pytest.fixture
def proxy(seaweedfs: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(seaweedfs.endpoint) as proxy:
        yield proxy


@pytest.fixture
def place(seaweedfs: S3Server) -> Callable[..., S3ObjectStore]:
    """A place in the bucket, straight or by way of a proxy; the same one for the same name."""
    run = secrets.token_hex(8)

    def at(endpoint: str = seaweedfs.endpoint, name: str = "", **options: Any) -> S3ObjectStore:
        session = boto3.Session(seaweedfs.access_key, seaweedfs.secret_key, region_name=seaweedfs.region)
        chosen = S3Options(endpoint_url=endpoint, part_size=5 * MIB, **options)
        return S3ObjectStore(f"s3://{seaweedfs.versioned}/{run}{name}", chosen, session=session)

    return at


def submitted(job: Job, step: int, seconds: float) -> bool:
    """A save with so many seconds; whether the writer was free again by then."""
    deadline = time.monotonic() + seconds
    job.writer.submit(snapshot_at(step), {}, deadline=deadline)
    return job.writer.drain(seconds + 2.0, upkeep=False)


def test_a_save_before_the_end_is_in_every_tier_but_the_one_that_is_silent(
    tmp_path: Path, place: Callable[..., S3ObjectStore], proxy: FaultProxy
) -> None:
    job = start(LocalObjectStore(tmp_path / "fast"), place(proxy.uri, "-eu", stall_s=1.0), place(name="-us"))
    job.save(10)
    proxy.plan = matching(Stall())
    assert submitted(job, 20, 4.0)
    proxy.close()
    committed = {event.tier for event in job.told(CheckpointCommitted) if event.step == 20}  # type: ignore[attr-defined]
    assert committed == {str(tmp_path / "fast"), place(name="-us").uri}
    resolution = resolve(place(name="-us"), load=True)
    checkpoint = resolution.require()
    assert checkpoint is not None
    check_content(resolution, checkpoint.step)
    assert checkpoint.step == 20


@pytest.mark.parametrize(
    ("method", "query", "size"),
    [("PUT", "", 10), ("POST", "uploads", 11 * MIB), ("PUT", "partNumber", 11 * MIB), ("POST", "uploadId", 11 * MIB)],
    ids=["put", "begin", "part", "end"],
)
def test_a_request_that_is_never_answered_is_waited_for_until_the_deadline_and_no_longer(
    place: Callable[..., S3ObjectStore], proxy: FaultProxy, method: str, query: str, size: int
) -> None:
    store = place(proxy.uri)
    store.preflight()
    proxy.plan = matching(Stall(), method=method, path_contains="object", query_contains=query)
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError), store.create("object", deadline=began + 1.0) as writer:
        writer.write(bytes(size))
    assert time.monotonic() - began < 10  # the store itself would give up after 20 seconds, and try again
    proxy.close()


def test_of_the_time_up_to_a_deadline_no_try_is_given_away(
    place: Callable[..., S3ObjectStore], proxy: FaultProxy
) -> None:
    """The server is well again shortly before it."""
    store = place(proxy.uri)
    store.preflight()
    until = time.monotonic() + 3.0
    proxy.plan = lambda request: Status(503, "SlowDown") if time.monotonic() < until - 0.7 else None
    with store.create("object", deadline=until) as writer:
        writer.write(b"in time")
    assert get(place(), "object") == b"in time"


def test_a_link_that_is_slow_but_moves_is_no_stall(place: Callable[..., S3ObjectStore], seaweedfs: S3Server) -> None:
    """A megabyte takes longer than the time after which a transfer is taken to have stalled."""
    data = os.urandom(2 * MIB)
    with FaultProxy(seaweedfs.endpoint, bandwidth=600_000) as slow:
        put(place(slow.uri, stall_s=1.0, connections=1), "object", data)
        assert len([request for request in slow.requests if "object" in request.path]) <= 4
    assert get(place(), "object") == data


def test_a_link_that_becomes_slow_between_two_transfers_costs_one_try(
    place: Callable[..., S3ObjectStore], seaweedfs: S3Server
) -> None:
    """The second one begins with a megabyte at once: more than the link now takes before it seems to stall."""
    first, second = os.urandom(64 * MIB), os.urandom(3 * MIB)
    with FaultProxy(seaweedfs.endpoint, bandwidth=1e9) as link:
        store = place(link.uri, stall_s=1.0, connections=1)
        put(store, "first", first)
        assert store.connection.up.stride > 2 * MIB
        link.bandwidth = 600_000
        put(store, "second", second)
        assert len([request for request in link.requests if "second" in request.path]) <= 4
        link.bandwidth = 1e9
        assert get(store, "first") == first
        link.bandwidth = 600_000
        assert get(store, "second") == second
    assert get(place(), "second") == second


def test_a_link_that_becomes_slow_before_a_save_with_a_deadline_costs_it_no_try(
    place: Callable[..., S3ObjectStore], seaweedfs: S3Server
) -> None:
    data, told = os.urandom(4 * MIB), list[int]()
    with FaultProxy(seaweedfs.endpoint, bandwidth=1e9) as link:
        store = place(link.uri, stall_s=4.0, connections=1)
        store.preflight()
        store.connection.up.stride = store.connection.down.stride = 8 * MIB  # as fast transfers leave it
        link.bandwidth = 600_000
        with store.create("second", deadline=time.monotonic() + 9.0) as writer:
            writer.write(data)
        assert len([request for request in link.requests if "second" in request.path]) == 1
        with store.open("second") as reader:
            assert reader.read_into(bytearray(3 * MIB), MIB, told.append) == 3 * MIB
    assert max(told) <= MIB
    assert get(place(), "second") == data


@pytest.mark.parametrize("connections", [1, 4])
def test_connections_that_break_after_less_than_a_stride_still_bring_something(
    place: Callable[..., S3ObjectStore], proxy: FaultProxy, connections: int
) -> None:
    """What has come of a stride is lost with its connection: those that follow are small."""
    data = os.urandom(20 * MIB)
    store = place(proxy.uri, connections=connections)
    put(store, "object", data)
    store.connection.down.stride = 8 * MIB  # as fast transfers leave it
    proxy.plan = matching(Reset(MIB // 2, "response"), method="GET", path_contains="object")
    assert get(store, "object") == data


def test_when_a_range_cannot_be_read_the_others_are_given_up(
    place: Callable[..., S3ObjectStore], seaweedfs: S3Server
) -> None:
    """They hold on to memory that nobody wants any more, and whoever reads is kept waiting for them."""
    put(place(), "object", os.urandom(24 * MIB))
    with FaultProxy(seaweedfs.endpoint, bandwidth=1e6) as link, place(link.uri, connections=2).open("object") as reader:
        link.plan = lambda request: (
            Status(403, "AccessDenied") if request.headers["range"].startswith("bytes=1048576-") else None
        )
        began = time.monotonic()
        with pytest.raises(StoreError, match="AccessDenied"):
            reader.read()
        assert time.monotonic() - began < 3
        while any(thread.name == "spotguard-s3" for thread in threading.enumerate()):
            assert time.monotonic() - began < 4
            time.sleep(0.01)


@pytest.mark.parametrize("fault", [Reset(20, "response"), Stall(20, "response")], ids=str)
def test_an_answer_that_breaks_off_within_an_error_is_an_error_of_the_store(
    place: Callable[..., S3ObjectStore], proxy: FaultProxy, fault: Any
) -> None:
    store = place(proxy.uri, stall_s=1.0)
    store.preflight()
    proxy.plan = matching(fault, method="GET", path_contains="nothing", times=1)
    with pytest.raises(ObjectNotFoundError):
        get(store, "nothing")
    proxy.plan = matching(fault, method="GET", path_contains="nothing")
    with pytest.raises(StoreError):
        store.connection.call("get_object", "nothing", tries=2)


def test_work_that_is_not_done_in_time_is_left_behind_and_does_not_hold_back_the_process() -> None:
    script = """
        import sys, time
        from spotguard.pipeline.objects import outcomes, together
        late, done = outcomes(time.sleep, [600, 0], until=time.monotonic() + 0.5)
        assert type(late.error).__name__ == "DeadlineExceededError" and done.error is None
        import threading
        threading.Thread(target=together, args=(time.sleep, [600, 600]), daemon=True).start()
        sys.exit(143)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False)
    assert run.returncode == 143


def test_work_is_done_in_order_and_its_first_error_is_raised() -> None:
    assert together(lambda number: number * 2, range(20)) == list(range(0, 40, 2))
    with pytest.raises(ZeroDivisionError):
        together(lambda number: 1 // number, [1, 0, 2])
    assert outcomes(len, []) == []


def test_work_that_need_not_be_waited_for_is_not_called_late() -> None:
    over = threading.Event()
    done, left = outcomes(lambda wait: wait and over.wait(60), [False, True], enough=bool)
    over.set()
    assert done.error is None
    assert str(left.error) == "it was not waited for, since another has it"
    (late,) = outcomes(time.sleep, [5], until=time.monotonic() + 0.05)
    assert str(late.error) == "the store has not answered in time"


class SlowToDelete(LocalObjectStore):
    """Takes its time over deletes, as some stores do."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.deleting, self.go_on = threading.Event(), threading.Event()

    def delete(self, refs: Any) -> None:
        self.deleting.set()
        self.go_on.wait(60)
        super().delete(refs)


def test_a_save_before_the_end_does_not_wait_for_the_sweep_behind_the_last_one(tmp_path: Path) -> None:
    store = SlowToDelete(tmp_path)
    job = start(store, keep=1)
    with contextlib.closing(job.writer):
        for step in (10, 20):
            submit_and_wait(job.writer, step)
        assert store.deleting.wait(60)
        assert submitted(job, 30, 10.0)
        assert job.writer.error is None
        store.go_on.set()
    resolution = resolve(LocalObjectStore(tmp_path), load=True)
    checkpoint = resolution.require()
    assert checkpoint is not None
    assert checkpoint.step == 30
    check_content(resolution, 30)


def submit_and_wait(writer: Writer, step: int) -> None:
    writer.submit(snapshot_at(step), {})
    assert writer.drain(60, upkeep=False)


TRAINING = """
import sys
import torch
from spotguard import SpotGuard, TrainState
from spotguard.stores.s3 import S3ObjectStore, S3Options

folder, eu, us, bucket = sys.argv[1:]
def at(endpoint, name):
    return S3ObjectStore(f"s3://{bucket}/{name}", S3Options(endpoint_url=endpoint))
model = torch.nn.Linear(2, 2)
state = TrainState(model=model)
with SpotGuard([folder, at(eu, f"{folder[1:]}-eu"), at(us, f"{folder[1:]}-us")], state, every=100, grace="6s") as guard:
    for step in guard.steps(10**9):
        if step == 150:
            print("ready", flush=True)
            sys.stdin.readline()
"""


def test_a_region_that_falls_silent_costs_neither_the_last_save_nor_the_exit(
    tmp_path: Path, seaweedfs: S3Server, proxy: FaultProxy
) -> None:
    """SIGTERM comes when the region has just gone. The other one has the last step, and the process leaves in its grace period."""
    command = [
        sys.executable,
        "-c",
        TRAINING,
        str(tmp_path / "run"),
        proxy.uri,
        seaweedfs.endpoint,
        seaweedfs.versioned,
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **seaweedfs.environment()}
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        proxy.plan = matching(Stall())
        process.send_signal(signal.SIGTERM)
        process.stdin.write("\n")
        process.stdin.flush()
        try:
            assert process.wait(40) == 143
        finally:
            process.kill()
            proxy.close()
    session = boto3.Session(seaweedfs.access_key, seaweedfs.secret_key, region_name=seaweedfs.region)
    name = str(tmp_path / "run")[1:]
    us = S3ObjectStore(
        f"s3://{seaweedfs.versioned}/{name}-us", S3Options(endpoint_url=seaweedfs.endpoint), session=session
    )
    here, there = resolve(LocalObjectStore(tmp_path / "run")).require(), resolve(us).require()
    assert here is not None
    assert there is not None
    assert here.step == there.step >= 150
