"""Are two states the same, bit for bit: the difference in words and the fingerprint agree."""

import copy
import math
import struct
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spotguard.state.compare import fingerprint, first_difference


def type_name(value: Any) -> str:
    """A test id that is the same in every process: an address or the order of a set is not."""
    return (
        next(iter(value))
        if isinstance(value, dict) and value and isinstance(next(iter(value)), str)
        else type(value).__name__
    )


OTHER_NAN = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000001))[0]

EQUAL: list[tuple[Any, Any]] = [
    (math.nan, math.nan),
    ([1, 2], (1, 2)),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    (torch.tensor([math.nan, -0.0]), torch.tensor([math.nan, -0.0])),
    (torch.ones(3), torch.nn.Parameter(torch.ones(3))),
    (torch.arange(6).view(2, 3), torch.arange(6).view(2, 3).t().contiguous().t()),
    (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
    (torch.empty(0, 3), torch.empty(0, 3)),
    ({}, {}),
    ({"b", "a", "c"}, {"c", "a", "b"}),
    (torch.Size([2, 3]), [2, 3]),
]

DIFFERENT: list[tuple[Any, Any]] = [
    (0.0, -0.0),
    (0, 0.0),
    (1, True),
    (1, "1"),
    (b"1", "1"),
    (math.nan, OTHER_NAN),
    (None, 0),
    ([], {}),
    ([], None),
    ([1], [1, 2]),
    ([[1], 2], [1, [2]]),
    ({"a": 1}, {"a": 1, "b": None}),
    ({1: "x"}, {"1": "x"}),
    ({1: "x"}, {True: "x"}),
    ({0.0: "x"}, {-0.0: "x"}),
    (torch.tensor(1.0), 1.0),
    (torch.tensor(0.0), torch.tensor(-0.0)),
    (torch.zeros(2), torch.zeros(2, 1)),
    (torch.zeros(0, 2), torch.zeros(2, 0)),
    (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    (torch.zeros(2, dtype=torch.int32), torch.zeros(2)),
    (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]).conj()),
    (torch.tensor([1.0]).to(torch.float8_e4m3fn), torch.tensor([2.0]).to(torch.float8_e4m3fn)),
    (torch.tensor([True]), torch.tensor([False])),
    (1 + 0j, complex(1, -0.0)),
    ({"a"}, {"b"}),
]


@pytest.mark.parametrize(("one", "other"), EQUAL, ids=type_name)
def test_these_are_equal(one: Any, other: Any) -> None:
    assert first_difference(one, other) is None
    assert fingerprint(one) == fingerprint(other)
    assert first_difference({"x": [one]}, {"x": [other]}) is None


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=type_name)
def test_these_are_different(one: Any, other: Any) -> None:
    for left, right in ((one, other), (other, one), ({"x": [one]}, {"x": [other]})):
        assert first_difference(left, right) is not None
        assert fingerprint(left) != fingerprint(right)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int8, torch.bool, torch.complex64, torch.float64]
)
def test_one_flipped_bit_of_a_tensor_is_found_and_named(dtype: torch.dtype) -> None:
    one = torch.zeros(2, 5, dtype=dtype)
    other = one.clone()
    other.view(torch.uint8).view(-1)[7 * one.element_size()] ^= 1
    found = first_difference({"model": one}, {"model": other})
    assert found is not None
    assert found.startswith("['model']: 1 of 10 elements differ, first at 7: ")
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_compared_by_value() -> None:
    one = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse()
    other = torch.tensor([[0.0, 1.0], [3.0, 0.0]]).to_sparse()
    assert first_difference(one, one.clone()) is None
    found = first_difference(one, other)
    assert found is not None
    assert "first at 2: 2.0 and 3.0" in found


def test_the_difference_names_its_place() -> None:
    one = {"optimizer": {"state": {0: {"step": 1}}, "groups": [{"lr": 0.1}]}}
    other = copy.deepcopy(one)
    other["optimizer"]["groups"][0]["lr"] = 0.2  # type: ignore[index]
    assert first_difference(one, other) == "['optimizer']['groups'][0]['lr']: 0.1 and 0.2"
    assert first_difference({"a": 1}, {}) == "['a']: only in the first"
    assert first_difference({}, {"a": 1}) == "['a']: only in the second"


LEAVES = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, -0.0, 1.0, math.nan]) | st.sampled_from(["", "a", b"a"])
    | st.lists(st.sampled_from([0.0, -0.0, math.nan]), max_size=2).map(torch.tensor)
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["a", "b", 0, 1, False, True, 0.0]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=1000, deadline=None)
@given(TREES, TREES)
def test_the_fingerprint_is_equal_exactly_where_no_difference_is_found(one: Any, other: Any) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (first_difference(one, other) is None)
    assert first_difference(one, copy.deepcopy(one)) is None
    assert fingerprint(one) == fingerprint(copy.deepcopy(one))


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    code = "from spotguard.state.compare import fingerprint as f; print(f([{'a': 1, 2: 'b'}, {'x', 'y', 'z'}, 0.5]))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
