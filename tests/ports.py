"""Ports for tests of several processes."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Returns the number of a port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
