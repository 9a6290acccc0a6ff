"""How Kubeflow Pipelines is reached: `kfp.Client` without its side doors, and one clear message for everything that can go wrong.

A token is read from the environment, goes into the header of requests and nowhere else.
"""

import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api as api
from urllib3 import Retry
from urllib3.exceptions import HTTPError, LocationParseError, MaxRetryError, SSLError
from urllib3.util import parse_url

from diffstill.errors import DiffstillError, without_secrets
from pipelines.settings import ClusterConfig

log = logging.getLogger("diffstill")
RETRIES = Retry(3, redirect=0, status_forcelist=(502, 503, 504), backoff_factor=0.3, raise_on_status=False, raise_on_redirect=False)
"""For a server that is not there for a moment. A POST that reached it is never repeated, so that no run is started twice.

A redirect leads to a login page, and 500 is what Kubeflow says of mistakes that stay.
"""
TIMEOUT = (10, 60)
"""Seconds to connect and to wait for data; the generated client waits for ever."""

OLDEST = (2, 17)
"""Of the server: what the tests hold the pipeline to is read in its code."""

CREDENTIALS = "put a valid bearer token into an environment variable and its name into `cluster.token_env`, and check your rights in the namespace"
LOGIN = f"answers with a page where data is expected, perhaps a login; {CREDENTIALS}, or correct the host"
CERTIFICATE = "set `cluster.ca_certificate` to the file of its certificate authority, or correct the host"


@dataclass(frozen=True)
class Connection:
    """A server that has answered once."""

    host: str
    client: kfp.Client
    _token: str | None = field(repr=False)
    version: str | None = None
    """As the server calls itself; None where it does not say."""

    def refuse_old(self) -> None:
        """Raise `DiffstillError` if the server may read the pipeline otherwise than it is meant."""
        found = re.match(r"v?(\d+)\.(\d+)", self.version or "")
        if not found:
            log.warning("%s: does not say its version (%s); Kubeflow Pipelines 2.17 or later is needed", self.host, self.version or "nothing")
        elif (int(found[1]), int(found[2])) < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise DiffstillError(
                f"{self.host}: is Kubeflow Pipelines {self.version}, the pipeline needs {needed} or later; upgrade it, or submit to another"
            )

    def clean(self, text: str) -> str:
        """`text` from the server without the token, should it quote it, and without credentials in URLs."""
        return without_secrets(text.replace(self._token, "***") if self._token else text)

    @contextmanager
    def answering(self, what: str | None = None) -> Iterator[None]:
        """Turn a failure of the server or the network into one message without secrets, and keep kfp from printing; `what` is asked for.

        `from None`, because the errors hold headers and bodies that may quote the token.
        """
        try:
            with redirect_stdout(io.StringIO()):
                yield
        except api.ApiException as error:
            raise DiffstillError(f"{self.host}: {self.clean(_refusal(error, what))}") from None
        except (HTTPError, ConnectionError) as error:
            raise DiffstillError(f"{self.host}: {self.clean(_unreachable(error))}") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise DiffstillError(f"{self.host}: {LOGIN}") from None


