"""The codec: what it writes is what `torch.save` would have written, as far as `torch.load` can tell."""

import collections
import io
import mmap
import os
import pickle
import re
import resource
import time
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spotguard.errors import CheckpointDamagedError, ConfigError
from spotguard.state.codec import Layout, MemoryFile, check_loadable, decode, encode
from spotguard.state.compare import fingerprint, first_difference
from spotguard.state.snapshot import HostBuffers

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def image_of(tree: Any) -> bytes:
    return bytes(HostBuffers().capture("tree", tree))


def as_torch_has_it(tree: Any) -> Any:
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check(tree: Any) -> Any:
    """Both ways give the same, down to strides, flags and shared memory; returns what was read."""
    found, expected = decode(image_of(tree), key="tree"), as_torch_has_it(tree)
    assert first_difference(found, expected) is None
    assert fingerprint(found) == fingerprint(tree)
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert (one.dtype, one.shape, one.layout, one.requires_grad, type(one)) == (
            other.dtype,
            other.shape,
            other.layout,
            other.requires_grad,
            type(other),
        )
        if one.layout is torch.strided:
            assert (one.stride(), one.storage_offset(), one.is_conj(), one.is_neg()) == (
                other.stride(),
                other.storage_offset(),
                other.is_conj(),
                other.is_neg(),
            )
    return found


def tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in tensors(value)]
    if isinstance(tree, (list, tuple)):
        return [tensor for value in tree for tensor in tensors(value)]
    return []


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).mul(3).to(dtype)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (3, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check({"x": some(dtype, *shape)})


BASE = some(torch.float32, 6, 8)
COMPLEX = some(torch.complex64, 4, 4)


@pytest.mark.parametrize(
    "tree",
    [
        {"view": BASE[2:4, 1:7:2], "base": BASE, "transposed": BASE.t(), "expanded": BASE[0].expand(5, 8)},
        {"view alone": BASE[3:]},
        {"tied": [BASE, BASE], "again": (BASE.view(8, 6),)},
        {"conj": COMPLEX.conj(), "plain": COMPLEX},
        {"one element, stride 8": BASE[:1, 0]},
        {"negative": torch.tensor([1 + 2j]).conj().imag},
        {"channels last": some(torch.float32, 2, 3, 4, 5).to(memory_format=torch.channels_last)},
        {"parameter": torch.nn.Parameter(BASE.clone()), "frozen": torch.nn.Parameter(BASE.clone(), requires_grad=False)},
        {"leaf": BASE.clone().requires_grad_()},
        {"size": torch.Size([2, 3]), "dtype": torch.bfloat16, "device": torch.device("cpu")},
        {"nan": torch.tensor([float("nan"), -0.0, 0.0, float("inf")]), "float": float("-inf")},
        {"storages of no size": [torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int8)]},
    ],
    ids=lambda tree: next(iter(tree)),
)  # fmt: skip
def test_tensors_of_every_kind(tree: Any) -> None:
    check(tree)


@pytest.mark.parametrize(
    "tree",
    [
        None,
        True,
        0,
        2**31,
        -(2**63),
        2**64,
        2**500,
        -(2**500),
        0.1,
        1e308,
        "",
        "größe \0 \ud7ff \U0001f600" * 10,
        bytes(range(256)),
        bytearray(b"abc"),
        [],
        (),
        {},
        (1,),
        {"a": {"b": [{"c": (1, [2, {3: 4}])}]}},
        {1: "int", None: "none", (1, 2): "tuple", "s": "str", 1.5: "float"},
        collections.OrderedDict(b=1, a=2),
        1 + 2j,
        [[1, 2]] * 3,
    ],
    ids=lambda tree: ascii(tree)[:30],
)
def test_plain_values_of_every_kind(tree: Any) -> None:
    assert decode(image_of(tree), key="tree") == tree
    assert type(decode(image_of(tree), key="tree")) is type(tree)
    assert decode(image_of({"value": tree}), key="tree") == as_torch_has_it({"value": tree})


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:Sparse")
def test_sparse_tensors() -> None:
    check({"coo": torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 0]]), torch.tensor([3.0, 4.0]), (3, 2))})
    check({"csr": BASE.relu().to_sparse_csr()})


def test_what_shares_memory_shares_it_again() -> None:
    weight = torch.ones(4, 4)
    found = check({"encoder": weight, "decoder": weight.t(), "row": weight[1]})
    found["encoder"][1, 2] = 7
    assert found["decoder"][2, 1] == 7
    assert found["row"][2] == 7
    assert len(encode([weight, weight.t(), weight[1]])[1]) == 1


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(min_size=1, max_size=8)
)
TENSORS = st.builds(
    lambda dtype, shape, view: (some(dtype, *shape).transpose(0, -1) if view and shape else some(dtype, *shape)),
    st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans(),
)  # fmt: skip
TREES = st.recursive(
    LEAVES | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_tree(tree: Any) -> None:
    check(tree)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_models_and_optimizers(optimizer: Any) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Linear(2 * 36, 3)
    )
    stepper = optimizer(model.parameters(), lr=0.1)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    stepper.step()
    check(model.state_dict())
    check(stepper.state_dict())


