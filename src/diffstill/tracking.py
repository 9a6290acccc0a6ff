"""MLflow, and only here: one parent run per chain, a nested run per stage, found again by a tag.

Tracking goes to `mlflow.db` in the current folder unless `MLFLOW_TRACKING_URI` points elsewhere; `none` switches it
off. An injected `MLFLOW_RUN_ID` is the parent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from diffstill import database
from diffstill.artifacts import Artifact
from diffstill.config import Params, Section
from diffstill.environment import code_commit, git_sha, is_commit
from diffstill.errors import DiffstillError, TransientError, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset
    from PIL.Image import Image

CHAIN_TAG = "diffstill.chain"
DESCRIPTION = "mlflow.note.content"
"""The tag that MLflow shows as the description of a run or an experiment, in Markdown."""
OFF = "none"
DELETED = "deleted"
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
`classes`, `protocol`, `git_sha` (of the project) and `code` (the commit or release of diffstill).
"""
USUAL_PLACES = {"digits": "sklearn.datasets.load_digits", "fashion-mnist": "the Debian package dataset-fashion-mnist"}


def tracking_uri() -> str:
    """Where runs go: `MLFLOW_TRACKING_URI`, or an sqlite file in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").strip() or database.uri_of(Path.cwd() / "mlflow.db")


def registry_uri() -> str:
    """Where versions are registered: where runs go, unless MLflow's own `MLFLOW_REGISTRY_URI` names another place."""
    return os.environ.get("MLFLOW_REGISTRY_URI", "").strip() or tracking_uri()


class StageRun:
    """One stage's run in MLflow; takes what a stage records. The first record opens it: a stage that refuses its input has recorded nothing."""

    def __init__(self, step: str, config: Section, params: Params | None) -> None:
        self._step, self._config, self._params = step, config, params
        self._opened: tuple[MlflowClient, str, str] | None = None
        self._data: list[Artifact] = []

    def open(self) -> tuple[MlflowClient, str, str]:
        """Make the run, and that of its chain, unless that is done; MLflow's client, the id of this run and that of the chain."""
        if self._opened is None:
            with answering():
                client = connect()
                parent = os.environ.get("MLFLOW_RUN_ID") or _parent(client, self._params, self._step)
                self._opened = client, _start(client, self._step, parent, self._config), parent
            for images in self._data:
                self.data(images)
        return self._opened

    def close(self, status: str, chain: str | None) -> None:
        """End the run, if there is one, and that of its chain, if it has come to an end and is ours."""
        if self._opened:
            client, run_id, parent = self._opened
            with answering():
                client.set_terminated(run_id, status)
                if chain and not os.environ.get("MLFLOW_RUN_ID"):
                    client.set_terminated(parent, chain)

    @property
    def run_id(self) -> str:
        """MLflow's id of this run."""
        return self.open()[1]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars at a step."""
        client, run_id, _ = self.open()
        _log(client, run_id, values, step)

    def headline(self, values: Mapping[str, float]) -> None:
        """Log what a whole chain came to on its run, so that chains can be compared in the list of runs."""
        client, _, parent = self.open()
        _log(client, parent, values, 0)

    def file(self, path: Path) -> None:
        """Upload a file."""
        client, run_id, _ = self.open()
        with answering():
            client.log_artifact(run_id, str(path))

    def image(self, name: str, picture: Image, step: int) -> None:
        """Upload a picture of the series `name`; MLflow's page of the run has a slider over its steps."""
        client, run_id, _ = self.open()
        with answering():
            client.log_image(run_id, picture, key=name, step=step)

    def data(self, images: Artifact) -> None:
        """Say which data this run takes or makes, here and on the run of the chain, when they are open; what is said again stands there once."""
        from mlflow.entities import DatasetInput

        if self._opened is None:
            self._data.append(images)
            return
        client, own, parent = self._opened
        given = [DatasetInput(_dataset(images))]
        with answering():
            for run_id in (parent, own):
                _twice_at_most(client.log_inputs, run_id, given)
            _twice_at_most(client.set_tag, parent, "diffstill.classes", str(len(images.facts["classes"])))


