"""The records: canonical, closed, and not to be read when a single bit is not as it was written."""

import datetime as dt
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotguard.checkpoint import Claim, Manifest, RunRecord, ShardRecord
from spotguard.checkpoint.records import FORMAT, Record
from spotguard.errors import CheckpointDamagedError, FormatTooNewError

AT = dt.datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=dt.timezone.utc)
SHARD = ShardRecord(
    name="model", key="checkpoints/0001-0000000002/model.pt", size=3, digest="crc64nvme:0123456789abcdef"
)
MANIFEST = Manifest(run_id="r", attempt=1, step=2, metrics={"loss": 0.5}, created_at=AT, shards=(SHARD,))


@pytest.mark.parametrize(
    "record",
    [
        MANIFEST,
        Manifest(run_id="r", attempt=1, step=0, created_at=AT.replace(microsecond=0), shards=()),
        Claim(attempt=10000, parent=9999, parent_max_step=0, host="größe", pid=1, created_at=AT),
        Claim(attempt=3, parent=2, parent_max_step=10, parent_max_sequence=0, created_at=AT),
        RunRecord(run_id="r", created_at=AT, spotguard="0.1.0"),
    ],
    ids=lambda record: record.what,
)
def test_a_record_is_read_back(record: Record) -> None:
    data = record.to_bytes()
    assert type(record).from_bytes(data, key="key") == record
    assert type(record).from_bytes(data, key="key").to_bytes() == data


def test_the_bytes_are_canonical() -> None:
    data = MANIFEST.to_bytes()
    fields = json.loads(data)
    assert list(fields) == sorted(fields)
    assert data == json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert fields["format"] == FORMAT
    assert fields["shards"] == [
        {"digest": SHARD.digest, "key": SHARD.key, "name": "model", "rank": None, "size": 3, "version": None}
    ]


def test_a_claim_that_was_written_before_it_named_a_sequence_is_read_and_stays_what_it_is() -> None:
    old = (
        b'{"attempt":2,"created_at":"2026-02-03T04:05:06.000789Z","format":1,"host":"h","parent":1,"parent_max_step":10,"pid":7,'
        b'"reason":"start","sha256":"%s"}'
    )
    import hashlib

    digest = hashlib.sha256(old.replace(b',"sha256":"%s"', b"")).hexdigest().encode()
    claim = Claim.from_bytes(old % digest, key="key")
    assert (claim.parent_max_step, claim.parent_max_sequence) == (10, None)
    assert claim.to_bytes() == old % digest


def test_the_order_of_metrics_makes_no_difference() -> None:
    one = MANIFEST.model_copy(update={"metrics": {"a": 1.0, "b": 2.0}})
    other = MANIFEST.model_copy(update={"metrics": {"b": 2.0, "a": 1.0}})
    assert one.to_bytes() == other.to_bytes()


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.floats(), max_size=4))
def test_any_metrics_are_read_back(metrics: dict[str, float]) -> None:
    data = MANIFEST.model_copy(update={"metrics": metrics}).to_bytes()
    again = Manifest.from_bytes(data, key="key").metrics
    assert again.keys() == metrics.keys()
    assert all(
        again[name] == value or (math.isnan(again[name]) and math.isnan(value)) for name, value in metrics.items()
    )


@pytest.mark.parametrize(
    "record", [MANIFEST, Claim(attempt=3, parent=2, parent_max_step=7, created_at=AT)], ids=["manifest", "claim"]
)
def test_one_flipped_bit_anywhere_is_found(record: Record) -> None:
    data = record.to_bytes()
    for position in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(CheckpointDamagedError, match="the key"):
            type(record).from_bytes(bytes(damaged), key="the key")


def test_a_cut_or_a_longer_file_is_found() -> None:
    data = MANIFEST.to_bytes()
    for length in range(len(data)):
        with pytest.raises(CheckpointDamagedError):
            Manifest.from_bytes(data[:length], key="key")
    for more in (b"\0", b" ", b"\n", data):
        with pytest.raises(CheckpointDamagedError):
            Manifest.from_bytes(data + more, key="key")


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"{}", b"1", b'"x"', b"\xff\xfe", b"\0" * 100, b"[" * 100_000, b'{"format":' + b"9" * 5000 + b"}",
     b'{"format":"2"}',
     b'{"format":2}', b'{"format":NaN}', b'{"format":true}', MANIFEST.to_bytes().decode().encode("utf-16"), b" " + MANIFEST.to_bytes(),
     b'{"host":"\\ud800"}', b'{"format":2,"sha256":"x","a":"\\ud800"}'],
    ids=lambda data: ascii(data[:24]),
)  # fmt: skip
def test_what_is_no_record_is_found(data: bytes) -> None:
    for kind in (Manifest, Claim, RunRecord):
        with pytest.raises(CheckpointDamagedError, match="the key"):
            kind.from_bytes(data, key="the key")


def test_one_record_is_not_taken_for_another() -> None:
    with pytest.raises(CheckpointDamagedError):
        Claim.from_bytes(MANIFEST.to_bytes(), key="key")


def rewritten(**changes: Any) -> bytes:
    """A manifest as another release might have written it, with a digest that is right."""
    import hashlib

    fields = {**json.loads(MANIFEST.to_bytes()), **changes}
    fields.pop("sha256")
    body = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    fields["sha256"] = hashlib.sha256(body).hexdigest()
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_a_newer_format_is_no_damage_and_says_what_to_do() -> None:
    with pytest.raises(FormatTooNewError, match=r"format 2.*Upgrade spotguard"):
        Manifest.from_bytes(rewritten(format=2, something_new={"a": [1]}), key="key")


def test_a_newer_format_whose_digest_is_wrong_is_damage() -> None:
    with pytest.raises(CheckpointDamagedError):
        Manifest.from_bytes(rewritten(format=2, something_new=1).replace(b'"step":2', b'"step":3'), key="key")


@pytest.mark.parametrize(
    "changes",
    [{"unknown": 1}, {"step": -1}, {"attempt": 0}, {"step": "2"}, {"metrics": {"loss": "x"}}, {"shards": None}],
)
def test_a_record_of_this_format_is_closed(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointDamagedError):
        Manifest.from_bytes(rewritten(**changes), key="key")


def test_a_record_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        MANIFEST.step = 3


def test_id_and_size_come_from_the_fields() -> None:
    assert (str(MANIFEST.id), MANIFEST.size) == ("0001-0000000002", 3)
