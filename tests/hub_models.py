"""A Hub on loopback that takes models: what the real one answers to an upload, and to a download.

with ModelHub() as hub:
    subprocess.run(..., env={**os.environ, **hub.environment(tmp_path, TOKEN)})
    hub.models["me/tiny"]["config.json"]
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_server import COMMIT, TOKEN, HubServer, Repo

LARGE = (".safetensors", ".model", ".gguf")


@dataclass
class ModelHub(HubServer):
    repos: dict[str, Repo] = field(default_factory=dict)
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """What was stored by SHA-256, whether committed or not."""
    refuse_uploads: int = 0
    """So many of the next uploads of large files fail."""
    n_uploads: int = 0

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            model_hub = hub

        return Handler


class _Handler(BaseHTTPRequestHandler):
    model_hub: ModelHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        name = r"([\w.-]+/[\w.-]+)"
        for method, pattern, act in (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", rf"/api/models/{name}/preupload/main", self._preupload),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/store/(\w+)", self._store),
            ("POST", rf"/api/models/{name}/commit/main", self._commit),
            ("GET", rf"/api/models/{name}(?:/revision/[^/]+)?", self._info),
            ("GET", rf"/api/models/{name}/tree/[^/]+.*", self._tree),
            ("GET", rf"/{name}/resolve/[^/]+/(.+)", self._resolve),
        ):
            verb = "GET" if self.command == "HEAD" else self.command
            if verb == method and (match := re.fullmatch(pattern, path)):
                if self.headers.get("Authorization") != f"Bearer {TOKEN}" and method != "PUT":
                    return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
                return act(*match.groups(), body=body)
        self.model_hub.unexpected.append(f"{self.command} {self.path}")
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def _whoami(self, *, body: bytes) -> None:
        self._json({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})

    def _create(self, *, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.model_hub.models
        self.model_hub.models.setdefault(name, {})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.model_hub.private.setdefault(name, bool(private))
        self._json({"url": f"{self.model_hub.url}/{name}"}, 409 if known else 200)

    def _validate(self, *, body: bytes) -> None:
        assert "content" in json.loads(body)
        self._json({"errors": [], "warnings": []})

    def _preupload(self, name: str, *, body: bytes) -> None:
        files = [
            {
                "path": file["path"], "shouldIgnore": False,
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
            }
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        self._json({"files": files, "commitOid": COMMIT})

    def _batch(self, name: str, *, body: bytes) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.model_hub.url}/store/{wanted['oid']}"}}
            stored = wanted["oid"] in self.model_hub.large
            objects.append({**wanted, **({} if stored else {"actions": action})})
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, *, body: bytes) -> None:
        hub = self.model_hub
        hub.n_uploads += 1
        if hub.refuse_uploads:
            hub.refuse_uploads -= 1
            return self._send(403, b"", {})
        assert hashlib.sha256(body).hexdigest() == oid
        hub.large[oid] = body
        return self._send(200, b"", {})

    def _commit(self, name: str, *, body: bytes) -> None:
        for line in body.splitlines():
            value = json.loads(line)["value"]
            if json.loads(line)["key"] == "file":
                self.model_hub.models[name][value["path"]] = base64.b64decode(value["content"])
            elif json.loads(line)["key"] == "lfsFile":
                self.model_hub.models[name][value["path"]] = self.model_hub.large[value["oid"]]
        url = f"{self.model_hub.url}/{name}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _info(self, name: str, *, body: bytes) -> None:
        if name not in self.model_hub.models:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        files = self.model_hub.models[name]
        return self._json(
            {
                "id": name, "modelId": name, "sha": COMMIT, "private": True, "tags": [],
                "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in files],
            }
        )  # fmt: skip

    def _tree(self, name: str, *, body: bytes) -> None:
        files = self.model_hub.models[name]
        self._json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": "1" * 40}
                for path, data in files.items()
            ]
        )

    def _resolve(self, name: str, path: str, *, body: bytes) -> None:
        data = self.model_hub.models.get(name, {}).get(path)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(data).hexdigest()
        return self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
