"""What every `ObjectStore` has to do. Join it by a subclass whose name begins with ``Test`` and a fixture ``store``."""

# ruff: noqa: PT012 - the block that is left by an exception is what is tested

import contextlib
import threading
import time
from collections.abc import Callable

import pytest

from spotguard.errors import ConfigError, DeadlineExceededError, ObjectExistsError, ObjectNotFoundError
from spotguard.stores import ObjectRef, ObjectStore

__all__ = ["ObjectStoreContract"]

ODD_KEYS = [
    "", "/", "/absolute", "..", "../up", "a/../b", "a/..", ".", "./a", "a//b", "a/", ".hidden", "a/.hidden", "ключ", "a/é", "a b", "a\\b",
    "a\0b", "a\n", "a:b", "a%2fb", "~", "x" * 201, "a/" * 460 + "a",
]  # fmt: skip


class ObjectStoreContract:
    """Join it with a fixture ``store`` that gives an empty store.

    Example:
        >>> from spotguard.stores import MemoryObjectStore
        >>> class TestMemoryObjectStore(ObjectStoreContract):
        ...     @pytest.fixture
        ...     def store(self):
        ...         return MemoryObjectStore()
    """

    @pytest.fixture
    def store(self) -> ObjectStore:
        """An empty store; to be overridden."""
        raise NotImplementedError(
            "give the class that joins the contract a fixture 'store' that returns an empty store"
        )

    # -- whole or not at all -------------------------------------------------------------------------------------------------------

    def test_what_was_written_is_read_back(self, store: ObjectStore) -> None:
        """In pieces, and from any kind of buffer."""
        with store.create("folder/object") as writer:
            assert writer.write(b"one ") == 4
            assert writer.write(memoryview(bytearray(b"two "))) == 4
            assert writer.write(b"") == 0
            assert writer.write(b"three") == 5
        assert writer.info is not None
        assert (writer.info.key, writer.info.size) == ("folder/object", 13)
        assert get(store, "folder/object") == b"one two three"
        assert store.stat("folder/object") == writer.info

    def test_an_object_of_no_bytes_is_an_object(self, store: ObjectStore) -> None:
        """Empty is not missing."""
        with store.create("empty"):
            pass
        info = store.stat("empty")
        assert info is not None
        assert info.size == 0
        assert get(store, "empty") == b""
        assert [found.key for found in store.list("")] == ["empty"]

    def test_an_object_of_some_mib_is_read_back(self, store: ObjectStore) -> None:
        """More than any buffer or part on the way, and no multiple of one."""
        data = bytes(range(256)) * (21 << 12) + b"tail"
        put(store, "large", data)
        assert get(store, "large") == data

    @pytest.mark.parametrize("exclusive", [False, True])
    def test_an_exception_inside_the_block_leaves_nothing(self, store: ObjectStore, *, exclusive: bool) -> None:
        """Whatever was written before it."""
        with pytest.raises(ZeroDivisionError), store.create("folder/object", exclusive=exclusive) as writer:
            writer.write(b"half")
            raise ZeroDivisionError
        assert_absent(store, "folder/object")
        put(store, "folder/object", b"whole", exclusive=exclusive)
        assert get(store, "folder/object") == b"whole"

    def test_an_exception_inside_the_block_leaves_the_old_object_intact(self, store: ObjectStore) -> None:
        """KeyboardInterrupt and its like included."""
        put(store, "object", b"old")
        for kind in (ZeroDivisionError, KeyboardInterrupt):
            with pytest.raises(kind), store.create("object") as writer:
                writer.write(b"new, and longer")
                raise kind
        assert get(store, "object") == b"old"
        assert [info.size for info in store.list("")] == [3]

    def test_nothing_is_visible_before_the_block_is_left(self, store: ObjectStore) -> None:
        """Not to open, not to stat, not to list."""
        with store.create("folder/object") as writer:
            for _ in range(3):
                writer.write(b"x" * (1 << 20))
                assert_absent(store, "folder/object")
        assert get(store, "folder/object") == b"x" * (3 << 20)

    def test_the_old_object_is_visible_until_the_new_one_is_whole(self, store: ObjectStore) -> None:
        """An overwrite is one step, and a reader that has the old one open reads it to its end."""
        put(store, "object", b"old")
        with store.open("object") as reader:
            with store.create("object") as writer:
                writer.write(b"new, and longer")
                assert get(store, "object") == b"old"
                assert [info.size for info in store.list("")] == [3]
            assert get(store, "object") == b"new, and longer"
            assert reader.read() == b"old"

    def test_a_reader_never_sees_a_partial_object(self, store: ObjectStore) -> None:
        """While another thread overwrites it again and again."""
        put(store, "object", b"0" * 1000)
        done = threading.Event()

        def overwrite() -> None:
            try:
                for round_ in range(1, 40):
                    with store.create("object") as writer:
                        for _ in range(round_):
                            writer.write(str(round_ % 10).encode() * 1000)
            finally:
                done.set()

        def read() -> None:
            while not done.is_set():
                with store.open("object") as reader:
                    data, size = reader.read(), reader.size
                assert len(data) == size
                assert len(set(data)) == 1, "bytes of two objects"
                assert len(data) // 1000 % 10 == int(data[:1]) or len(data) == 1000
                assert all(info.size % 1000 == 0 and info.size for info in store.list(""))

        together([overwrite, read, read])

    # -- exclusive -----------------------------------------------------------------------------------------------------------------

    def test_without_exclusive_the_last_writer_wins(self, store: ObjectStore) -> None:
        """A shorter one too."""
        put(store, "object", b"the first one")
        put(store, "object", b"second")
        assert get(store, "object") == b"second"

    def test_exclusive_refuses_a_key_that_is_taken(self, store: ObjectStore) -> None:
        """And leaves what is there alone."""
        put(store, "object", b"old")
        with pytest.raises(ObjectExistsError, match="object"), store.create("object", exclusive=True) as writer:
            writer.write(b"new")
        assert get(store, "object") == b"old"
        assert [info.key for info in store.list("")] == ["object"]

    def test_exclusive_works_again_after_a_delete(self, store: ObjectStore) -> None:
        """A deleted key is free."""
        put(store, "object", b"old", exclusive=True)
        store.delete([ObjectRef("object")])
        put(store, "object", b"new", exclusive=True)
        assert get(store, "object") == b"new"

    def test_of_eight_exclusive_writers_exactly_one_wins(self, store: ObjectStore) -> None:
        """And what is there afterwards is its content, whole."""
        for round_ in range(5):
            key = f"claims/{round_}"
            inside = threading.Barrier(8, timeout=30)
            won: list[int] = []

            def claim(number: int, key: str = key, inside: threading.Barrier = inside, won: list[int] = won) -> None:
                with contextlib.suppress(ObjectExistsError):
                    with store.create(key, exclusive=True) as writer:
                        writer.write(bytes([number]) * 100_000)
                        inside.wait()
                    won.append(number)

            together([lambda number=number, claim=claim: claim(number) for number in range(8)])  # type: ignore[misc]
            assert len(won) == 1
            assert get(store, key) == bytes(won) * 100_000
        assert [info.key for info in store.list("")] == [f"claims/{round_}" for round_ in range(5)]

    # -- reading -------------------------------------------------------------------------------------------------------------------

    def test_read_goes_on_where_it_stopped(self, store: ObjectStore) -> None:
        """Like a file."""
        put(store, "object", b"0123456789")
        with store.open("object") as reader:
            assert reader.size == 10
            assert (reader.read(3), reader.read(0), reader.read(4), reader.read(), reader.read(1)) == (
                b"012",
                b"",
                b"3456",
                b"789",
                b"",
            )

    @pytest.mark.parametrize(
        ("offset", "length", "expected"),
        [
            (0, 4, b"0123"),
            (3, 4, b"3456"),
            (0, 10, b"0123456789"),
            (8, 4, b"89"),
            (10, 4, b""),
            (1000, 4, b""),
            (5, 0, b""),
        ],
    )
    def test_read_into_fills_from_an_offset(
        self, store: ObjectStore, offset: int, length: int, expected: bytes
    ) -> None:
        """It stops at the end of the object, and touches neither the rest of the buffer nor the position."""
        put(store, "object", b"0123456789")
        buffer = bytearray(b"." * length)
        with store.open("object") as reader:
            assert reader.read(2) == b"01"
            assert reader.read_into(buffer, offset) == len(expected)
            assert reader.read(2) == b"23"
        assert buffer == expected.ljust(length, b".")

    def test_what_is_not_there_is_not_found(self, store: ObjectStore) -> None:
        """A part of a path is no object, and neither is what would lie below an object."""
        put(store, "folder/object", b"x")
        for key in ("nothing", "folder", "folder/nothing", "folder/object/below"):
            assert store.stat(key) is None
            with pytest.raises(ObjectNotFoundError):
                store.open(key)
        assert list(store.list("folder/object/")) == []

    def test_no_version_means_the_current_object(self, store: ObjectStore) -> None:
        """A store without versions reports None; whatever it reports can be handed back to it."""
        put(store, "object", b"x")
        info = store.stat("object")
        assert info is not None
        assert store.stat("object", version=info.version) == info
        with store.open("object", version=info.version) as reader:
            assert reader.read() == b"x"
        store.delete([info.ref])
        assert_absent(store, "object")

    # -- list ----------------------------------------------------------------------------------------------------------------------

    def test_list_is_in_the_order_of_the_keys(self, store: ObjectStore) -> None:
        """Of the whole keys, as bytes: ``a.b`` comes before ``a/b``, and ``a-b`` before both."""
        keys = ["a/b", "a.b", "a-b", "a0", "a/b.c/d", "a/b-c", "A", "b/10", "b/9", "b/1/z", "_", "a_b/c", "Z/z"]
        for size, key in enumerate(keys):
            put(store, key, b"x" * size)
        listed = list(store.list(""))
        assert [info.key for info in listed] == sorted(keys)
        assert {info.key: info.size for info in listed} == {key: size for size, key in enumerate(keys)}

    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            ("runs/", ["runs/0001", "runs/0002", "runs/sub/x"]),
            ("runs", ["runs/0001", "runs/0002", "runs/sub/x", "runs2/0001"]),
            ("runs/0", ["runs/0001", "runs/0002"]),
            ("runs/0001", ["runs/0001"]),
            ("runs/0001/", []),
            ("nothing/", []),
            ("nothing/at/all", []),
            ("", ["other", "runs/0001", "runs/0002", "runs/sub/x", "runs2/0001"]),
        ],
    )
    def test_list_takes_any_prefix(self, store: ObjectStore, prefix: str, expected: list[str]) -> None:
        """A prefix need not end at a slash."""
        for key in ("runs/0002", "runs/0001", "runs/sub/x", "runs2/0001", "other"):
            put(store, key, b"x")
        assert [info.key for info in store.list(prefix)] == expected

    def test_an_empty_store_lists_nothing(self, store: ObjectStore) -> None:
        """And that is no error."""
        assert list(store.list("")) == []

    # -- delete --------------------------------------------------------------------------------------------------------------------

    def test_delete_removes_what_is_named_and_nothing_else(self, store: ObjectStore) -> None:
        """Any number at once."""
        for key in ("a/1", "a/2", "a/3", "b"):
            put(store, key, b"x")
        store.delete(ObjectRef(key) for key in ("a/1", "a/3"))
        assert [info.key for info in store.list("")] == ["a/2", "b"]

    def test_delete_of_what_is_gone_is_no_error(self, store: ObjectStore) -> None:
        """Nor is deleting nothing, a part of a path, or what would lie below an object."""
        put(store, "folder/object", b"x")
        store.delete([])
        store.delete(
            [ObjectRef("nothing"), ObjectRef("no/such/thing"), ObjectRef("folder"), ObjectRef("folder/object/below")]
        )
        assert get(store, "folder/object") == b"x"
        store.delete([ObjectRef("folder/object"), ObjectRef("folder/object")])
        store.delete([ObjectRef("folder/object")])
        assert_absent(store, "folder/object")

    def test_neighbours_that_come_and_go_do_not_disturb_each_other(self, store: ObjectStore) -> None:
        """Creates and deletes below one prefix, which is empty again and again."""

        def come_and_go(number: int) -> None:
            key = f"checkpoints/one/{number}"
            for _ in range(25):
                put(store, key, b"x", exclusive=True)
                assert get(store, key) == b"x"
                store.delete([ObjectRef(key)])
                assert store.stat(key) is None

        together([lambda number=number: come_and_go(number) for number in range(4)])  # type: ignore[misc]
        assert list(store.list("")) == []

    def test_several_may_delete_the_same(self, store: ObjectStore) -> None:
        """Two sweeps at once."""
        keys = [f"checkpoints/{folder}/{name}" for folder in range(10) for name in range(2)]
        for key in keys:
            put(store, key, b"x")
        together([lambda: store.delete(ObjectRef(key) for key in keys)] * 4)
        assert list(store.list("")) == []

    def test_writers_and_deleters_of_one_key_meet_in_peace(self, store: ObjectStore) -> None:
        """Each object is there whole, or not at all."""

        def write() -> None:
            for _ in range(25):
                put(store, "checkpoints/one/x", b"whole")

        def delete() -> None:
            for _ in range(50):
                store.delete([ObjectRef("checkpoints/one/x")])

        together([write, write, delete, delete])
        put(store, "checkpoints/one/x", b"whole")
        assert get(store, "checkpoints/one/x") == b"whole"

    # -- deadline ------------------------------------------------------------------------------------------------------------------

    def test_a_deadline_that_has_passed_leaves_nothing(self, store: ObjectStore) -> None:
        """It is found before the first byte."""
        with pytest.raises(DeadlineExceededError), store.create("object", deadline=time.monotonic() - 1) as writer:
            writer.write(b"x")
        assert_absent(store, "object")

    def test_a_deadline_that_passes_inside_the_block_leaves_nothing(self, store: ObjectStore) -> None:
        """Also when nothing more is written after it; the old object stands."""
        put(store, "object", b"old")
        deadline = time.monotonic() + 0.05
        with pytest.raises(DeadlineExceededError), store.create("object", deadline=deadline) as writer:
            writer.write(b"new")
            while time.monotonic() <= deadline:
                pass
        with pytest.raises(DeadlineExceededError), store.create("object", deadline=time.monotonic() + 0.05) as writer:
            while True:
                writer.write(b"more ")
        assert get(store, "object") == b"old"
        assert [info.key for info in store.list("")] == ["object"]

    def test_a_deadline_that_is_far_off_changes_nothing(self, store: ObjectStore) -> None:
        """The usual case."""
        with store.create("object", exclusive=True, deadline=time.monotonic() + 600) as writer:
            writer.write(b"x")
        assert get(store, "object") == b"x"

    # -- keys and partial objects --------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
    def test_an_odd_key_is_refused(self, store: ObjectStore, key: str) -> None:
        """By every verb, before anything happens."""
        with pytest.raises(ConfigError, match="key"), store.create(key) as writer:
            writer.write(b"x")
        with pytest.raises(ConfigError, match="key"):
            store.open(key)
        with pytest.raises(ConfigError, match="key"):
            store.stat(key)
        with pytest.raises(ConfigError, match="key"):
            store.delete([ObjectRef(key)])
        assert list(store.list("")) == []

    @pytest.mark.parametrize("prefix", ["/", "..", "../", "a/../", "a//", ".", "é/", "a\0"], ids=ascii)
    def test_an_odd_prefix_is_refused(self, store: ObjectStore, prefix: str) -> None:
        """At the call, not at the first element."""
        with pytest.raises(ConfigError, match="key"):
            store.list(prefix)

    @pytest.mark.parametrize(
        "key", ["a", "A-Z_0.9", "x" * 200, "deep/" * 20 + "end", "0001-0000000001.1/rank-00000.pt"]
    )
    def test_a_plain_key_is_taken(self, store: ObjectStore, key: str) -> None:
        """Letters, digits, dot, dash, underscore; up to 200 to a component."""
        put(store, key, b"x", exclusive=True)
        assert get(store, key) == b"x"

    def test_discarding_partials_leaves_whole_objects_alone(self, store: ObjectStore) -> None:
        """Whatever is said to be stale."""
        put(store, "folder/object", b"x", exclusive=True)
        put(store, "other", b"y")
        store.discard_partials(lambda _: True)
        assert get(store, "folder/object") == b"x"
        assert get(store, "other") == b"y"
        with pytest.raises(ObjectExistsError), store.create("folder/object", exclusive=True):
            pass


def put(store: ObjectStore, key: str, data: bytes, *, exclusive: bool = False) -> None:
    """Write an object."""
    with store.create(key, exclusive=exclusive) as writer:
        writer.write(data)


def get(store: ObjectStore, key: str) -> bytes:
    """Read an object."""
    with store.open(key) as reader:
        return reader.read()


def assert_absent(store: ObjectStore, key: str) -> None:
    """Nothing is visible under the key, by any verb."""
    assert store.stat(key) is None
    assert key not in [info.key for info in store.list("")]
    with pytest.raises(ObjectNotFoundError):
        store.open(key)


def together(actions: list[Callable[[], None]]) -> None:
    """Run each in a thread, all started at once, and raise what the first of them raised."""
    start = threading.Barrier(len(actions), timeout=30)
    errors: list[BaseException] = []

    def run(action: Callable[[], None]) -> None:
        start.wait()
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread of the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
