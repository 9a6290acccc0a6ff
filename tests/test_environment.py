"""What a version says of the machine that published it."""

import getpass
import json
import socket

import numpy
import pytest
import torch

from diffstill.environment import environment, rank_here
from diffstill.errors import DiffstillError


def test_it_names_packages_and_processor():
    found = environment()
    assert (found["torch"], found["numpy"]) == (torch.__version__, numpy.__version__)
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["processor"]
    assert ("gpu" in found) == torch.cuda.is_available()


def test_it_is_the_same_each_time_and_fits_a_tag():
    told = json.dumps(environment(), sort_keys=True)
    assert told == json.dumps(environment(), sort_keys=True)
    assert len(told) < 5000


def test_it_names_no_host_and_no_user():
    values = set(environment().values())
    assert not values & {socket.gethostname(), getpass.getuser()}


def test_ranks_are_known_only_where_torchrun_says_all_of_it(monkeypatch):
    said = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert rank_here() == (1, 2)
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(DiffstillError, match="RANK and WORLD_SIZE are '1' and 'x', no numbers"):
        rank_here()
    for name, value in said.items():
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv(name)
        assert rank_here() == (0, 1)  # a scheduler that sets some of them for purposes of its own
        monkeypatch.setenv(name, value)
