"""What a version says of the machine that published it."""

import getpass
import json
import socket

import numpy
import torch

from diffstill.environment import environment


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
