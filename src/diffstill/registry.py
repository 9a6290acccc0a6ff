"""Distilled sets as versions of registered models in MLflow: publish, find, fetch, deprecate.

A version is immutable: its files lie in the artifacts of its run or below an S3 prefix that is named after their content, and its tags
say where, with the SHA-256 to verify them by. The aliases `newest` and `best-ipc<N>` follow from the versions alone, so that
publishers who meet come to the same end.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from diffstill import __version__, database, storage
from diffstill.artifacts import MANIFEST, Artifact, Kind, cache_folder, is_digest, open_artifact, read_manifest
from diffstill.environment import code_commit, environment, git_sha
from diffstill.errors import DiffstillError, without_secrets
from diffstill.lineage import Lineage
from diffstill.names import is_name
from diffstill.record import Record, ignore
from diffstill.tracking import OFF, StageRun, answering, connect, registry_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from diffstill.scores import Gain
    from diffstill.stages.publish import Release

log = logging.getLogger("diffstill")
NEWEST = "newest"
BEST = "best-ipc"
KINDS: tuple[Kind, ...] = ("distilled", "report", "card")
STORED: tuple[Kind, ...] = ("distilled", "report")
"""What `publish.store` holds, below `<kind>/<SHA-256>`."""
FORMS = "<name>, <name>@<alias>, <name>/<number>, models:/<name>..., s3://<bucket>/<prefix of a distilled artifact>, or a folder"
DESCRIPTION_LIMIT = 5000
"""Characters of a description that every database behind MLflow holds."""
TRANSFERS = 8
PAGE = 1000
"""Versions that MLflow is asked for at once."""
PATIENCE = 10
"""Refusals of MLflow to move an alias after which it is not the fault of others who publish."""
MARK = "diffstill.version"
"""The tag that every version has: the release of diffstill that published it."""
CONTENT = "diffstill.content"
DEPRECATED = "deprecated"


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    number: int
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    card: str
    created: datetime
    run_id: str

    @property
    def ref(self) -> str:
        """The reference that always means this version."""
        return f"{self.name}/{self.number}"

    def digest(self, kind: Kind = "distilled") -> str:
        """SHA-256 of one of its artifacts."""
        return self.tags["sha256" if kind == "distilled" else f"{kind}_sha256"]

    @property
    def field(self) -> tuple[str, ...]:
        """Scores are compared only between versions that share this: real images, protocol, students and their seeds."""
        return tuple(self.tags.get(name, "") for name in ("images_sha256", "protocol", "students", "student_seeds"))

    def validations(self) -> dict[int, list[float]]:
        """Val accuracy per generation seed, by images per class."""
        return self._by_size("val_seeds/ipc")

    def numbers(self) -> dict[int, dict[str, Any]]:
        """Gain on val and scores by student as fractions, by images per class; as `publish` gathers them."""
        return self._by_size("numbers/ipc")

    def _by_size(self, prefix: str) -> dict[int, Any]:
        return {int(tag.removeprefix(prefix)): json.loads(value) for tag, value in self.tags.items() if tag.startswith(prefix)}


@dataclass(frozen=True)
class Reference:
    """A version by alias or by number."""

    name: str
    alias: str | None = None
    number: int | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises `DiffstillError` on anything but `<name>`, `<name>@<alias>` and `<name>/<number>`, with or without `models:/`."""
        found = re.fullmatch(r"(?:models:/)?([A-Za-z0-9](?:[A-Za-z0-9._ -]*[A-Za-z0-9_-])?)(?:@([\w.-]+)|/([0-9]+))?", text)
        if not found:
            raise DiffstillError(f"{without_secrets(text)!r} is no reference to a distilled set and no folder; write {FORMS}")
        name, alias, number = found.groups()
        return cls(name, alias or (None if number else NEWEST), int(number) if number else None)


