"""The pytest plugin: the fixture `nfqueue_sandbox`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .testing import Sandbox


@pytest.fixture
def nfqueue_sandbox() -> Iterator[Sandbox]:
    """A fresh `netfilterqueue.testing.Sandbox`, closed after the test.

    Where namespaces are forbidden, the test is skipped with the reason; it fails instead if the
    environment variable NETFILTERQUEUE_REQUIRE_NAMESPACES is 1.
    """
    # Not above: this module is loaded by every run of pytest, and few use the fixture.
    from .testing import Sandbox, SandboxUnavailable

    try:
        sandbox = Sandbox()
    except SandboxUnavailable as error:
        if os.environ.get("NETFILTERQUEUE_REQUIRE_NAMESPACES") == "1":
            raise
        pytest.skip(str(error))
    with sandbox:
        yield sandbox
