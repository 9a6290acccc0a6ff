"""The same pipeline on this machine, without a cluster: in processes of this Python, or in containers of a Docker engine."""

import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout
from kfp import local
from kfp.dsl.base_component import BaseComponent
from kfp.local import docker_task_handler, placeholder_utils
from kfp.local.orchestrator.enhanced_dag_orchestrator import ConditionEvaluator

import diffstill
import docker
from components.images import TAGGED, Images
from diffstill.artifacts import file_digest, refuse_foreign, refuse_overlap
from diffstill.config import Params
from diffstill.errors import DiffstillError
from diffstill.plan import STAGES, score_names
from diffstill.run import fingerprint
from diffstill.tracking import OFF, chain_name, tracking_uri
from pipelines.distill import arguments, build
from pipelines.settings import InfraConfig, Settings, ShardsConfig

CARD = "card"
"""The one artifact that a pipeline cannot give out: a branch makes it. The task `publish` is never cached, so it lies in the latest run."""


@dataclass(frozen=True)
class Executor:
    """What runs the tasks, and the name of the code that it runs: another name for other code, or the cache would give the results of old code."""

    runner: Any
    image: str
    owner: tuple[int, int] | None = None
    """User and group that write the outputs, where they are not ours."""


def processes() -> Executor:
    """Tasks as processes of this very Python."""
    sources = sorted(path for path in Path(diffstill.__file__).parent.rglob("*") if path.is_file() and path.suffix != ".pyc")
    code = hashlib.sha256("".join(map(file_digest, sources)).encode()).hexdigest()
    return Executor(local.SubprocessRunner(use_venv=False), f"diffstill:{code}")


def containers(image: str | None = None, user: str | None = None) -> Executor:
    """Tasks as containers of the Docker engine that `DOCKER_HOST` names, as strict as a cluster can be: no network, no rights, a read-only root file system."""
    scratch = {"/tmp": "exec"}  # noqa: S108  (inside the container; Triton loads there what it compiles)
    limits = {"network_mode": "none", "read_only": True, "tmpfs": scratch, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]}
    name = image or TAGGED.cpu
    try:
        found = docker.from_env().images.get(name)
    except docker.errors.ImageNotFound as error:
        raise DiffstillError(f"image {name!r} is not here; build it with `make images`, or name another with --image") from error
    except docker.errors.DockerException as error:
        raise DiffstillError(f"no Docker engine answers ({error}); start one, or set DOCKER_HOST to its address") from error
    who = user or (f"{os.getuid()}:{os.getgid()}" if os.getuid() else found.attrs["Config"]["User"])
    numbers = re.fullmatch(r"(\d+)(?::(\d+))?", who)
    if not numbers:
        raise DiffstillError(f"--user {who!r} is no number; give a numeric user, or user:group, like 10001:10001")
    owner = int(numbers[1]), int(numbers[2] or numbers[1])
    runner = local.DockerRunner(**limits, user=f"{owner[0]}:{owner[1]}", environment={"USER": "diffstill"})  # torch asks for a name
    return Executor(runner, found.id, owner)


def run_local(
    params: Params,
    settings: Settings,
    folder: Path,
    *,
    executor: Executor,
    shards: ShardsConfig,
    cache: bool = True,
    retries: int = 0,
    publish: bool = False,
) -> Path:
    """Run the pipeline and lay its artifacts out as the chain does; the folder of the artifacts, `folder`/artifacts.

    With `publish` a version is made in the registry, and its card is laid out too. `folder`/runs keeps the outputs of every task, `folder`/cache what makes a second run skip them, run.log what was said. Raises
    `DiffstillError` if a task fails; what an earlier run laid out stays then.
    """
    if publish and tracking_uri() == OFF:
        raise DiffstillError(
            "--publish makes a version in MLflow, and MLFLOW_TRACKING_URI is `none`; set it to your server, or unset it for mlflow.db here"
        )
    given_places = {"prepare.location": params.prepare.location, "pretrain.location": params.pretrain.location}
    refuse_overlap(folder, {name: place for name, place in given_places.items() if place})
    for name in (*_places(params), CARD):
        refuse_foreign(folder / "artifacts" / name)
    images = Images(executor.image, executor.image)
    pipeline = build(_at_hand(settings.infra, retries), images)
    versions = _version(params.prepare.location), _version(params.pretrain.location, params.pretrain.autoencoder)
    given = arguments(params, None, shards, *versions, publish=publish)
    with _environment(DIFFSTILL_CHAIN=chain_name(params), MLFLOW_TRACKING_URI=tracking_uri()), _alone(folder):
        outputs = execute(pipeline, given, folder, executor, cache=cache)
        made = _lay_out(outputs, params, folder / "artifacts")
        if publish:
            latest = max((folder / "runs").iterdir(), key=lambda run: run.name)
            _copy(latest / "publish" / CARD, made / CARD)
        return made


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder. Raises `DiffstillError` if one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise DiffstillError(f"{folder}: another run is at work there; wait until it has finished, or choose another --output") from error


