"""Contract suites: what every implementation of a protocol of ours has to pass, for third parties too. Needs pytest.

And `FaultProxy`, which makes the trouble of networks and services between a client and its object store.

::

    from spotguard.testing import ObjectStoreContract

    class TestMyStore(ObjectStoreContract):
        @pytest.fixture
        def store(self) -> MyStore:
            return MyStore(...)
"""

import pytest

pytest.register_assert_rewrite("spotguard.testing.object_store")

from spotguard.testing.object_store import ObjectStoreContract  # noqa: E402 - the line above must come first
from spotguard.testing.proxy import (  # noqa: E402
    Call,
    DropHeader,
    Fault,
    FaultProxy,
    Flip,
    Latency,
    LostResponse,
    Request,
    Reset,
    Stall,
    Status,
    Truncate,
    each,
    matching,
    nth,
)

__all__ = [
    "Call",
    "DropHeader",
    "Fault",
    "FaultProxy",
    "Flip",
    "Latency",
    "LostResponse",
    "ObjectStoreContract",
    "Request",
    "Reset",
    "Stall",
    "Status",
    "Truncate",
    "each",
    "matching",
    "nth",
]