def connect(config: ClusterConfig) -> Connection:
    """Raises `DiffstillError` without a host or token, and if the host does not answer, refuses, or needs a namespace."""
    host, token, certificate = find_host(config), _find_token(config), _certificate(config)
    if host is None:
        raise DiffstillError("no host of Kubeflow Pipelines is given; set `cluster.host`, --host or the environment variable KFP_HOST to its URL")
    with Connection(host, None, token).answering(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it needs v2.0.0-beta.2 and later
        client = _Client(host=host, existing_token=token, ssl_ca_cert=certificate)
    if client.multi_user and not config.namespace:
        raise DiffstillError(f"{host}: is a multi-user installation; set `cluster.namespace` or --namespace to the namespace of your profile")
    return Connection(host, client, token, client.version)


def find_host(config: ClusterConfig) -> str | None:
    """The URL from the settings or `KFP_HOST`, checked; None if neither has one."""
    host = config.host or os.environ.get("KFP_HOST")
    if not host:
        return None
    try:
        parts = parse_url(host)
    except LocationParseError:
        parts = None
    if not parts or parts.scheme not in ("http", "https") or not parts.host or parts.auth or parts.query or parts.fragment:
        raise DiffstillError(
            f"host {without_secrets(host)!r} is not the plain URL of an installation; write it like https://kubeflow.example.org/pipeline, "
            "a token belongs into an environment variable that `cluster.token_env` names"
        )
    return host.rstrip("/")


def _find_token(config: ClusterConfig) -> str | None:
    if config.token_env is None:
        return None
    token = os.environ.get(config.token_env, "").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        state = "holds no single line of plain characters" if token else "is not set"
        raise DiffstillError(f"environment variable {config.token_env}, which `cluster.token_env` names, {state}; put the bearer token there")
    return token


def _certificate(config: ClusterConfig) -> str | None:
    if config.ca_certificate and not Path(config.ca_certificate).is_file():
        raise DiffstillError(f"{config.ca_certificate}: no such file; correct `cluster.ca_certificate`, or set it to null")
    return config.ca_certificate


class _Rest(api.rest.RESTClientObject):  # type: ignore[misc]
    """Bounds every request in time and takes JSON alone for an answer: the generated client reads a login page as an empty list."""

    def request(self, *given: Any, _preload_content: bool = True, _request_timeout: Any = None, **more: Any) -> Any:
        """Send it; without `_preload_content` the raw answer is handed on, unless it is a page."""
        answer = super().request(*given, _preload_content=_preload_content, _request_timeout=_request_timeout or TIMEOUT, **more)
        if _preload_content or "html" in answer.headers.get("content-type", ""):
            json.loads(answer.data)
        return answer


class _Client(kfp.Client):  # type: ignore[misc]
    """`kfp.Client` that reads and writes no context file in the home folder, and asks once whether the host is well."""

    multi_user = False
    version: str | None = None

    def _load_context_setting_or_default(self) -> None:
        self._context_setting = {"namespace": ""}

    def set_user_namespace(self, namespace: str) -> None:
        """Nothing: the namespace comes from the settings."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> api.V2beta1GetHealthzResponse:  # noqa: ARG002  (kfp's signature)
        """The constructor's only request, and the first of all, so that the transport is put in place here."""
        transport = self._healthz_api.api_client
        transport.configuration.retries = RETRIES
        transport.rest_client = _Rest(transport.configuration)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # after the configuration, which sets a level of its own
        answer = self._healthz_api.healthz_service_get_healthz()
        self.multi_user = bool(answer.multi_user)
        told = json.loads(transport.last_response.data)  # the model of the answer drops the version
        self.version = told.get("tag_name") or told.get("apiServerTagName")  # of the server itself, or of the UI before it
        return answer


def _refusal(error: api.ApiException, what: str | None) -> str:
    said = _message(error)
    if error.status in (401, 403):
        return f"refuses ({error.status}{said}); {CREDENTIALS}"
    if error.status == 404:
        return f"has no {what or 'such address'} (404{said}); check it, and the host"
    if 300 <= error.status < 400:
        return LOGIN
    advice = "look into the logs of its API server" if error.status >= 500 else "change what is asked for"
    return f"fails{f' with {what}' if what else ''} ({error.status}{said}); {advice}"


def _message(error: api.ApiException) -> str:
    """What the server says in its own words: the message of its JSON, a line of text, else the status line."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
    try:
        said = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        said = body if body and not body.lstrip().startswith(("<", "{")) else str(error.reason or "")
    text = " ".join(said.split())
    return f", {text[:300]}" if text else ""


def _unreachable(error: Exception) -> str:
    reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
    if isinstance(reason, SSLError):
        return f"shows no certificate that can be trusted ({reason}); {CERTIFICATE}"
    return f"does not answer ({type(reason).__name__}); check the host, the network and the port forward"
