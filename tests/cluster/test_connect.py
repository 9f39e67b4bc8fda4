"""What a job hears when no Ray cluster answers."""

import socket

import pytest

from raysae.cluster.connect import connect
from raysae.config import UserError


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=f"resources.address is {address}, where no Ray cluster answers"):
        connect(address, 0)
