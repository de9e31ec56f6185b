"""What hearing costs: `python benchmarks/notices.py`.

Idle: the CPU time of this process while its sources have nothing to say, at the intervals that they have in earnest, less what it takes
without any: what runs together on a machine of each cloud, with a run in a directory and in S3, measured together; each source by itself,
to see where the time goes; and all eight at once, three clouds among them, which no machine has. Next to the figures stands the load of the
machine: where others use the cores too, the caches are cold, and the same work takes several times as long.

Latency: from the sending of a signal until it is heard, with the main thread inside long matrix products.
"""

import argparse
import contextlib
import http.server
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from spotguard.checkpoint.layout import STOP
from spotguard.notices import (
    AwsSource,
    AzureSource,
    FileSource,
    GoogleSource,
    NoticeSource,
    NoticeWatcher,
    PollingSource,
    PreemptionNotice,
    SignalSource,
    UrlSource,
)
from spotguard.settings import Settings
from spotguard.stores import ObjectStore, open_store
from spotguard.testing.metadata import FakeAws, FakeAzure, FakeGoogle

GOAL = 0.001  # of a core, for all together
SETTLE_S = 3.0  # imports, the first requests


class Nothing(http.server.BaseHTTPRequestHandler):
    """There is no notice."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def serve(line: Any) -> None:
    """The services, in a process of their own."""
    with FakeAws() as aws, FakeGoogle() as google, FakeAzure() as azure:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/notice"
        line.send((aws.endpoint, google.address, azure.endpoint, url))
        line.recv()
        server.shutdown()


@contextlib.contextmanager
def services() -> Iterator[tuple[str, str, str, str]]:
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    server.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        server.join()


@contextlib.contextmanager
def bucket(folder: str) -> Iterator[ObjectStore]:
    """A run in an S3 server that costs next to nothing."""
    file = Path(folder, "body")
    file.write_bytes(bytes(4096))
    command = [sys.executable, str(Path(__file__).with_name("null_s3.py")), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        os.environ.update(keys, AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.stdout.readline().strip()}")
        try:
            yield open_store("s3://bucket/run")
        finally:
            server.kill()


def stop_object(store: ObjectStore, interval: float) -> NoticeSource:
    """The look for a request to stop, as the guard does it."""
    return PollingSource("request", lambda: None if store.stat(STOP) is None else "a request", interval)


def share_of(sources: list[NoticeSource], seconds: float) -> float:
    """CPU seconds a second that this process takes while the sources are watched."""
    heard: list[PreemptionNotice] = []
    watcher = NoticeWatcher(heard.append)
    signals = [source for source in sources if isinstance(source, SignalSource)]
    for one in signals:
        one.install()
    for source in sources:
        watcher.watch(source)
    time.sleep(SETTLE_S)
    cpu, began = time.process_time(), time.monotonic()
    time.sleep(seconds)
    used, took = time.process_time() - cpu, time.monotonic() - began
    watcher.close()
    for one in signals:
        one.restore()
    assert not heard
    return used / took


def idle(seconds: float) -> None:
    """What runs together on one machine, each source by itself, and all at once."""
    with services() as (aws, google, azure, url), tempfile.TemporaryDirectory() as folder, bucket(folder) as remote:
        near = open_store(folder)
        sources: dict[str, Callable[[], NoticeSource]] = {
            "signals": SignalSource,
            "directory": lambda: stop_object(near, Settings().poll_s or 1.0),
            "S3": lambda: stop_object(remote, Settings().poll_s or 5.0),
            "file": lambda: FileSource(Path(folder, "preempted")),
            "URL": lambda: UrlSource(url),
            "EC2": lambda: AwsSource(aws),
            "Compute Engine": lambda: GoogleSource(google),
            "Azure": lambda: AzureSource(azure),
        }
        clouds = ("EC2", "Compute Engine", "Azure")
        machines = [("signals", place, cloud) for cloud in clouds for place in ("directory", "S3")]
        groups = [*machines, *((name,) for name in sources), tuple(sources)]
        nothing = share_of([], seconds)
        found = {group: max(0.0, share_of([sources[name]() for name in group], seconds) - nothing) for group in groups}
    print(f"idle: load of this machine {os.getloadavg()[0]:.1f}, on {os.cpu_count()} cores")
    for group in groups:
        what = ", ".join(group) if group != tuple(sources) else "all eight at once, as no machine has them"
        goal = "" if len(group) == 1 else f"; goal under {GOAL:.1%}: {'met' if found[group] < GOAL else 'NOT met'}"
        print(f"idle: {what:42} {found[group]:.6f} s of CPU a second, {found[group]:.3%} of a core{goal}")


def latency(count: int) -> None:
    """From the kill to the notice, while the main thread multiplies matrices."""
    heard = threading.Event()
    times: list[float] = []
    at = [0.0]

    def take(_: PreemptionNotice) -> None:
        times.append(time.monotonic() - at[0])
        heard.set()

    matrix = torch.randn(3000, 3000)
    began = time.monotonic()
    matrix @ matrix
    product = time.monotonic() - began
    for _ in range(count):
        heard.clear()
        source, watcher = SignalSource((signal.SIGTERM,)), NoticeWatcher(take)
        source.install()
        watcher.watch(source)

        def send() -> None:
            time.sleep(0.5 * product)
            at[0] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

        sender = threading.Thread(target=send)
        sender.start()
        while not heard.is_set():
            matrix @ matrix
        sender.join()
        watcher.close()
        source.restore()
    print(
        f"latency: median {statistics.median(times) * 1000:.2f} ms, worst of {count} {max(times) * 1000:.2f} ms, "
        f"in products of {product * 1000:.0f} ms; goal under 50 ms: {'met' if max(times) < 0.05 else 'NOT met'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each measurement")
    parser.add_argument("--signals", type=int, default=50)
    options = parser.parse_args()
    latency(options.signals)
    idle(options.seconds)


if __name__ == "__main__":
    main()
