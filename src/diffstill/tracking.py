"""MLflow, and only here: one parent run per chain, a nested run per stage, found again by a tag.

Tracking goes to `mlflow.db` in the current folder unless `MLFLOW_TRACKING_URI` points elsewhere; `none` switches it
off. An injected `MLFLOW_RUN_ID` is the parent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from diffstill import database
from diffstill.artifacts import Artifact
from diffstill.config import Params, Section
from diffstill.errors import DiffstillError, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset
    from PIL.Image import Image

CHAIN_TAG = "diffstill.chain"
DESCRIPTION = "mlflow.note.content"
"""The tag that MLflow shows as the description of a run or an experiment, in Markdown."""
OFF = "none"
SHOWN = 240
"""Characters of MLflow's reason in a message of ours."""
LAST = ("report", "publish")
"""Steps after which a chain is finished."""
ABOUT = """\
Small synthetic image sets, distilled from labelled ones, and what students learn from them.

A run at the top is one chain of diffstill: a data set, a number of images per class (IPC), a policy of the memories, a guidance. Its metrics are \
the test accuracy of students (`.../test_mean`) and their gain over as many real images (`.../gain_over_random`). The runs below it are its steps; \
`finetune` shows under Model metrics how its pictures change.

Chains can be searched by their tags, such as ``tags.`diffstill.dataset` = 'digits' and tags.`diffstill.ipc` = '10'``; also `policy`, `guidance`, \
`classes`, `protocol` and `git_sha`.
"""
USUAL_PLACES = {"digits": "sklearn.datasets.load_digits", "fashion-mnist": "the Debian package dataset-fashion-mnist"}


def tracking_uri() -> str:
    """Where runs go: `MLFLOW_TRACKING_URI`, or an sqlite file in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or database.uri_of(Path.cwd() / "mlflow.db")


def git_sha() -> str:
    """The commit of the current folder, with `-dirty` if files differ from it; outside git that of the image, or `none`."""
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DIFFSTILL_REVISION") or "none"
    return f"{sha}-dirty" if changed.strip() else sha


class StageRun:
    """One stage's run in MLflow; takes what a stage records."""

    def __init__(self, client: MlflowClient, run_id: str, parent: str) -> None:
        self._client, self._run_id, self._parent = client, run_id, parent

    @property
    def run_id(self) -> str:
        """MLflow's id of this run."""
        return self._run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars at a step."""
        self._log(self._run_id, values, step)

    def _log(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with answering():
            self._client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def headline(self, values: Mapping[str, float]) -> None:
        """Log what a whole chain came to on its parent run, so that chains can be compared in the list of runs."""
        self._log(self._parent, values, 0)

    def file(self, path: Path) -> None:
        """Upload a file."""
        with answering():
            self._client.log_artifact(self._run_id, str(path))

    def image(self, name: str, picture: Image, step: int) -> None:
        """Upload a picture of the series `name`; MLflow's page of the run has a slider over its steps."""
        with answering():
            self._client.log_image(self._run_id, picture, key=name, step=step)

    def data(self, images: Artifact) -> None:
        """Say which data this run takes or makes, here and on the run of the chain; what is said again stands there once."""
        from mlflow.entities import DatasetInput

        given = [DatasetInput(_dataset(images))]
        with answering():
            for run_id in (self._parent, self._run_id):
                _twice_at_most(self._client.log_inputs, run_id, given)
            _twice_at_most(self._client.set_tag, self._parent, "diffstill.classes", str(len(images.facts["classes"])))


def _twice_at_most(say: Callable[..., None], *what: Any) -> None:
    """MLflow looks before it inserts, so where parallel steps say the same, some fail; once one has said it, the others may repeat it."""
    from mlflow.exceptions import MlflowException

    try:
        say(*what)
    except MlflowException:
        say(*what)


@contextmanager
def stage_run(step: str, config: Section, params: Params | None) -> Iterator[StageRun | None]:
    """A nested run for one step of the chain, finished or failed with the block; None where tracking is off."""
    if tracking_uri() == OFF:
        yield None
        return
    injected = os.environ.get("MLFLOW_RUN_ID")
    with answering():
        client = connect()
        parent = injected or _parent(client, params, step)
        run_id = _start(client, step, parent, config)
    try:
        yield StageRun(client, run_id, parent)
    except BaseException:
        with suppress(DiffstillError), answering():  # the first error is the one to show
            client.set_terminated(run_id, "FAILED")
            if not injected:  # a set that is not worth publishing is no fault of its chain
                client.set_terminated(parent, "FINISHED" if step == "publish" else "FAILED")
        raise
    with answering():
        client.set_terminated(run_id, "FINISHED")
        if step in LAST and not injected:
            client.set_terminated(parent, "FINISHED")


