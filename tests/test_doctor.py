"""The examination of a machine: complete, and silent about secrets."""

import importlib.metadata

import pytest
from click.testing import CliRunner

from diffstill import doctor
from diffstill.cli import main

SENTINEL = "s3cr3t"
PLANTED = {
    "AWS_ACCESS_KEY_ID": SENTINEL,
    "AWS_SECRET_ACCESS_KEY": SENTINEL,
    "AWS_SESSION_TOKEN": SENTINEL,
    "MLFLOW_TRACKING_PASSWORD": SENTINEL,
    "HF_TOKEN": SENTINEL,
    "MLFLOW_TRACKING_URI": f"https://user:{SENTINEL}/{SENTINEL}@mlflow.example:5000/here?token={SENTINEL}",
    "AWS_ENDPOINT_URL": f"http://{SENTINEL}@minio.example:9000",
}


def examine(**environment):
    return CliRunner(env=environment).invoke(main, ["doctor"])


def test_no_secret_is_printed():
    result = examine(**PLANTED)
    assert result.exit_code == 0, result.output
    assert SENTINEL not in result.output
    assert "https://***@mlflow.example:5000/here?***" in result.output
    assert "http://***@minio.example:9000" in result.output


def test_versions_device_disk_and_endpoints_are_told():
    output = " ".join(examine(DIFFSTILL_WORK="/scratch/[bold]work").output.split())
    for name in (*doctor.NEEDED, "dvc"):
        assert f"{name} {importlib.metadata.version(name)} ok" in output
    for what in ("python", "device", "memory", "GiB free", "current folder writable ok", "MLFLOW_TRACKING_URI none", "/scratch/[bold]work"):
        assert what in output


def test_secrets_are_reported_as_set_or_not():
    output = " ".join(examine(HF_TOKEN=SENTINEL, AWS_SECRET_ACCESS_KEY="").output.split())
    assert "HF_TOKEN set" in output
    assert "AWS_SECRET_ACCESS_KEY not set" in output


@pytest.mark.parametrize(("knob", "value", "told"), [("NEEDED", ("torch", "no-such-package"), "no-such-package"), ("MIN_DISK_GIB", 1e9, "disk")])
def test_what_is_missing_ends_in_exit_code_2(knob, value, told, monkeypatch):
    monkeypatch.setattr(doctor, knob, value)
    result = examine()
    assert result.exit_code == 2
    assert result.stderr == "error: something that diffstill needs is missing, see above\n"
    assert [line.split()[0] for line in result.stdout.splitlines() if line.rstrip().endswith("missing")] == [told]


def test_an_optional_package_may_be_missing(monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-package",))
    result = examine()
    assert result.exit_code == 0
    assert "no-such-package           not installed (optional)" in result.stdout
