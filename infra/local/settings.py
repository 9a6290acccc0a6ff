"""Passwords and ports of the stack: the file `.env`, which compose reads, too."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from diffstill.errors import DiffstillError

HERE = Path(__file__).parent
FILE = HERE / ".env"
EXAMPLE = HERE / ".env.example"
SECRETS = ("postgres_password", "s3_access_key", "s3_secret_key")
BUCKETS = ("mlflow", "diffstill")
"""What MLflow's server keeps, and what `publish.store` names."""


@dataclass(frozen=True)
class Settings:
    """What stands in the file, in lower case."""

    postgres_password: str
    s3_access_key: str
    s3_secret_key: str
    mlflow_port: int = 5000
    s3_port: int = 8333
    postgres_port: int = 55432
    ceph_port: int = 55433

    @property
    def mlflow_url(self) -> str:
        """Where runs and versions are browsed, and `MLFLOW_TRACKING_URI`."""
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def s3_url(self) -> str:
        """Where the buckets are."""
        return f"http://127.0.0.1:{self.s3_port}"

    @property
    def s3_environment(self) -> dict[str, str]:
        """What points AWS's libraries to the buckets."""
        return {
            "AWS_ENDPOINT_URL": self.s3_url,
            "AWS_ACCESS_KEY_ID": self.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def environment(self) -> dict[str, str]:
        """What a user of the stack needs."""
        return {"MLFLOW_TRACKING_URI": self.mlflow_url, **self.s3_environment}

    def rotated(self) -> Settings:
        """The same with other secrets."""
        new = fresh_settings()
        return replace(self, postgres_password=new.postgres_password, s3_access_key=new.s3_access_key, s3_secret_key=new.s3_secret_key)


def fresh_settings() -> Settings:
    """Random passwords, and the usual ports."""
    return Settings(postgres_password=secrets.token_hex(24), s3_access_key=secrets.token_hex(10).upper(), s3_secret_key=secrets.token_hex(20))


def read_settings(path: Path) -> Settings:
    """The settings in a file. Raises `DiffstillError` naming the line or what is missing."""
    return _parsed(path, _text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DiffstillError(f"{path}: no such settings file; bring the stack up first, which makes it: make stack") from error
    except UnicodeDecodeError as error:
        raise DiffstillError(f"{path}: not UTF-8; write it anew as {EXAMPLE.name} of infra/local shows") from error


def _parsed(path: Path, text: str) -> Settings:
    given = {name: value for name, value in _pairs(path, text) if name in {field.name for field in fields(Settings)}}
    if missing := [name.upper() for name in SECRETS if not given.get(name)]:
        raise DiffstillError(f"{path}: {', '.join(missing)} not set; fill in a password each, or remove the file: it is then made with random ones")
    ports = {name: _port(path, name, value) for name, value in given.items() if name.endswith("_port")}
    settings = Settings(given["postgres_password"], given["s3_access_key"], given["s3_secret_key"], **ports)
    _refuse_equal_ports(path, settings)
    return settings


def _refuse_equal_ports(path: Path, settings: Settings) -> None:
    """Also with one that the file does not give."""
    names: dict[int, list[str]] = {}
    for name, value in asdict(settings).items():
        if name.endswith("_port"):
            names.setdefault(value, []).append(name.upper())
    if equal := next((port for port in names if len(names[port]) > 1), None):
        raise DiffstillError(f"{path}: two ports are equal: {' and '.join(names[equal])} are {equal}; give each role its own")


def _pairs(path: Path, text: str) -> list[tuple[str, str]]:
    """Names in lower case, and values."""
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        found = re.fullmatch(r"([A-Z0-9_]+)=([A-Za-z0-9_-]*)", line.strip())
        if found:
            pairs.append((found[1].lower(), found[2]))
        elif line.strip() and not line.lstrip().startswith("#"):  # the line itself may hold a password
            raise DiffstillError(f"{path}, line {number}: not NAME=value with a value of letters, digits, - and _; correct the line")
    return pairs


def _port(path: Path, name: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", value) or not 1024 <= int(value) < 65536:
        raise DiffstillError(f"{path}: {name.upper()} is {value!r}; give a port from 1024 to 65535")
    return int(value)


def write_settings(settings: Settings, path: Path) -> None:
    """Fill in the file, or the example where there is none yet; other lines stay. Only its owner may read it."""
    text = _text(path if path.exists() else EXAMPLE)
    for name, value in asdict(settings).items():
        text = re.sub(rf"^[ \t]*{name.upper()}=.*$", f"{name.upper()}={value}", text, flags=re.MULTILINE)
    if _parsed(path, text) != settings:
        raise DiffstillError(f"{path}: a value has no line of its own to be written to; give each a line NAME=")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.new")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    scratch.replace(path)


def settings_at(path: Path) -> Settings:
    """The settings in a file, which is made with random passwords if it is not there."""
    if not path.exists():
        write_settings(fresh_settings(), path)
    return read_settings(path)
