"""Nothing in the tests reaches another machine: an audit hook in conftest.py refuses it, and this tests the hook."""

import socket
import urllib.request

import pytest

import conftest


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])  # which no machine has
def test_a_connection_to_another_machine_fails_at_once_and_is_noted(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as caller, pytest.raises(OSError, match="tests reach nothing outside this machine"):
        caller.connect((address, 80))
    assert [f"{address}:80"] == conftest.REACHED
    conftest.REACHED.clear()


def test_a_name_is_not_looked_up_either() -> None:
    with pytest.raises(OSError, match="tests reach nothing outside this machine"):
        urllib.request.urlopen("https://example.org")
    assert conftest.REACHED == ["example.org:443"]
    conftest.REACHED.clear()


def test_this_machine_is_reached() -> None:
    with socket.socket() as server, socket.socket() as caller:
        server.bind(("127.0.0.1", 0))
        server.listen()
        caller.connect(server.getsockname())
    assert conftest.REACHED == []