def open_chain(params: Params) -> None:
    """Make the run of a chain before its first stage does, with all parameters; nothing where tracking is off or the run is injected."""
    if tracking_uri() == OFF or os.environ.get("MLFLOW_RUN_ID"):
        return
    with answering():
        _parent(connect(), params, "")


def connect(uri: str | None = None) -> MlflowClient:
    """A client of the server that runs go to, or of the registry at `uri`."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it prints the credentials in a URL, too
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):  # after the import, which sets levels of its own
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each retry is a warning there; what fails in the end is our message
    address = uri or tracking_uri()
    with database.alone(address):
        database.check(address)
        return MlflowClient(address, registry_uri=uri)


@contextmanager
def answering(uri: str | None = None) -> Iterator[None]:
    """Turn a failure of MLflow at `uri`, by default where runs go, of its database or its driver into one message without credentials."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, ImportError) as error:
        reason = without_secrets(" ".join(str(error).split()))
        reason = reason if len(reason) <= SHOWN else f"{reason[: SHOWN // 2]} ... {reason[-SHOWN // 2 :]}"  # the cause stands at the end
        raise DiffstillError(
            f"MLflow at {without_secrets(uri or tracking_uri())} refuses ({reason}); "
            "mend MLFLOW_TRACKING_URI or MLFLOW_RUN_ID, or start the server; with MLFLOW_TRACKING_URI=none a chain runs without tracking"
        ) from error


def _experiment(client: MlflowClient) -> str:
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "diffstill")
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    file = database.file_of(tracking_uri())
    location = (file.parent / database.ARTIFACTS).as_uri() if file else None
    try:
        return str(client.create_experiment(name, artifact_location=location, tags={DESCRIPTION: ABOUT}))
    except MlflowException as error:
        if error.error_code == "RESOURCE_ALREADY_EXISTS" and (found := client.get_experiment_by_name(name)):  # another step was first
            return str(found.experiment_id)
        raise


def chain_name(params: Params | None, step: str = "") -> str:
    """A chain is the same chain while its parameters and the commit are; a stage without a chain is one of its own."""
    return hashlib.sha256(f"{params.canonical() if params else step} {git_sha()}".encode()).hexdigest()[:32]


def _parent(client: MlflowClient, params: Params | None, step: str) -> str:
    """The run of this chain, found by its tag, or a new one.

    A chain is named by `DIFFSTILL_CHAIN` (on a cluster: the id of the pipeline's run), else by its parameters and commit.
    """
    chain = os.environ.get("DIFFSTILL_CHAIN") or chain_name(params, step)
    with database.alone(tracking_uri()):
        return _found_or_made(client, chain, params, step)