def _log(client: MlflowClient, run_id: str, values: Mapping[str, float], step: int) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    with answering():
        client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])


def _twice_at_most(say: Callable[..., None], *what: Any) -> None:
    """MLflow looks before it inserts, so where parallel steps say the same, some fail; once one has said it, the others may repeat it."""
    from mlflow.exceptions import MlflowException

    try:
        say(*what)
    except MlflowException:
        say(*what)


@contextmanager
def stage_run(step: str, config: Section, params: Params | None) -> Iterator[StageRun | None]:
    """A nested run for one step of the chain, finished or failed with the block; None where tracking is off.

    Raises `DiffstillError` if MLflow does not answer or will take no run, before the block; nothing is made there until the block records something.
    """
    if tracking_uri() == OFF:
        yield None
        return
    _look()
    run = StageRun(step, config, params)
    try:
        yield run
    except BaseException:
        with suppress(DiffstillError):  # the first error is the one to show
            run.close("FAILED", "FINISHED" if step == "publish" else "FAILED")  # a set that is not worth publishing is no fault of its chain
        raise
    run.open()
    run.close("FINISHED", "FINISHED" if step in LAST else None)


def _look() -> None:
    """See that MLflow answers and will take runs. A database that is not there yet is not made."""
    file, injected = database.file_of(tracking_uri()), os.environ.get("MLFLOW_RUN_ID")
    with answering():
        if file and not file.exists():
            database.check(tracking_uri())
            return
        client = connect()
        if not injected:
            _found_experiment(client)
        elif client.get_run(injected).info.lifecycle_stage == DELETED:
            raise DiffstillError(f"MLFLOW_RUN_ID {injected}: that run was deleted; unset it, or {_mlflow(f'runs restore --run-id {injected}')}")


def _mlflow(command: str) -> str:
    """A command of MLflow's own, to be copied."""
    return f"run: MLFLOW_TRACKING_URI={shlex.quote(without_secrets(tracking_uri()))} mlflow {command}"


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
    if "://" not in address and not address.startswith("databricks"):
        shown = without_secrets(f"//{address}").removeprefix("//")
        raise DiffstillError(
            f"{shown!r}: is no address of an MLflow, it has no scheme; write http://{shown} for a server, sqlite:///{shown} for a database, or none"
        )
    with database.alone(address):
        database.check(address)
        return MlflowClient(address, registry_uri=uri)


