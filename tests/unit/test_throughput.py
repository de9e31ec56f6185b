"""How much is moved at once."""

import itertools

import pytest

from spotguard.stores.s3 import throughput as module
from spotguard.stores.s3.throughput import Stride, Throughput

MIB = 1 << 20


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cores", lambda: 2)


class Network:
    """A clock that goes by what is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("spotguard.stores.s3.throughput.time.monotonic", lambda: self.now)

    def move(self, stride: Stride, size: int, rate: float) -> list[int]:
        """Move so many bytes at so many a second; returns the strides."""
        strides = list[int]()
        while sum(strides) < size:
            strides.append(stride.next(size - sum(strides)))
            self.now += strides[-1] / rate
        return strides


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


def test_strides_grow_on_a_fast_network_and_the_next_transfer_begins_with_a_megabyte(network: Network) -> None:
    throughput = Throughput(4, 32 * MIB)
    first = network.move(Stride(throughput), 64 * MIB, 1e9)
    assert first[0] == 64 << 10
    assert max(first) == 8 * MIB
    assert network.move(Stride(throughput), 64 * MIB, 1e9)[:4] == [MIB, 2 * MIB, 4 * MIB, 8 * MIB]


def test_strides_stay_small_on_a_slow_one(network: Network) -> None:
    throughput = Throughput(4, 32 * MIB)
    for _ in range(3):
        assert max(network.move(Stride(throughput), 2 * MIB, 1e6)) <= 128 << 10


def test_after_a_failure_strides_begin_small_and_grow_less_for_others_too(network: Network) -> None:
    throughput = Throughput(4, 32 * MIB)
    stride = Stride(throughput)
    network.move(stride, 64 * MIB, 1e9)
    stride.restart()
    again = network.move(stride, 64 * MIB, 1e9)
    assert again[0] == 64 << 10
    assert max(again) == MIB
    stride.restart()
    assert Stride(throughput).next(MIB) == 64 << 10


def test_a_fast_network_gets_one_connection_for_each_core_and_larger_parts(network: Network) -> None:
    throughput = Throughput(4, 32 * MIB)
    assert (throughput.lanes, throughput.share_of(1000 * MIB)) == (4, 125 * MIB)
    network.move(Stride(throughput), 64 * MIB, 1e9)
    assert (throughput.lanes, throughput.share_of(1000 * MIB)) == (2, 250 * MIB)
    assert throughput.share_of(1 << 34) == 256 * MIB
    network.move(Stride(throughput), 64 * MIB, 100e6)
    assert (throughput.lanes, throughput.share_of(1000 * MIB)) == (4, 125 * MIB)
    assert throughput.share_of(1 << 34) == 128 * MIB


def test_a_few_bytes_say_nothing_about_the_network(network: Network) -> None:
    throughput = Throughput(4, 32 * MIB)
    network.move(Stride(throughput), 4 * MIB, 1e9)
    assert throughput.lanes == 4


def test_pieces_smaller_than_a_stride_count_for_what_they_are(network: Network) -> None:
    """Who writes a megabyte at a time makes no network fast."""
    throughput = Throughput(4, 32 * MIB)
    stride = Stride(throughput)
    for _ in range(64):
        assert stride.next(1000) == 1000
        network.now += 1e-5
    assert throughput.stride == 64 << 10
    for _ in range(64):
        network.move(stride, MIB, 100e6)
    assert throughput.lanes == 4
    assert throughput.rate == pytest.approx(100e6, rel=0.01)
    assert throughput.stride <= 2 * MIB


def test_more_cores_than_connections_are_no_reason_for_more_connections(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_cores", lambda: 64)
    throughput = Throughput(4, 32 * MIB)
    network.move(Stride(throughput), 64 * MIB, 1e9)
    assert throughput.lanes == 4


def test_all_parts_are_as_large_as_each_other_give_or_take_one_byte_each() -> None:
    throughput = Throughput(4, 32 * MIB)
    for size, offset in itertools.product((1, 31 * MIB, 33 * MIB, 300 * MIB, 10**9, 1 << 34), (-1, 0, 1)):
        share = throughput.share_of(size + offset)
        count = -(-(size + offset) // max(1, share))
        assert share <= 128 * MIB
        assert share * count - (size + offset) < max(1, count)