class Registry:
    """The model registry of an MLflow server."""

    def __init__(self, run: StageRun | None = None, uri: str | None = None) -> None:
        self._run, self._uri = run, uri

    @cached_property
    def _client(self) -> MlflowClient:
        """Made when it is needed: making it makes a database that is not there."""
        with answering(self._uri):
            return connect(self._uri)

    @classmethod
    def here(cls, run: StageRun | None = None) -> Registry:
        """The registry that `MLFLOW_TRACKING_URI` names; with `run` one that can be published to. Raises `DiffstillError` where tracking is off."""
        if tracking_uri() == OFF:
            raise DiffstillError(
                "versions are kept by MLflow, and MLFLOW_TRACKING_URI is `none`; set it to your server, or unset it for mlflow.db here"
            )
        return cls(run)

    @classmethod
    def at(cls, uri: str) -> Registry:
        """The registry at that URI, whatever the environment says. Raises `DiffstillError` for a database that is not there: MLflow would make an empty one."""
        if (file := database.file_of(uri)) and not file.is_file():
            raise DiffstillError(
                f"{uri}: no such database, so it knows no version; set MLFLOW_TRACKING_URI, or --registry, to the MLflow that has them"
            )
        return cls(uri=uri)

    # --- finding

    def names(self) -> list[str]:
        """All registered models that have a version of ours."""
        return sorted({version.name for version in self.search()})

    def search(self, name: str | None = None, tags: Mapping[str, str] | None = None) -> list[Version]:
        """Versions by name and number, those of one model and with certain tags if asked for."""
        wanted = dict(tags or {})
        with answering():
            found = list(self._listed(f"name = '{name}'" if name else None))
            ours = [one for one in found if MARK in one.tags]
            aliases = {model: self._aliases(model) for model in {one.name for one in ours}}
        versions = [self._version(one, aliases[one.name]) for one in ours]
        kept = [one for one in versions if wanted.items() <= one.tags.items()]
        return sorted(kept, key=lambda one: (one.name, one.number))

    def digests(self) -> frozenset[str]:
        """Every SHA-256 that a version of any model names, ours or not, deprecated or not, in whatever field or tag."""
        with answering(self._uri):
            found = self._settled_listing()
        return frozenset(digest for text in found for digest in re.findall(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", text))

    def _settled_listing(self) -> set[str]:
        """All that all versions say. Pages are cut by position, so a version that is deleted meanwhile hides another: two readings in a row must agree."""
        found, before = set(self._texts()), None
        while len(found) > PAGE and found != before:
            found, before = set(self._texts()), found
        return found

    def _texts(self) -> Iterator[str]:
        return (json.dumps(dict(one), default=str, sort_keys=True).lower() for one in self._listed(None))

    def _listed(self, condition: str | None) -> Iterator[ModelVersion]:
        if (file := database.file_of(self._uri or registry_uri())) and not file.exists():
            return
        token, order = None, ["name ASC", "version_number ASC"]  # by default what was changed comes first, so that places move
        while True:
            page = self._client.search_model_versions(condition, PAGE, order, token)
            yield from page
            if not (token := page.token):
                return

    def _aliases(self, name: str) -> dict[str, int]:
        return {alias: int(number) for alias, number in self._client.get_registered_model(name).aliases.items()}

    def _version(self, found: ModelVersion, aliases: Mapping[str, int]) -> Version:
        own = tuple(sorted(alias for alias, number in aliases.items() if number == int(found.version)))
        created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
        return Version(found.name, int(found.version), dict(found.tags), own, found.description or "", created, found.run_id or "")

    def resolve(self, reference: Reference) -> Version:
        """The version that is meant. Raises `DiffstillError` saying what there is instead."""
        versions = {one.number: one for one in self.search(reference.name)}
        if not versions:
            raise DiffstillError(
                f"{reference.name!r}: no distilled set of that name at {self.address}; there are {', '.join(self.names()) or 'none yet'}"
            )
        aliases = {alias: one for one in versions.values() for alias in one.aliases}
        found = aliases.get(reference.alias or "") if reference.number is None else versions.get(reference.number)
        if found is None:
            wanted = f"alias {reference.alias!r}" if reference.number is None else f"version {reference.number}"
            shown = (f"{number} (deprecated)" if DEPRECATED in one.tags else number for number, one in versions.items())
            raise DiffstillError(f"{reference.name}: has no {wanted}; it has the versions {_some(shown)} and the aliases {_some(sorted(aliases))}")
        if not is_name(found.name):  # a folder is named after it
            raise DiffstillError(f"{self.address} calls {reference.name!r} {found.name!r:.80}, which is no name of a folder; ask who runs it")
        return found

    @property
    def address(self) -> str:
        """The server, without credentials."""
        return without_secrets(self._uri or registry_uri())

    # --- fetching

    def fetch(self, version: Version, kind: Kind = "distilled", record: Record = ignore) -> Path:
        """One of the version's artifacts in the cache, verified; downloaded unless it is there. Raises `DiffstillError` if it has none of that kind."""
        where = version.tags.get(f"files/{kind}")
        if where is None:
            raise DiffstillError(f"{version.ref}: comes without a `{kind}`; a version has {', '.join(KINDS)}")
        fill = partial(_from_s3, where, record) if where.startswith("s3://") else partial(self._from_mlflow, where)
        return cached(version.digest(kind), kind, where, fill)

    def _from_mlflow(self, where: str, folder: Path) -> None:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", str(sys.stderr.isatty()).lower())
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        try:
            arrived = Path(download_artifacts(artifact_uri=where, dst_path=str(folder / ".arriving"), tracking_uri=tracking_uri()))
        except (MlflowException, OSError) as error:
            reason = without_secrets(" ".join(str(error).split()))[:200]
            raise DiffstillError(
                f"{where}: cannot be downloaded from {self.address} ({reason}); see that the server still has these files"
            ) from error
        for path in list(arrived.iterdir()):
            path.rename(folder / path.name)
        arrived.rmdir()
        if (folder / ".arriving").exists():
            (folder / ".arriving").rmdir()

    # --- publishing

    def publish(self, release: Release, record: Record = ignore) -> int:
        """Upload, verify, then register; the number of the version. The same content again finds the version that is there.

        A publisher that was killed leaves its run with the files that had arrived: the next one goes on there.
        """
        with answering():
            self._open_model(release)
            earlier = self._with_content(release.name, release.content)
            number = earlier or self._register(release, home := self._home(release), self._upload(release, home, record))
            self._settle(release.name)
            if earlier:
                self._warn_of_other_card(release, earlier)
        log.info("%s %s/%d at %s", "is there already as" if earlier else "registered", release.name, number, self._page(release.name, number))
        return number

    def _warn_of_other_card(self, release: Release, number: int) -> None:
        there = self._client.get_model_version(release.name, str(number)).tags
        if there.get("card_sha256") != release.artifacts["card"].digest:
            log.warning(
                "section `publish` was changed, but %s/%d with this set and report is there: its card and files stay as they were published",
                release.name,
                number,
            )

    def _page(self, name: str, number: int) -> str:
        """Where people see the version."""
        return (
            f"{self.address.rstrip('/')}/#/models/{quote(name)}/versions/{number}?workflowType=machine_learning"
            if self.address.startswith("http")
            else self.address
        )

    def _open_model(self, release: Release) -> None:
        from mlflow.exceptions import MlflowException

        dataset = release.tags["dataset"]
        text = f"Distilled image sets of {dataset}: small synthetic training sets, each version with its card, scores and lineage."
        try:
            self._client.create_registered_model(release.name, {"dataset": dataset, MARK: __version__}, text)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _with_content(self, name: str, content: str) -> int | None:
        numbers = [int(one.version) for one in self._listed(f"name = '{name}'") if one.tags.get(CONTENT) == content]
        return min(numbers) if numbers else None

    def _upload(self, release: Release, home: str, record: Record) -> Mapping[Kind, str]:
        """Where each artifact lies now: the card always in MLflow, where people browse it."""
        store = release.config.store
        places: dict[Kind, str] = {}
        for kind in KINDS:
            artifact = release.artifacts[kind]
            if store and kind in STORED:
                places[kind] = f"{store.rstrip('/')}/{kind}/{artifact.digest}"
                encryption = storage.Encryption(release.config.encryption, release.config.kms_key) if release.config.encryption else None
                storage.upload(artifact.folder, places[kind], record, encryption=encryption)
            else:
                places[kind] = f"runs:/{home}/{kind}"
                self._log_artifact(home, kind, artifact, record)
        self._log_page(home, release)
        return places

    def _home(self, release: Release) -> str:
        """The run that holds these files: that of an earlier publisher who did not come to an end, or our own."""
        if self._run is None:
            raise DiffstillError("publishing needs a run in MLflow; run the stage with `diffstill publish`")
        own = self._client.get_run(self._run.run_id).info
        tags = {"diffstill.model": release.name, CONTENT: release.content, "diffstill.card": release.artifacts["card"].digest}
        condition = " and ".join(["attributes.status != 'FINISHED'", *(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())])
        found = self._client.search_runs([own.experiment_id], condition, order_by=["attributes.start_time ASC"])
        home = str(found[0].info.run_id if found else own.run_id)
        for tag, value in tags.items():
            self._client.set_tag(home, tag, value)
        return home

    def _log_artifact(self, run_id: str, kind: Kind, artifact: Artifact, record: Record) -> None:
        """Every file that is not there yet in its size; then all of them must be."""
        files = {path.relative_to(artifact.folder).as_posix(): path.stat().st_size for path in artifact.folder.rglob("*") if path.is_file()}
        files = {name: size for name, size in files.items() if name == MANIFEST or name in artifact.manifest.files}
        there = dict(self._files(run_id, kind, kind))
        waiting = [name for name, size in files.items() if there.get(name) != size]

        def send(name: str) -> int:
            self._client.log_artifact(run_id, str(artifact.folder / name), str(Path(kind, name).parent))
            return files[name]

        with record.progress(f"upload {kind}", sum(files[name] for name in waiting), "B") as progress, ThreadPool(TRANSFERS) as pool:
            for sent in pool.imap_unordered(send, waiting):
                progress.update(sent)
        arrived = dict(self._files(run_id, kind, kind))
        if lost := sorted(name for name, size in files.items() if arrived.get(name) != size):
            raise DiffstillError(
                f"{kind}/{lost[0]}: did not arrive whole in the artifacts of run {run_id} at {self.address}; publish again, or if its name has a character "
                "that MLflow's server does not keep (#, ? or %, as a rule), set `publish.store` to an S3 prefix or rename the class"
            )

    def _files(self, run_id: str, folder: str, root: str) -> Iterator[tuple[str, int]]:
        for found in self._client.list_artifacts(run_id, folder):
            if found.is_dir:
                yield from self._files(run_id, found.path, root)
            else:
                yield found.path.removeprefix(f"{root}/"), int(found.file_size)

    def _log_page(self, run_id: str, release: Release) -> None:
        """The report where the list of artifacts begins, however large sets are stored."""
        self._client.log_artifact(run_id, str(release.artifacts["report"].folder / "report.html"))
        self._client.set_tag(run_id, "mlflow.note.content", _description(release, run_id))

    def _register(self, release: Release, home: str, places: Mapping[Kind, str]) -> int:
        """A new version, unless another publisher of the same content was first: the earlier one stays."""
        tags = {
            **release.tags,
            "card_sha256": release.artifacts["card"].digest,
            **_origins(),
            **{f"files/{kind}": place for kind, place in places.items()},
            CONTENT: release.content,
            MARK: __version__,
        }
        made = self._client.create_model_version(
            release.name, places["distilled"], run_id=home, tags=tags, description=_description(release, home), await_creation_for=None
        )
        first = self._with_content(release.name, release.content) or int(made.version)
        if first != int(made.version):
            self._client.delete_model_version(release.name, str(made.version))
        self._client.set_terminated(home, "FINISHED")
        return first

    # --- aliases

    def _settle(self, name: str) -> None:
        """Move the aliases of ours to where the versions say, until nobody has moved them meanwhile."""
        from mlflow.exceptions import MlflowException

        failures = 0
        while (wanted := elect(self.search(name))) != (ours := self._ours(name)):
            try:
                self._move(name, wanted, ours)
            except MlflowException:  # somebody else set the same alias in that moment
                failures += 1
                if failures == PATIENCE:
                    raise

    def _ours(self, name: str) -> dict[str, int]:
        return {alias: number for alias, number in self._aliases(name).items() if re.fullmatch(rf"{NEWEST}|{BEST}[0-9]+", alias)}

    def _move(self, name: str, wanted: Mapping[str, int], ours: Mapping[str, int]) -> None:
        for alias, number in wanted.items():
            if ours.get(alias) != number:
                self._client.set_registered_model_alias(name, alias, str(number))
        for alias in ours.keys() - wanted.keys():
            self._client.delete_registered_model_alias(name, alias)

    def deprecate(self, version: Version, reason: str) -> None:
        """Mark a version as one not to use: it stays, loading it warns, and no alias of ours leads to it."""
        with answering():
            self._client.set_model_version_tag(version.name, str(version.number), DEPRECATED, reason)
            self._settle(version.name)

    def restore(self, version: Version) -> None:
        """Take `deprecate` back."""
        with answering():
            self._client.delete_model_version_tag(version.name, str(version.number), DEPRECATED)
            self._settle(version.name)


def elect(versions: Sequence[Version]) -> dict[str, int]:
    """Where the aliases belong: `newest` on the last version, `best-ipc<N>` on the first whose val score no later one beats beyond its noise.

    A later version takes `best-ipc<N>` over only if the 95 % interval of its val gain over the holder is above zero, and if both were
    judged on the same real images by the same protocol, students and student seeds. Deprecated versions hold nothing, nor do those that repeat a content:
    they are there for the moment in which two publish the same.
    """
    first: dict[str, Version] = {}
    for one in sorted(versions, key=lambda one: one.number):
        first.setdefault(one.tags[CONTENT], one)
    standing = [one for one in first.values() if DEPRECATED not in one.tags]
    best: dict[int, Version] = {}
    for one in standing:
        for size in one.validations():
            holder = best.get(size)
            if holder is None or (holder.field == one.field and _over(one, holder, size).verdict == "gain"):
                best[size] = one
    newest = {NEWEST: standing[-1].number} if standing else {}
    return newest | {f"{BEST}{size}": one.number for size, one in best.items()}


def _over(one: Version, holder: Version, size: int) -> Gain:
    """What `one` gains over `holder` on val: paired where both were drawn with the same generation seeds, and so from the same noise."""
    from diffstill.scores import gain

    ours, theirs = one.validations()[size], holder.validations()[size]
    seeds = one.tags.get("seeds"), holder.tags.get("seeds")
    return gain(ours, theirs, paired=seeds[0] is not None and seeds[0] == seeds[1] and len(ours) == len(theirs))


def _origins() -> dict[str, str]:
    """What publishes: the commit of the project, what diffstill is, and the environment; on a cluster also the image and Kubeflow's run."""
    image, chain = os.environ.get("DIFFSTILL_IMAGE"), os.environ.get("DIFFSTILL_CHAIN", "")
    found = {"git_sha": git_sha(), "code": code_commit(), "environment": json.dumps(environment(), sort_keys=True)} | (
        {"image": image} if image else {}
    )
    return found | ({"kfp_run_id": chain} if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", chain) else {})


def _description(release: Release, run_id: str) -> str:
    """The card as a description: its pictures from the artifacts of the run, its end left out where it is too long."""
    text = (release.artifacts["card"].folder / "card.md").read_text(encoding="utf-8")
    text = text.replace("](sheets/", f"](get-artifact?run_uuid={run_id}&path=card/sheets/")
    if len(text) <= DESCRIPTION_LIMIT:
        return text
    rest = "\n\n(The rest of the card, with the lineage, is `card/card.md` among the artifacts of the source run.)\n"
    kept = text[: text.rfind("\n", 0, DESCRIPTION_LIMIT - len(rest))]
    return (kept if kept.count("```") % 2 == 0 else kept[: kept.rfind("```")].rstrip()) + rest


def _some(values: Iterable[Any]) -> str:
    shown = [str(value) for value in values]
    return (", ".join(shown[-8:]) if len(shown) <= 8 else "..., " + ", ".join(shown[-8:])) or "none"


# --- any reference --------------------------------------------------------------------------------------------------


def cached(digest: str, kind: Kind, where: str, fill: Callable[[Path], None]) -> Path:
    """The artifact of that digest in the cache, verified; `fill` brings it from `where` if it is not there yet."""
    if not is_digest(digest):
        raise DiffstillError(f"{where}: is said to have the SHA-256 {digest!r:.80}, which is none; publish it anew")
    folder = cache_folder() / kind / digest

    def arrive(partial_folder: Path) -> None:
        fill(partial_folder)
        fix = "it was changed there; restore it, or delete the version that it belongs to and publish anew"
        _verify(partial_folder, digest, kind, where, fix)

    there = folder.exists()
    storage.appear(folder, arrive)
    if there:
        _verify(folder, digest, kind, str(folder), f"it was changed in the cache; remove {folder}, and it is downloaded anew")
    return folder


def _verify(folder: Path, digest: str, kind: Kind, shown: str, fix: str) -> None:
    """Raise `DiffstillError` unless all of the artifact of that digest, or of a shard of it, is there, and nothing else."""
    try:
        found = open_artifact(folder, kind, shard="shard" in read_manifest(folder, kind).facts).digest
    except DiffstillError as error:
        raise DiffstillError(f"{str(error).partition(';')[0].replace(str(folder), shown)}; {fix}") from error
    if found != digest:
        raise DiffstillError(f"{shown}: is {found}, not {digest}; {fix}")


def _from_s3(uri: str, record: Record, folder: Path) -> None:
    storage.transfer(uri, storage.listing(uri), folder, record)


@dataclass(frozen=True)
class Found:
    """A distilled set, wherever it lies: `version` if it is one, else a folder or an S3 prefix."""

    ref: str
    version: Version | None
    folders: Mapping[Kind, Path]

    def folder(self, kind: Kind = "distilled", record: Record = ignore) -> Path:
        """One of its artifacts, brought here. Raises `DiffstillError` where it has none of that kind."""
        if self.version:
            return Registry.here().fetch(self.version, kind, record)
        if kind not in self.folders:
            raise DiffstillError(f"{self.ref}: comes without a `{kind}`; give a published version, or a folder with `{kind}` beside `distilled`")
        return self.folders[kind]

    @property
    def digest(self) -> str:
        """SHA-256 of the set."""
        return self.version.digest() if self.version else read_manifest(self.folder(), "distilled").digest

    def lineage(self) -> Lineage:
        """Where it comes from; with what judged it, where there is a report."""
        kind: Kind = "report" if self.version or "report" in self.folders else "distilled"
        return Lineage.of(open_artifact(self.folder(kind), kind))


def find(ref: str, record: Record = ignore) -> Found:
    """The set that a reference means: a folder if there is one of that name, an S3 prefix, else a version. Raises `DiffstillError` where there is none."""
    path = Path(ref)
    if ref and path.is_dir():
        return Found(ref, None, _beside(path))
    if ref.startswith("s3://"):
        return Found(ref, None, {"distilled": bring(ref, "distilled", record)})
    if ref.startswith((".", "/", "~")):
        raise DiffstillError(f"{ref}: no such folder; write {FORMS}")
    reference = Reference.parse(ref)
    version = Registry.here().resolve(reference)
    if reason := version.tags.get(DEPRECATED):
        log.warning("%s is deprecated: %s", version.ref, reason)
    return Found(ref, version, {})


def _beside(path: Path) -> dict[Kind, Path]:
    """The set at `path` or in its folder `distilled`, and the report and the card beside it, if they are of this set."""
    root = path if (path / MANIFEST).is_file() or not (path / "distilled").is_dir() else path / "distilled"
    made, found = read_manifest(root, "distilled"), {KINDS[0]: root}
    for kind in KINDS[1:]:
        beside = root.parent / kind
        if (beside / MANIFEST).is_file() and read_manifest(beside, kind).manifest.inputs.get("distilled") == made.digest:
            found[kind] = beside
    return found


def bring(ref: str, kind: Kind, record: Record = ignore) -> Path:
    """An artifact below an S3 prefix, or one of a published version, in the cache and verified."""
    if not ref.startswith("s3://"):
        return find(ref, record).folder(kind, record)
    manifest = storage.read(f"{ref.rstrip('/')}/{MANIFEST}")
    return cached(sha256(manifest).hexdigest(), kind, ref, partial(_from_s3, ref, record))
