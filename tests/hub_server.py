"""A Hub on loopback: what the real one answers about a data set's commit, listing and files.

    with HubServer({"org/name": Repo({"data/train-0.parquet": b"..."})}) as hub:
        subprocess.run(..., env=hub.environment(tmp_path))

A request that nobody expected is answered with 404 and kept in `unexpected`.
"""

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback"


@dataclass
class Repo:
    files: dict[str, bytes]
    card: str = ""
    gated: bool = False


@dataclass
class HubServer:
    repos: dict[str, Repo]
    faults: list[str] = field(default_factory=list)
    """What to do to the next requests for content: a status, "cut", "close", "stall", or "die":
    from then on no request is answered."""
    unexpected: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """The revisions that were asked for; "" where none was named."""
    head: str = COMMIT
    """What `main` is. The files are those of COMMIT, and no others can be had."""
    dead: bool = False

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        return Handler

    def __enter__(self) -> Self:
        self.ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        for repo in self.repos.values():
            if repo.card:
                repo.files["README.md"] = repo.card.encode()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, token: str = "") -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        if self.server_hub.dead:
            self.close_connection = True
            return None
        for pattern, method in (
            (r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            (r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", self._paths_info),
            (r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, path):
                name, *rest = match.groups()
                repo = self.server_hub.repos.get(name)
                if repo is None:
                    return self._refuse(401, "RepoNotFound")
                self.server_hub.asked.append(rest[0] or "")
                if rest[0] not in (None, "main", COMMIT):
                    return self._refuse(404, "RevisionNotFound")
                return method(name, repo, *rest[1:], body=body)
        self.server_hub.unexpected.append(f"{self.command} {self.path}")
        return self._refuse(404, "EntryNotFound")

    def _info(self, name: str, repo: Repo, *, body: bytes) -> None:
        sha = COMMIT if COMMIT in self.path else self.server_hub.head
        self._json(
            {
                "id": name, "sha": sha, "private": False, "tags": [], "downloads": 0, "likes": 0,
                "gated": "auto" if repo.gated else False, "cardData": {"license": "cc0-1.0"},
                "siblings": [{"rfilename": path} for path in repo.files],
            }
        )  # fmt: skip

    def _tree(self, name: str, repo: Repo, folder: str | None, *, body: bytes) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in repo.files if path.startswith(prefix)]
        if not inside:
            return self._refuse(404, "EntryNotFound")
        entries = [_entry(repo, path) for path in inside]
        folders = {
            prefix + "/".join(parts[: n + 1])
            for path in inside
            for parts in [path.removeprefix(prefix).split("/")]
            for n in range(len(parts) - 1)
        }
        entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        if "recursive=true" not in self.path.lower():
            entries = [e for e in entries if "/" not in e["path"].removeprefix(prefix)]
        return self._json(sorted(entries, key=lambda entry: entry["path"]))

    def _paths_info(self, name: str, repo: Repo, *, body: bytes) -> None:
        if body.startswith(b"{"):
            paths = json.loads(body)["paths"]
        else:
            fields = [part.split("=", 1) for part in body.decode().split("&")]
            paths = [unquote(value) for key, value in fields if key == "paths"]
        found = []
        for path in paths if isinstance(paths, list) else [paths]:
            if path in repo.files:
                found.append(_entry(repo, path))
            elif any(other.startswith(f"{path}/") for other in repo.files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40})
        self._json(found)

    def _resolve(self, name: str, repo: Repo, path: str, *, body: bytes) -> None:
        if path not in repo.files:
            return self._refuse(404, "EntryNotFound")
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo.gated and path != "README.md" and not signed_in:
            return self._refuse(401, "GatedRepo")
        data, status = repo.files[path], 200
        headers = {"ETag": f'"{hash(data) & 0xFFFFFFFF:x}"', "X-Repo-Commit": COMMIT,
                   "Accept-Ranges": "bytes"}  # fmt: skip
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        fault = ""
        if self.command == "GET" and path != "README.md" and self.server_hub.faults:
            fault = self.server_hub.faults.pop(0)
        if fault.isdigit():
            return self._refuse(int(fault), "")
        self.server_hub.dead = fault == "die"
        if fault in ("close", "die"):
            self.close_connection = True
            return None
        half = fault in ("cut", "stall")
        self._send(status, data[: len(data) // 2] if half else data, headers, len(data))
        if fault == "stall":
            self.wfile.flush()
            self.server_hub.ended.wait(5)
        return None

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        if length is not None and length != len(data):
            self.close_connection = True


def _entry(repo: Repo, path: str) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(repo.files[path]), "oid": "1" * 40}
