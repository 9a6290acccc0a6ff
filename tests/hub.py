"""A small server that speaks the part of the Hugging Face hub's interface which downloads need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


@contextmanager
def hub(folder: Path, repository: str, commits: dict[str, str], token: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of `folder` as `repository`, its revisions `commits` by name; the URL, and the requests seen."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            seen.append(f"{self.command} {path}")
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                self.reply(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted"}, body=body)
                return
            files = sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file())
            for start in (f"/api/models/{repository}/revision/", f"/api/models/{repository}/tree/"):
                if path.startswith(start) and (commit := self.commit(path.removeprefix(start).split("/")[0])):
                    listed = [{"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": digest(folder / name)} for name in files]
                    known = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                    self.reply(200, json.dumps(listed if "/tree/" in start else known).encode(), {"Content-Type": "application/json"}, body=body)
                    return
            start = f"/{repository}/resolve/"
            if path.startswith(start):
                revision, _, name = path.removeprefix(start).partition("/")
                commit = self.commit(revision)
                if commit and name in files:
                    self.reply(200, (folder / name).read_bytes(), {"ETag": f'"{digest(folder / name)}"', "X-Repo-Commit": commit}, body=body)
                    return
            missing = "RevisionNotFound" if repository in path else "RepoNotFound"
            self.reply(404, b"{}", {"X-Error-Code": missing, "X-Error-Message": "not there"}, body=body)

        def commit(self, revision: str) -> str | None:
            return revision if revision in commits.values() else commits.get(revision)

        def reply(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def digest(path: Path) -> str:
    """What git calls a file: SHA-1 of its length and content."""
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