def _found_or_made(client: MlflowClient, chain: str, params: Params | None, step: str) -> str:
    experiment = _experiment(client)
    found = client.search_runs([experiment], filter_string=f"tags.`{CHAIN_TAG}` = '{chain}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)
    tags = {CHAIN_TAG: chain, **_origin()} | (_searchable(params) | {DESCRIPTION: _description(params)} if params else {})
    run = client.create_run(experiment, run_name=f"{_title(params) if params else step} #{chain[:6]}", tags=tags)
    if params:
        client.log_dict(run.info.run_id, params.plain(), "params.json")
    return str(run.info.run_id)


def _origin() -> dict[str, str]:
    """The program and its commit, for searching and for MLflow's columns Source and Version."""
    sha = git_sha()
    commit = {"mlflow.source.git.commit": sha.removesuffix("-dirty")} if sha != "none" else {}
    return {"diffstill.git_sha": sha, "mlflow.source.name": "diffstill", "mlflow.source.type": "LOCAL", **commit}


def _searchable(params: Params) -> dict[str, str]:
    """Tags by which chains are found and compared; `classes` follows when the data are known."""
    values = {
        "dataset": _called(params.prepare.source, params.prepare.location),
        "ipc": params.sample.images_per_class,
        "policy": params.finetune.policy,
        "guidance": f"{params.sample.guidance:g}",
        "protocol": params.evaluate.protocol,
    }
    return {f"diffstill.{name}": str(value) for name, value in values.items()}


def _title(params: Params) -> str:
    tags = _searchable(params)
    return "{dataset} IPC {ipc}, {policy}, guidance {guidance}".format(**{name.removeprefix("diffstill."): value for name, value in tags.items()})


def _description(params: Params) -> str:
    """What the run of a chain says of itself, in Markdown: no host and no path."""
    sample, finetune, judged, sha = params.sample, params.finetune, params.evaluate, git_sha()
    exactly = f"at commit `{sha.removesuffix('-dirty')}`" if sha != "none" else f"with diffstill {version('diffstill')}"
    changed = " (files differed from it)" if sha.endswith("-dirty") else ""
    steps = "\n".join(f"- `{stage}`: {Params.model_fields[stage].description}" for stage in params.STAGES)
    return f"""\
**{_called(params.prepare.source, params.prepare.location)}** distilled into **{sample.images_per_class} images per class**, \
generation seeds {", ".join(map(str, sample.seeds))}.

**To reproduce**: {exactly}{changed}, `diffstill run --params params.json` with the `params.json` among the artifacts of this run.

- policy of the memories: {finetune.policy}
- fine-tuning: {finetune.steps} steps, lambda_real {finetune.lambda_real:g}, lambda_gen {finetune.lambda_gen:g}
- guidance: {sample.guidance:g}
- judged by: {", ".join(judged.students)}, protocol {judged.protocol}

The runs below are its steps, each named after its stage:

{steps}
"""


def _called(source: str, location: str | None) -> str:
    """What people call the data: the source, or for a folder of one's own its name."""
    where, _, query = (location or "").partition("?")
    folder = PurePosixPath(parse_qs(query).get("path", [where])[0]).name
    return folder if source == "folder" and folder else source


def _dataset(images: Artifact) -> Dataset:
    """The data behind an `images` artifact. MLflow's digest is too short for a SHA-256, so the whole one stands in the profile."""
    from mlflow.entities import Dataset

    source, location = images.manifest.config["source"], images.manifest.config["location"]
    counts = {f"{split}_images": sum(own.values()) for split, own in images.facts["counts"].items()}
    profile = {"classes": len(images.facts["classes"]), **counts, "side": images.facts["side"], "sha256": images.digest}
    kind, key = _place_kind(location or "")
    where = json.dumps({key: location or USUAL_PLACES.get(source, source)})
    return Dataset(_called(source, location), images.digest[:12], kind, where, profile=json.dumps(profile))


def _place_kind(location: str) -> tuple[str, str]:
    """MLflow's type of source for a location, and how it names the place."""
    scheme = location.partition("://")[0]
    kinds = {"s3": ("s3", "uri"), "http": ("http", "url"), "https": ("http", "url")}
    return kinds.get(scheme, ("external", "url") if scheme.startswith("dvc+") else ("local", "uri"))


def _start(client: MlflowClient, step: str, parent: str, config: Section) -> str:
    from mlflow.entities import Param

    experiment = client.get_run(parent).info.experiment_id
    purpose = next(str(field.description) for field in Params.model_fields.values() if field.annotation is type(config))
    tags = {"mlflow.parentRunId": parent, "diffstill.stage": step, DESCRIPTION: f"{purpose[0].upper()}{purpose[1:]}.", **_origin()}
    run = client.create_run(experiment, run_name=step, tags=tags)
    params = [Param(name, str(value)) for name, value in _flat(config.plain()).items()]
    client.log_batch(run.info.run_id, params=params)
    return str(run.info.run_id)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def check_tracking() -> str:
    """The tracking server, once it has answered and taken a tag of the experiment that runs go to. Raises `DiffstillError` otherwise."""
    if tracking_uri() == OFF or not os.environ.get("MLFLOW_TRACKING_URI"):
        raise DiffstillError("MLFLOW_TRACKING_URI names no tracking server; set it to one, or go without by not asking for MLflow")
    with answering():
        client = connect()
        client.set_experiment_tag(_experiment(client), "diffstill.preflight", "ok")
    return without_secrets(tracking_uri())