@contextmanager
def answering(uri: str | None = None) -> Iterator[None]:
    """Turn a failure of MLflow at `uri`, by default where runs go, of its database or its driver into one message without credentials."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, ImportError) as error:
        if found := re.search(r"database schema \(found version (\w+)|Can't locate revision identified by '(\w+)'", str(error)):
            raise DiffstillError(_other_schema(without_secrets(uri or tracking_uri()), found[1] or found[2])) from error
        reason = without_secrets(" ".join(str(error).split()))
        reason = reason if len(reason) <= SHOWN else f"{reason[: SHOWN // 2]} ... {reason[-SHOWN // 2 :]}"  # the cause stands at the end
        raise (TransientError if _passes(error) else DiffstillError)(
            f"MLflow at {without_secrets(uri or tracking_uri())} refuses ({reason}); "
            "mend MLFLOW_TRACKING_URI or MLFLOW_RUN_ID, or start the server; with MLFLOW_TRACKING_URI=none a chain runs without tracking"
        ) from error


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later: a server or database that is away or overloaded."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in (408, 429)
    return isinstance(error, (OperationalError, sqlite3.OperationalError))


def _other_schema(address: str, revision: str) -> str:
    """What to do about a database whose tables another version of MLflow has made; a revision that this one does not have is a later one's."""
    import mlflow
    from alembic.script import ScriptDirectory

    known = {one.revision for one in ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations")).walk_revisions()}
    fix = f"keep a copy of it, then run: mlflow db upgrade {shlex.quote(address)}" if revision in known else "install that version, or a later one"
    whose = "an older" if revision in known else "a later"
    return f"MLflow's database at {address} was made by {whose} version than the installed {mlflow.__version__} (schema {revision}); {fix}"


def _found_experiment(client: MlflowClient) -> str | None:
    """The id of the experiment that runs go to, if it is there. Raises `DiffstillError` if it was deleted: its name is taken, and it takes nothing."""
    found = client.get_experiment_by_name(name := experiment_name())
    if found and found.lifecycle_stage == DELETED:
        raise DiffstillError(
            f"the experiment {name!r} at {without_secrets(tracking_uri())} was deleted; set MLFLOW_EXPERIMENT_NAME to another, or restore it, "
            f"{_mlflow(f'experiments restore --experiment-id {found.experiment_id}')}"
        )
    return str(found.experiment_id) if found else None


def experiment_name() -> str:
    """Of the experiment that runs go to."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or "diffstill"


def _experiment(client: MlflowClient) -> str:
    from mlflow.exceptions import MlflowException

    if found := _found_experiment(client):
        return found
    name = experiment_name()
    file = database.file_of(tracking_uri())
    location = (file.parent / database.ARTIFACTS).as_uri() if file else None
    try:
        return str(client.create_experiment(name, artifact_location=location, tags={DESCRIPTION: ABOUT}))
    except MlflowException as error:
        if error.error_code == "RESOURCE_ALREADY_EXISTS" and (found := _found_experiment(client)):  # another step was first
            return found
        raise


def chain_name(params: Params | None, step: str = "") -> str:
    """A chain is the same chain while its science is: what its version is called, and where it lies, comes later. A stage without a chain is one of its own."""
    science = json.dumps({name: params.section(name).plain() for name in params.STAGES if name != "publish"}, sort_keys=True) if params else step
    return hashlib.sha256(science.encode()).hexdigest()[:32]


def _parent(client: MlflowClient, params: Params | None, step: str) -> str:
    """The run of this chain, found by its tag, or a new one.

    A chain is named by `DIFFSTILL_CHAIN` (on a cluster: the id of the pipeline's run), else by its parameters.
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
    """The project's commit and that of the program, for searching and for MLflow's columns Source and Version."""
    code = code_commit()
    commit = {"mlflow.source.git.commit": code.removesuffix("-dirty")} if is_commit(code) else {}
    return {"diffstill.git_sha": git_sha(), "diffstill.code": code, "mlflow.source.name": "diffstill", "mlflow.source.type": "LOCAL", **commit}


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
    sample, finetune, judged, code = params.sample, params.finetune, params.evaluate, code_commit()
    exactly = f"with diffstill at commit `{code.removesuffix('-dirty')}`" if is_commit(code) else f"with diffstill {code}"
    changed = " (files differed from it)" if code.endswith("-dirty") else ""
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
    params = [Param(name, str(value)) for name, value in _flat(config, config.plain()).items()]
    client.log_batch(run.info.run_id, params=params)
    return str(run.info.run_id)


def _flat(section: Section, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Knobs by name, those of nested sections with dots. A mapping of the user's own stays one value: its keys may be no names that MLflow takes."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = getattr(section, name)
        flat |= _flat(inner, value, f"{prefix}{name}.") if isinstance(inner, Section) else {f"{prefix}{name}": value}
    return flat


def check_tracking() -> str:
    """The tracking server, once it has answered and taken a tag of the experiment that runs go to. Raises `DiffstillError` otherwise."""
    if tracking_uri() == OFF or not os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        raise DiffstillError("MLFLOW_TRACKING_URI names no tracking server; set it to one, or go without by not asking for MLflow")
    with answering():
        client = connect()
        client.set_experiment_tag(_experiment(client), "diffstill.preflight", "ok")
    return without_secrets(tracking_uri())
