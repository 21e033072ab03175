import os
import socket

import pytest


def test_the_hub_is_switched_off():
    from huggingface_hub import constants

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid"])
def test_nothing_leaves_this_machine(host):
    with pytest.raises(RuntimeError, match=f"offline, but something tried to reach '{host}'"):
        socket.create_connection((host, 80), timeout=0.1)


def test_a_local_server_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5):
            pass
