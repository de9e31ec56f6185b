"""Contract suites: what every implementation of a protocol of ours has to pass, for third parties too. Needs pytest.

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

__all__ = ["ObjectStoreContract"]
