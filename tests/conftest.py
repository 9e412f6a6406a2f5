"""No test reaches the network, none writes into the user's cache, and the same tests run everywhere."""

import os
import socket

import pytest
import torch
from hypothesis import settings

# The same examples in every run, on a machine of any speed. To search for new ones: pytest --hypothesis-profile=search
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=2_000)
settings.load_profile("repeatable")

# The tests run in two processes on small machines: threads of one that wait for the other cost more than they bring.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path_factory):
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        raise OSError(f"a test tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setenv("LLMFORGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _same_randomness():
    torch.manual_seed(0)
