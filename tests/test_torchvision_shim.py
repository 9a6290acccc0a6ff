"""torchvision, and timm on it, beside whatever build of torch is here."""

import os
import subprocess
import sys

from diffstill import torchvision_shim


def python(code, *, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ, capture_output=True, text=True, check=False)


def test_diffstill_lets_others_load_and_itself_loads_nothing(tmp_path):
    done = python(
        "import sys, diffstill; assert 'torch' not in sys.modules; import torchvision, timm; timm.create_model('test_convnext')", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_an_environment_with_it_loads_them_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_shim.sysconfig, "get_path", lambda _: str(tmp_path))
    assert torchvision_shim.install().parent == tmp_path
    start = f"import site; site.addsitedir({str(tmp_path)!r})"
    done = python(f"{start}; from torchvision.transforms import ToTensor; ToTensor()", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