def execute(pipeline: BaseComponent, given: Mapping[str, Any], folder: Path, executor: Executor, *, cache: bool) -> Mapping[str, Any]:
    """The outputs of a pipeline, run here; `folder`/run.log has all that was said. Raises `DiffstillError` if a task fails."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _mend_kfp()
    (folder / "runs").mkdir(exist_ok=True)
    if executor.owner and os.getuid() == 0:
        os.chown(folder / "runs", *executor.owner)
    cached = {"enable_caching": cache, "cache_root": str(folder / "cache") if cache else None}
    local.init(executor.runner, pipeline_root=str(folder / "runs"), raise_on_error=True, **cached)
    with (folder / "run.log").open("w", encoding="utf-8") as log, redirect_stdout(_Told(log, sys.stderr)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"kfp\.local")  # at each task: that resources have no effect here, that the image is not run
        try:
            made: Mapping[str, Any] = pipeline(**given).outputs
        except RuntimeError as error:
            raise DiffstillError(f"the pipeline failed: {error}; all that its tasks said stands in {folder / 'run.log'}") from error
    return made


class _Told(io.TextIOBase):
    """What kfp and the tasks print: all of it to a log, what a person wants to see to the terminal."""

    WANTED = re.compile(r"^[\d:.]+ - \w+ - (?!Streamed|Cleaned|Task \S+ (outputs:|has no outputs))|^\s*(diffstill|error): ")

    def __init__(self, log: TextIO, terminal: TextIO) -> None:
        self._log, self._terminal, self._rest = log, terminal, ""

    def write(self, text: str) -> int:
        """Log `text`; show the lines in it that are wanted."""
        self._log.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if self.WANTED.match(line):
                self._terminal.write(line.lstrip() + "\n")
        self._terminal.flush()
        return len(text)


def _version(*locations: str | None) -> str:
    """What tells the files at these places from others there, so that the cache does not take new ones for the old; empty where there is no place."""
    found = [fingerprint(location) for location in locations if location]
    return hashlib.sha256(repr(found).encode()).hexdigest() if found else ""


def _at_hand(infra: InfraConfig, retries: int) -> InfraConfig:
    """Every task tried again that often, after a second: a person is waiting. On the device that is here, with checkpoints where `DIFFSTILL_WORK` says."""
    resources = {name: each.model_copy(update={"gpus": 0, "retries": retries, "retry_seconds": 1}) for name, each in infra.resources.items()}
    return infra.model_copy(update={"resources": resources, "work_claim": None, "cache_claim": None, "trainjob": None})


def _places(params: Params) -> dict[str, tuple[str, int | None]]:
    """Where the chain keeps an artifact -> the pipeline's output, and the number in it if that is a list."""
    students = params.evaluate.students
    single = {name: (name, None) for name in (*STAGES["report"].inputs, "generator", "latents", "report")}
    listed = [(f"{source}_scores", number) for source in ("distilled", "untuned", "real") for number in range(len(students))]
    return {**single, **dict(zip(score_names(students), listed, strict=True))}


def _lay_out(outputs: Mapping[str, Any], params: Params, target: Path) -> Path:
    """Copy every artifact to its place, verified, whole or not at all."""
    for place, (name, number) in _places(params).items():
        made = outputs[name] if number is None else outputs[name][number]
        _copy(Path(made.path), target / place)
    return target


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as aside:
        shutil.copytree(source, Path(aside) / "new")
        if target.exists():
            target.rename(Path(aside) / "old")
        (Path(aside) / "new").rename(target)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """With these variables set for the tasks, and as before afterwards."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# What kfp's own local runners get wrong


def _mend_kfp() -> None:
    """Kfp 2.17.0 takes conditions on texts with quotes for false, may take a failed container for a good one, and looks for placeholders in values."""
    ConditionEvaluator._resolve_pipeline_channel = staticmethod(_in_quotes)
    docker_task_handler.run_docker_container = _run_container
    placeholder_utils.resolve_individual_placeholder = _resolved


_value_of = ConditionEvaluator._resolve_pipeline_channel


def _in_quotes(reference: str, io_store: Any) -> Any:
    """A value of a condition; a text as it may stand between the single quotes that kfp puts around it."""
    value = _value_of(reference, io_store)
    return value.replace("\\", "\\\\").replace("'", "\\'") if isinstance(value, str) else value


_resolve = placeholder_utils.resolve_individual_placeholder


def _resolved(element: str, executor_input_dict: Mapping[str, Any], **names: str) -> str:
    """A word of a command, its placeholders replaced; what a task is handed is not looked at again, whatever its paths and metadata hold."""
    return json.dumps(executor_input_dict) if element == "{{$}}" else _resolve(element, executor_input_dict, **names)


def _run_container(client: Any, image: str, command: list[str], volumes: Mapping[str, Any], **options: Any) -> int:
    """Run a container to its end and return its exit status; kept until that is read, unlike with `auto_remove`."""
    container = client.containers.run(image=image, command=command, detach=True, stdout=True, stderr=True, volumes=dict(volumes), **options)
    try:
        for line in container.logs(stream=True):
            print(line.decode(), end="")
        return int(container.wait()["StatusCode"])
    finally:
        container.remove(force=True)
