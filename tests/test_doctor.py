"""The examination of a machine: complete, and silent about secrets."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import boto3
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from pydantic import ValidationError

from diffstill import doctor
from diffstill.cli import main
from diffstill.doctor import Needs, preflight
from diffstill.errors import DiffstillError, TransientError
from servers import free_port, s3, s3_environment, served

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
    for name in (*doctor.NEEDED, "dvc"):  # torchvision and what rests on it may have been built for another torch
        assert re.search(rf"\b{name} {re.escape(importlib.metadata.version(name))}( ok|, works in diffstill|, built for another)", output)
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


def test_what_is_installed_but_cannot_be_imported_is_missing(tmp_path, monkeypatch):
    (tmp_path / "broken-1.2.dist-info").mkdir()
    (tmp_path / "broken-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.2\n")
    (tmp_path / "broken.py").write_text("raise OSError('libcudart.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "NEEDED", ("broken",))
    monkeypatch.setattr(doctor, "OPTIONAL", ())
    result = examine(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert result.exit_code == 2
    told = "1.2, cannot be imported (OSError: libcudart.so: cannot open shared object file); install it anew"
    assert told in " ".join(result.stdout.replace("missing", "").split())


def test_what_works_in_diffstill_alone_is_told_with_the_fix(monkeypatch):
    reason = {"torchvision": "RuntimeError: operator torchvision::nms does not exist"}
    monkeypatch.setattr(doctor, "_unimportable", lambda *names: {} if "diffstill" in names else reason)
    result = examine()
    told = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert "works in diffstill, but not alone (RuntimeError: operator torchvision::nms does not exist); import it after diffstill, or" in told
    assert f"timm {importlib.metadata.version('timm')} ok" in told


def test_kfp_of_an_image_is_for_tasks_alone(monkeypatch, tmp_path):
    """There it is installed without its dependencies, and imports as Kubeflow's executor starts it."""
    (tmp_path / "docstring_parser.py").write_text("raise ModuleNotFoundError('docstring_parser')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    doctor._unimportable.cache_clear()
    try:
        result = examine()
    finally:
        doctor._unimportable.cache_clear()
    assert result.exit_code == 0
    assert "for tasks alone, without" in " ".join(result.stdout.split())


@pytest.mark.parametrize("fits", [True, False])
def test_a_torchvision_built_for_another_torch_is_told(monkeypatch, fits):
    monkeypatch.setattr(doctor, "_unimportable", lambda *_names: {})
    monkeypatch.setattr(doctor, "loads", lambda folder: fits or folder.name != "torchvision")
    result = examine()
    assert (result.exit_code, "built for another torch" in " ".join(result.stdout.split())) == (0, not fits)


def test_an_optional_package_may_be_missing(monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-package",))
    result = examine()
    assert result.exit_code == 0
    assert "no-such-package           not installed (optional)" in result.stdout


# --- preflight: what a run needs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with s3(tmp_path_factory.mktemp("s3")) as (url, _):
        yield url


@pytest.fixture
def store(endpoint, monkeypatch):
    """The environment that leads to an S3 store with the bucket `runs`."""
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    boto3.Session().client("s3").create_bucket(Bucket="runs")


@pytest.fixture(scope="module")
def tracking_server(tmp_path_factory):
    """The URL of a real MLflow server."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    with served(command, port, folder / "log", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}):
        yield f"http://127.0.0.1:{port}"


def refusal(needs: Needs, kind: type[DiffstillError] = DiffstillError) -> str:
    """The one message that a preflight ends with."""
    with pytest.raises(DiffstillError) as refused:
        preflight(needs)
    assert type(refused.value) is kind
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("this machine lacks what the run needs: ")
    return str(refused.value).removeprefix("this machine lacks what the run needs: ")


@pytest.mark.usefixtures("store")
def test_a_machine_that_has_everything_passes_and_tells_what_was_found(tracking_server, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "preflight")
    monkeypatch.setenv("HF_TOKEN", SENTINEL)
    preflight(Needs(disk_gib=0.01, shared_memory_gib=0.001, environment=("HF_TOKEN",), store="s3://runs/of/mine", mlflow=True))
    told = " ".join(capsys.readouterr().out.split())
    for what in ("disk", "GiB free in", "shared memory", "HF_TOKEN set ok", "store s3://runs/of/mine takes, gives back and deletes objects ok"):
        assert what in told
    assert f"mlflow {tracking_server} ok" in told
    assert SENTINEL not in told
    experiment = MlflowClient(tracking_server).get_experiment_by_name("preflight")
    assert experiment is not None
    assert experiment.tags["diffstill.preflight"] == "ok"
    assert boto3.Session().client("s3").list_objects_v2(Bucket="runs")["KeyCount"] == 0


def test_nothing_needed_is_nothing_missing(capsys):
    preflight(Needs())
    assert capsys.readouterr().out.split() == ["found"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpus():
    assert refusal(Needs(gpus=2)) == "gpus: 0 of 2 wanted; ask for more GPUs, or mend the driver or the CUDA build of torch"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_that_compute(capsys):
    preflight(Needs(gpus=1))
    assert torch.cuda.get_device_name(0) in capsys.readouterr().out


def test_missing_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "not" / "yet"))
    told = refusal(Needs(disk_gib=1e6))
    assert f"GiB free in {tmp_path}; free space or mount a larger volume there" in told
    assert f"GiB free in {tempfile.gettempdir()};" in told
    assert not (tmp_path / "not").exists()


def test_a_folder_that_is_not_writable():
    """As another user, for root may write anywhere; its home may not even be looked into."""
    code = "import os; from diffstill.doctor import Needs, preflight\nif os.geteuid() == 0: os.setuid(65534)\npreflight(Needs(disk_gib=0.001))"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        world = {"DIFFSTILL_WORK": f"{folder}/work/deeper", "HOME": "/root" if os.geteuid() == 0 else folder}
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | world, capture_output=True, text=True, check=False)
    assert f"disk: {folder} is not writable; mount a volume there, or point DIFFSTILL_WORK" in done.stderr


@pytest.mark.parametrize("place", ["/dev/shm", "/no/such/place"])
def test_missing_shared_memory(place, monkeypatch):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", Path(place))
    told = refusal(Needs(shared_memory_gib=1e6))
    assert told.startswith("shared memory: ")
    assert f"of 1e+06 GiB in {place}; mount an emptyDir of medium Memory there" in told


@pytest.mark.parametrize("value", [None, ""])
def test_missing_variables(value, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("HF_TOKEN", value)
    assert refusal(Needs(environment=("HF_TOKEN", "PATH"))) == "HF_TOKEN: not set or empty; give the run the secret or setting that holds it"


@pytest.mark.usefixtures("store")
def test_a_missing_store():
    assert refusal(Needs(store="s3://no-such-bucket/x")).startswith("store: s3://no-such-bucket/x: bucket 'no-such-bucket' at http://127.0.0.1:")


@pytest.mark.parametrize("uri", ["none", ""])
def test_no_tracking_server_is_named(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert refusal(Needs(mlflow=True)).startswith("mlflow: MLFLOW_TRACKING_URI names no tracking server")


def test_a_tracking_server_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SENTINEL}@127.0.0.1:{free_port()}")
    told = refusal(Needs(mlflow=True), TransientError)
    assert told.startswith("mlflow: MLflow at http://***@127.0.0.1:")
    assert SENTINEL not in told


@pytest.mark.usefixtures("store")
def test_all_that_is_missing_is_listed_at_once_and_no_secret_with_it(monkeypatch, capsys):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{SENTINEL}@127.0.0.1:{free_port()}/?token={SENTINEL}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{SENTINEL}@127.0.0.1:{free_port()}")
    needs = Needs(gpus=99, disk_gib=1e6, shared_memory_gib=1e6, environment=("HF_TOKEN", "NO_SUCH_NAME"), store="s3://runs/x", mlflow=True)
    told = refusal(needs)
    numbered = re.findall(r"\((\d)\) (gpus|disk|shared memory|NO_SUCH_NAME|store|mlflow): ", told)
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    assert list(dict.fromkeys(name for _, name in numbered)) == ["gpus", "disk", "shared memory", "NO_SUCH_NAME", "store", "mlflow"]
    printed = capsys.readouterr().out
    assert "HF_TOKEN" in printed
    assert SENTINEL not in told + printed


def test_needs_come_from_json_and_take_names_only():
    assert Needs.model_validate_json('{"gpus": 1, "environment": ["HF_TOKEN"]}') == Needs(gpus=1, environment=("HF_TOKEN",))
    with pytest.raises(ValidationError) as refused:
        Needs.model_validate_json(f'{{"environment": ["HF_TOKEN={SENTINEL}"]}}')
    assert SENTINEL not in str(refused.value)