def test_the_file_is_an_ordinary_torch_file_that_can_be_mapped(tmp_path: Path) -> None:
    tree = {"weight": some(torch.float32, 100, 100), "step": 7}
    path = tmp_path / "model.pt"
    path.write_bytes(image_of(tree))
    for mapped in (False, True):
        assert first_difference(torch.load(path, weights_only=True, mmap=mapped), tree) is None
    with zipfile.ZipFile(path) as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert [info.filename for info in archive.infolist()][:2] == ["archive/data.pkl", "archive/byteorder"]


def test_every_storage_is_aligned_and_holds_its_bytes_as_they_are() -> None:
    storages = [some(torch.float32, size) for size in (1, 3, 100, 0, 17)]
    data, live = encode(storages)
    layout = Layout(len(data), [storage.nbytes() for storage in live])
    image = image_of(storages)
    assert len(image) == layout.size
    for tensor, offset in zip(storages, layout.offsets, strict=True):
        assert offset % 64 == 0
        assert image[offset : offset + tensor.nbytes] == tensor.numpy().tobytes()


@pytest.mark.parametrize("sizes", [[5 << 30, 64], [64, 5 << 30], [(1 << 32) - 1, 3], [3 << 30, 3 << 30, 64]], ids=str)
def test_above_4_gib_torch_reads_it_all_the_same(tmp_path: Path, sizes: list[int]) -> None:
    data = _pickle_of_bytes(sizes)
    layout = Layout(len(data), sizes)
    path = tmp_path / "large.pt"
    with path.open("wb+") as file:
        file.truncate(layout.size)  # sparse: takes no room
        with mmap.mmap(file.fileno(), layout.size) as pages, memoryview(pages) as image:
            layout.write_frame(image)
            layout.write_pickle(image, data)
            for number, (offset, size) in enumerate(zip(layout.offsets, sizes, strict=True), start=1):
                image[offset] = number
                image[offset + size - 1] = 100 + number
    found = torch.load(path, weights_only=True, mmap=True)
    assert [len(tensor) for tensor in found] == sizes
    assert [(int(tensor[0]), int(tensor[-1])) for tensor in found] == [(n, 100 + n) for n in range(1, len(sizes) + 1)]
    with zipfile.ZipFile(path) as archive:
        assert [info.file_size for info in archive.infolist()[2:-1]] == sizes


