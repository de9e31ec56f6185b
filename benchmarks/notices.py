"""What hearing costs: `python benchmarks/notices.py`.

Idle: the CPU time of this process while all sources poll services that have nothing to say, at the intervals they have in earnest. Latency:
from the sending of a signal until it is heard, with the main thread inside long matrix products.
"""

import argparse
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from spotguard.notices import (
    AwsSource,
    AzureSource,
    FileSource,
    GoogleSource,
    NoticeWatcher,
    PreemptionNotice,
    SignalSource,
)
from spotguard.testing.metadata import FakeAws, FakeAzure, FakeGoogle


def serve(line: Any) -> None:
    """The fakes, in a process of their own."""
    with FakeAws() as aws, FakeGoogle() as google, FakeAzure() as azure:
        line.send((aws.endpoint, google.address, azure.endpoint))
        line.recv()


def idle(seconds: float) -> None:
    """CPU time of all sources together."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    server.start()
    aws, google, azure = ours.recv()
    heard: list[PreemptionNotice] = []
    watcher = NoticeWatcher(heard.append)
    with tempfile.TemporaryDirectory() as folder:
        for source in (AwsSource(aws), GoogleSource(google), AzureSource(azure), FileSource(Path(folder, "preempted"))):
            watcher.watch(source)
        time.sleep(3)  # imports, the first requests
        cpu, began = time.process_time(), time.monotonic()
        time.sleep(seconds)
        used, took = time.process_time() - cpu, time.monotonic() - began
        watcher.close()
    ours.send(None)
    server.join()
    assert not heard
    share = used / took
    verdict = "met" if share < 0.001 else "NOT met"
    print(f"idle: {used * 1000:.1f} ms of CPU in {took:.0f} s, {share:.3%} of a core; goal under 0.1 %: {verdict}")


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
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--signals", type=int, default=50)
    options = parser.parse_args()
    latency(options.signals)
    idle(options.seconds)


if __name__ == "__main__":
    main()
