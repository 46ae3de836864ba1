"""A local stub of the Hugging Face hub. It serves data sets for ``datasets.load_dataset`` and accepts models from ``upload_folder``."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """Serve ``server.sets``: data set name, then path, then content. ``server.paths`` records the requested paths."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(body.get("paths"))

    def do_GET(self) -> None:
        self._answer(None)

    def _answer(self, paths: list[str] | None) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/").strip("/")
        self.server.paths.append(path)  # type: ignore[attr-defined]
        sets: Mapping[str, Mapping[str, bytes]] = self.server.sets  # type: ignore[attr-defined]
        name = next((name for name in sets if path.startswith((f"api/datasets/{name}", f"datasets/{name}/"))), None)
        if name is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files, tail = sets[name], path.partition(name)[2].strip("/")
        if path.startswith("api/"):
            kind, _, place = tail.partition("/")
            if kind in ("tree", "paths-info"):
                folder = place.partition("/")[2]
                entries = self._children(files, folder) if paths is None else self._children(files, "", paths)
                return self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            facts = {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": [{"rfilename": file} for file in files]}
            return self._send(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})
        file = tail.partition("/")[2].partition("/")[2]  # resolve/REVISION/FILE
        if file not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = files[file]
        etag = hashlib.sha1(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _children(self, files: Mapping[str, bytes], folder: str, paths: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return the entries directly in a folder, or the entries for ``paths``."""
        start = f"{folder}/" if folder else ""
        names = [file for file in files if file.startswith(start)]
        inner = {start + file.removeprefix(start).partition("/")[0] for file in names}
        every = {*names, *inner} if paths is not None else inner
        chosen = sorted(every if paths is None else every & set(paths))
        return [self._entry(path, files.get(path)) for path in chosen]

    def _entry(self, path: str, content: bytes | None) -> dict[str, Any]:
        if content is None:
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class Pushes(BaseHTTPRequestHandler):
    """Accept models into ``server.pushed``: model name, then path, then content. A name that begins with ``refused`` is refused."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0].replace("%2F", "/").strip("/")
        self.server.tokens.add(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        pushed: dict[str, dict[str, bytes]] = self.server.pushed  # type: ignore[attr-defined]
        if path == "api/repos/create":
            name = json.loads(body)["name"]
            if name.startswith("refused"):
                return self._send(403, {"error": "you may not"})
            pushed.setdefault(f"me/{name}", {})
            return self._send(200, {"url": f"http://{self.headers['Host']}/me/{name}", "id": f"me/{name}"})
        repo, _, _ = path.removeprefix("api/models/").partition("/preupload" if "/preupload" in path else "/commit")
        if "/preupload" in path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._send(200, {"files": files})
        if "/commit" in path:
            entries = [json.loads(line) for line in body.splitlines()]
            files = {entry["value"]["path"]: entry["value"]["content"] for entry in entries if entry["key"] == "file"}
            pushed[repo] |= {name: base64.b64decode(content) for name, content in files.items()}
            return self._send(200, {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})
        return self._send(200, {"errors": [], "warnings": []})  # validation of a model card

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/")
        self._send(200, {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": []})

    def _send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def taking() -> Iterator[Any]:
    """Accept this process's pushes in place of the hub. Yield the server: ``pushed`` files and the ``tokens`` received."""
    import huggingface_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pushes)
    server.pushed, server.tokens = {}, set()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with mock.patch.multiple(huggingface_hub.constants, ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE=False):
            yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(folder: Path, sets: Mapping[str, Mapping[str, bytes]]) -> Iterator[list[str]]:
    """Serve data sets to this process in place of the hub, with caches in ``folder``. Yield the list of requested paths."""
    import datasets
    import huggingface_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.sets, server.paths = sets, []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    try:
        with (
            mock.patch.multiple(constants, ENDPOINT=address, HF_HUB_CACHE=str(folder / "hub"), HF_HUB_OFFLINE=False),
            mock.patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"),
            mock.patch.multiple(datasets.config, HF_ENDPOINT=address, HF_HUB_OFFLINE=False, HF_DATASETS_CACHE=str(folder / "datasets")),
        ):
            yield server.paths  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