def _pickle_of_bytes(sizes: list[int]) -> bytes:
    """The pickle of a list of byte tensors of these sizes, which need not exist."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj if isinstance(obj, tuple) and obj and obj[0] == "storage" else None

    class Rebuilt:
        def __init__(self, index: int, size: int) -> None:
            self.index, self.size = index, size

        def __reduce__(self) -> Any:
            storage = ("storage", torch.ByteStorage, str(self.index), "cpu", self.size)
            empty: dict[str, Any] = collections.OrderedDict()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (self.size,), (1,), False, empty)

    file = io.BytesIO()
    Pickler(file, protocol=2).dump([Rebuilt(index, size) for index, size in enumerate(sizes)])
    return file.getvalue()


def test_more_storages_than_16_bits_count() -> None:
    sizes = [number % 3 for number in range(66_000)]
    layout = Layout(100, sizes)
    image = memoryview(bytearray(layout.size))
    layout.write_frame(image)
    for number in (1, 65_536, 65_999):
        image[layout.offsets[number] : layout.offsets[number] + sizes[number]] = b"x" * sizes[number]
    with zipfile.ZipFile(io.BytesIO(image)) as archive:
        assert len(archive.infolist()) == 66_003
        assert [archive.getinfo(f"archive/data/{number}").file_size for number in (1, 65_536, 65_999)] == [1, 1, 2]


def test_buffers_are_reused_from_capture_to_capture() -> None:
    buffers = HostBuffers()
    weight = torch.zeros(1000)
    first = buffers.capture("model", {"weight": weight, "step": 9})
    address = torch.frombuffer(first, dtype=torch.uint8).data_ptr()
    weight += 1
    second = buffers.capture("model", {"weight": weight, "step": 10**30})  # a longer pickle, but there is room
    assert torch.frombuffer(second, dtype=torch.uint8).data_ptr() == address
    assert first_difference(decode(second, key="model"), {"weight": torch.ones(1000), "step": 10**30}) is None


def test_a_pickle_that_outgrows_its_room_gets_a_new_buffer_and_a_shorter_one_leaves_nothing_behind() -> None:
    buffers = HostBuffers()
    for length in (10, 100_000, 5_000, 200_000, 0):
        tree = {"text": "x" * length, "weight": torch.full((3,), float(length))}
        assert first_difference(decode(buffers.capture("model", tree), key="model"), tree) is None


def test_tensors_that_grow_or_come_late_get_a_new_buffer() -> None:
    buffers = HostBuffers()
    for sizes in ([], [3], [3, 4], [4, 3], [0], [5]):
        tree = [torch.arange(size) for size in sizes]
        assert first_difference(decode(buffers.capture("optimizer", tree), key="optimizer"), tree) is None


def test_a_snapshot_does_not_change_with_the_state() -> None:
    weight = torch.zeros(10)
    image = HostBuffers().capture("model", {"weight": weight})
    weight.fill_(5)
    assert first_difference(decode(image, key="model"), {"weight": torch.zeros(10)}) is None


def test_the_same_state_gives_the_same_bytes() -> None:
    model = torch.nn.Linear(3, 3)
    assert image_of(model.state_dict()) == image_of(model.state_dict())


def test_one_memory_seen_as_two_types_is_refused() -> None:
    weight = torch.zeros(4)
    with pytest.raises(ConfigError, match=r"torch\.float32 and as torch\.int32"):
        encode([weight, weight.view(torch.int32)])


def _refused() -> list[tuple[str, Any, str]]:
    import datetime as dt

    import numpy as np

    return [
        ("array", np.zeros(3), "numpy"),
        ("module", torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        ("lambda", lambda: None, "lambda"),
        ("time", dt.datetime(2026, 1, 1), r"datetime\.datetime"),
        ("path", Path("x"), "Path"),
        ("open file", io.BytesIO, "BytesIO"),
        ("generator", (number for number in range(3)), "generator"),
        ("no bytes at all", b"", "bytes"),
        ("class of ours", HostBuffers(), r"HostBuffers"),
    ]


@pytest.mark.parametrize(
    ("what", "value", "named"), _refused(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_could_not_be_read_back_is_refused_by_name(what: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        check_loadable("ema", {"deep": [{what: value}]})
    assert "member 'ema'" in str(caught.value)


def test_what_can_be_read_back_is_not_refused() -> None:
    model = torch.nn.Linear(2, 2)
    check_loadable("model", model.state_dict())
    check_loadable("optimizer", torch.optim.AdamW(model.parameters()).state_dict())


@pytest.mark.parametrize("data", [b"", b"not a torch file", b"PK\x03\x04" + b"\0" * 100, b"\0" * 5000], ids=len)
def test_what_is_no_torch_file_is_damage(data: bytes) -> None:
    with pytest.raises(CheckpointDamagedError, match="the key"):
        decode(data, key="the key")


def test_code_in_a_file_is_not_run() -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit('code was run')",)

    file = io.BytesIO()
    torch.save({"x": Harmful()}, file)
    with pytest.raises(CheckpointDamagedError, match="weights_only"):
        decode(file.getvalue(), key="key")


def test_a_memory_file_is_a_file() -> None:
    file = MemoryFile(b"0123456789")
    assert file.readable()
    assert file.seekable()
    assert file.read(3) == b"012"
    assert file.seek(-2, io.SEEK_END) == 8
    assert file.read() == b"89"
    assert file.read() == b""
    assert file.seek(1) == file.tell() == 1
    assert file.seek(1, io.SEEK_CUR) == 2
    assert file.seek(100) == 100
    assert file.read(1) == b""
    assert cast("IO[bytes]", file).read() == b""


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="elsewhere than on Linux a forked child shares it")
def test_a_forked_child_finds_nothing_of_a_snapshot_and_costs_the_next_one_nothing() -> None:
    """As a worker of a data loader does. Pages that it shared would be copied one by one when they are written to."""
    buffers, weight = HostBuffers(), torch.ones(8 << 20)
    image = buffers.capture("model", {"weight": weight})
    child = os.fork()
    if not child:
        try:
            found = any(image[:: 1 << 16])
            time.sleep(0.5)  # it lives on while the parent goes on
            os._exit(found)
        finally:
            os._exit(2)
    weight += 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    image = buffers.capture("model", {"weight": weight})
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert os.waitpid(child, 0)[1] == 0
    assert faults < len(image) / resource.getpagesize() / 10
    assert first_difference(decode(image, key="model"), {"weight": torch.full((8 << 20,), 2.0)}) is None


def test_a_forked_child_can_take_a_snapshot_of_its_own() -> None:
    buffers, weight = HostBuffers(), torch.ones(1000)
    image = buffers.capture("model", {"weight": weight})
    child = os.fork()
    if not child:
        try:
            found = decode(buffers.capture("model", {"weight": weight.fill_(2)}), key="model")
            os._exit(first_difference(found, {"weight": torch.full((1000,), 2.0)}) is not None)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert first_difference(decode(image, key="model"), {"weight": torch.ones(1000)}) is None


def test_a_snapshot_lies_in_large_pages_where_the_system_has_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no large pages for those who ask")
    buffers = HostBuffers()
    image = buffers.capture("model", {"weight": torch.ones(8 << 20)})
    address, large = torch.frombuffer(image, dtype=torch.uint8).data_ptr(), 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < address + len(image) and int(found[2], 16) > address
        elif inside and line.startswith("AnonHugePages:"):
            large += int(line.split()[1]) * 1024
    assert large >= len(image) / 2
