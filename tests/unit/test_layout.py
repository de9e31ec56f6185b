"""Keys and ids: every one of ours is read back, and nothing else is taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotguard.checkpoint.layout import (
    CheckpointId,
    attempt_of_key,
    check_member_name,
    claim_key,
    event_key,
    parse_claim_key,
    parse_manifest_key,
    parse_shard_key,
    rank_name,
)
from spotguard.errors import ConfigError
from spotguard.stores import check_key

IDS = st.builds(CheckpointId, st.integers(1, 10**6), st.integers(0, 10**12), st.integers(0, 99))


@given(IDS)
def test_an_id_is_read_back_from_everything_it_is_written_in(identity: CheckpointId) -> None:
    assert CheckpointId.parse(str(identity)) == identity
    assert parse_manifest_key(identity.manifest_key) == identity
    for name in ("model", "_ema_2", rank_name(3)):
        key = identity.shard_key(name)
        assert check_key(key) == key
        assert parse_shard_key(key) == identity
        assert attempt_of_key(key) == identity.attempt
    assert check_key(identity.manifest_key)
    assert attempt_of_key(identity.manifest_key) == identity.attempt


@given(st.integers(1, 10**7), st.integers(0, 10**6), st.integers(0, 50))
def test_claims_and_events_of_any_number_of_attempts_are_read_back(attempt: int, rank: int, segment: int) -> None:
    assert parse_claim_key(claim_key(attempt)) == attempt
    assert attempt_of_key(claim_key(attempt)) == attempt
    assert attempt_of_key(event_key(attempt, rank, segment)) == attempt
    assert check_key(event_key(attempt, rank, segment))


@given(IDS, IDS)
def test_the_order_of_ids_is_attempt_then_step_then_sequence(one: CheckpointId, other: CheckpointId) -> None:
    assert (one < other) == (tuple(one) < tuple(other))
    assert (one == other) == (str(one) == str(other))


@pytest.mark.parametrize("attempt", [1, 9999, 10000, 123456])
def test_more_than_9999_attempts_are_no_trouble(attempt: int) -> None:
    assert str(CheckpointId(attempt, 7)) == f"{attempt:04d}-0000000007"
    assert parse_manifest_key(CheckpointId(attempt, 7).manifest_key) == CheckpointId(attempt, 7)


DIGITS = "\u0660\u0660\u0660\u0661"  # digits too, but not ours

FOREIGN = [
    "", "run.json", "manifests", "manifests/", "manifests/latest.json", "manifests/0001-0000000001", "manifests/0001-0000000001.json.bak",
    "manifests/1-0000000001.json", "manifests/0001-1.json", "manifests/sub/0001-0000000001.json", "x/manifests/0001-0000000001.json",
    "manifests/0001-0000000001..json", "manifests/0001-0000000001.0.json", "manifests/0001-0000000001.01.json",
    "manifests/00001-0000000001.json", "manifests/0001-00000000001.json", f"manifests/{DIGITS}-0000000001.json",
    "manifests/0001-0000000001.json\n",
    "attempts/0001.txt", "attempts/1.json", "attempts/00001.json", f"attempts/{DIGITS}.json", "attempts/0001.json/x",
    "checkpoints/0001-0000000001", "checkpoints/0001-0000000001/model", "checkpoints/0001-0000000001/model.pt.tmp",
    "checkpoints/0001-0000000001/sub/model.pt", "checkpoints/00001-0000000001/model.pt", "checkpoints/0001-0000000001.0/model.pt",
    "checkpoints/epoch=3-step=100.ckpt",
]  # fmt: skip


@pytest.mark.parametrize("key", FOREIGN, ids=ascii)
def test_a_foreign_key_is_none_of_ours(key: str) -> None:
    assert parse_manifest_key(key) is None
    assert parse_shard_key(key) is None
    assert parse_claim_key(key) is None


@given(
    st.text(max_size=60)
    | st.from_regex(r"(manifests|attempts|checkpoints|events)/\d{3,6}-?\d{0,12}(\.\d)?(\.json|/m\.pt)?")
)
def test_what_is_read_from_a_key_makes_that_key_again(key: str) -> None:
    if (identity := parse_manifest_key(key)) is not None:
        assert identity.manifest_key == key
    if (identity := parse_shard_key(key)) is not None:
        assert key.startswith(f"checkpoints/{identity}/")
    if (attempt := parse_claim_key(key)) is not None:
        assert claim_key(attempt) == key


@pytest.mark.parametrize(
    "text",
    ["", "latest", "0001", "0001-1", "1-0000000001", "0001-0000000001.", "0001-0000000001.0", f"{DIGITS}-0000000001"],
)
def test_what_is_no_id_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="0004-0000001200"):
        CheckpointId.parse(text)


@pytest.mark.parametrize("name", ["model", "_m", "Model_2", "m" * 100])
def test_a_member_name_that_can_name_a_shard_is_taken(name: str) -> None:
    check_member_name(name)
    assert parse_shard_key(CheckpointId(1, 1).shard_key(name)) == CheckpointId(1, 1)


@pytest.mark.parametrize("name", ["", "2nd", "a-b", "a.b", "a/b", "..", "modèle", "m" * 101, "a b", "a\n"])
def test_a_member_name_that_cannot_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="member name"):
        check_member_name(name)
