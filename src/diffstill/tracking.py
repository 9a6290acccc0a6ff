"""MLflow, and only here: one parent run per chain, a nested run per stage, found again by a tag.

Tracking goes to `mlflow.db` in the current folder unless `MLFLOW_TRACKING_URI` points elsewhere; `none` switches it
off. An injected `MLFLOW_RUN_ID` is the parent.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffstill.config import Params, Section
from diffstill.errors import DiffstillError, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAIN_TAG = "diffstill.chain"
OFF = "none"


def tracking_uri() -> str:
    """Where runs go: `MLFLOW_TRACKING_URI`, or an sqlite file in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


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

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars at a step."""
        self._log(self._run_id, values, step)

    def _log(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with _answering():
            self._client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def headline(self, values: Mapping[str, float]) -> None:
        """Log what a whole chain came to on its parent run, so that chains can be compared in the list of runs."""
        self._log(self._parent, values, 0)

    def file(self, path: Path) -> None:
        """Upload a file."""
        with _answering():
            self._client.log_artifact(self._run_id, str(path))


@contextmanager
def stage_run(step: str, config: Section, params: Params | None) -> Iterator[StageRun | None]:
    """A nested run for one step of the chain, finished or failed with the block; None where tracking is off."""
    if tracking_uri() == OFF:
        yield None
        return
    injected = os.environ.get("MLFLOW_RUN_ID")
    with _answering():
        client = _client()
        parent = injected or _parent(client, params, step)
        run_id = _start(client, step, parent, config)
    try:
        yield StageRun(client, run_id, parent)
    except BaseException:
        with suppress(DiffstillError), _answering():  # the first error is the one to show
            client.set_terminated(run_id, "FAILED")
            if not injected:
                client.set_terminated(parent, "FAILED")
        raise
    with _answering():
        client.set_terminated(run_id, "FINISHED")
        if step == "report" and not injected:
            client.set_terminated(parent, "FINISHED")


def open_chain(params: Params) -> None:
    """Make the run of a chain before its first stage does, with all parameters; nothing where tracking is off or the run is injected."""
    if tracking_uri() == OFF or os.environ.get("MLFLOW_RUN_ID"):
        return
    with _answering():
        _parent(_client(), params, "")


def _client() -> MlflowClient:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):  # after the import, which sets levels of its own
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri())


@contextmanager
def _answering() -> Iterator[None]:
    """Turn a failure of MLflow, its database or its driver into one message without credentials."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError) as error:
        reason = without_secrets(" ".join(str(error).split()))[:200]
        raise DiffstillError(
            f"MLflow at {without_secrets(tracking_uri())} refuses ({reason}); "
            "mend MLFLOW_TRACKING_URI or MLFLOW_RUN_ID, or set MLFLOW_TRACKING_URI to `none` to go on without tracking"
        ) from error


def _experiment(client: MlflowClient) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "diffstill")
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    location = (Path.cwd() / "mlartifacts").as_uri() if tracking_uri().startswith("sqlite:") else None
    return str(client.create_experiment(name, artifact_location=location))


def chain_name(params: Params | None, step: str = "") -> str:
    """A chain is the same chain while its parameters and the commit are; a stage without a chain is one of its own."""
    return hashlib.sha256(f"{params.canonical() if params else step} {git_sha()}".encode()).hexdigest()[:32]


def _parent(client: MlflowClient, params: Params | None, step: str) -> str:
    """The run of this chain, found by its tag, or a new one.

    A chain is named by `DIFFSTILL_CHAIN` (on a cluster: the id of the pipeline's run), else by its parameters and commit.
    """
    chain = os.environ.get("DIFFSTILL_CHAIN") or chain_name(params, step)
    experiment = _experiment(client)
    found = client.search_runs([experiment], filter_string=f"tags.`{CHAIN_TAG}` = '{chain}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)
    tags = {CHAIN_TAG: chain, "diffstill.git_sha": git_sha()}
    name = f"{step} {chain[:6]}"
    if params:
        tags["diffstill.dataset"] = params.prepare.source
        name = f"{params.prepare.source} ipc{params.sample.images_per_class} {params.finetune.policy} {chain[:6]}"
    run = client.create_run(experiment, run_name=name, tags=tags)
    if params:
        client.log_dict(run.info.run_id, params.plain(), "params.json")
    return str(run.info.run_id)


def _start(client: MlflowClient, step: str, parent: str, config: Section) -> str:
    from mlflow.entities import Param

    experiment = client.get_run(parent).info.experiment_id
    run = client.create_run(experiment, run_name=step, tags={"mlflow.parentRunId": parent, "diffstill.stage": step})
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
    with _answering():
        client = _client()
        client.set_experiment_tag(_experiment(client), "diffstill.preflight", "ok")
    return without_secrets(tracking_uri())
