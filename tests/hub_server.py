"""A small Hugging Face hub on the loopback interface: listing, resolve with redirects to a second host, ranges, faults.

Like the hub, it serves small files itself and redirects LFS files (weights, tokenizer.json) to another origin, which
must never see the token. Faults are set per file name before a request; all requests are recorded with the bytes sent.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

_LFS = (".safetensors", ".gguf", ".bin", "tokenizer.json")


@dataclasses.dataclass
class Request:
    """What came in (``authorization`` and ``range`` are headers or None), and how many body bytes went out."""

    method: str
    path: str
    authorization: str | None
    range: str | None
    is_storage: bool
    sent: int = 0


@dataclasses.dataclass
class Refusal:
    status: int
    code: str | None = None  # X-Error-Code
    message: str | None = None  # X-Error-Message


class HubServer:
    """A running hub with one model, and more that are published; ``with HubServer(hub_id, files) as server``."""

    def __init__(self, hub_id: str, files: dict[str, bytes]) -> None:
        self.hub_id = hub_id
        self.requests: list[Request] = []
        self.publish(files)
        # Faults, each by file name unless said otherwise:
        self.cuts: dict[str, list[int]] = {}  # close the connection after so many body bytes, once per number
        self.damaged: dict[str, bytes] = {}  # serve this content under the listed hash
        self.without_ranges = False  # answer every range with the whole file
        self.refuse_listing: Refusal | None = None
        self.refuse_files: Refusal | None = None
        self.listing_body: bytes | None = None  # instead of the listing, status 200
        self.delay_s = 0.0  # between pieces of 64 KB

    def publish(self, files: dict[str, bytes], branch: str = "main", hub_id: str | None = None) -> str:
        """Make ``files`` what ``branch`` of a model means, under a commit id made from their content."""
        everything = json.dumps({name: hashlib.sha256(body).hexdigest() for name, body in sorted(files.items())})
        commit = hashlib.sha1(everything.encode()).hexdigest()
        if not hasattr(self, "commits"):
            self.commits: dict[str, dict[str, bytes]] = {}
            self.branches: dict[tuple[str, str], str] = {}
        self.commits[commit], self.branches[hub_id or self.hub_id, branch] = files, commit
        return commit

    def __enter__(self) -> "HubServer":
        self._servers = [_Listener(self, is_storage=False), _Listener(self, is_storage=True)]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def files_asked(self) -> set[str]:
        """Names of files of which content was asked for (HEAD not counted)."""
        return {
            request.path.rsplit("/", 1)[1]
            for request in self.requests
            if request.method == "GET" and "/resolve/" in request.path
        }

    @property
    def bytes_sent(self) -> int:
        """Content sent, listings not counted."""
        return sum(request.sent for request in self.requests if not request.path.startswith("/api/"))


def digest_of(name: str, body: bytes) -> str:
    """The ETag of a file: sha256 for LFS, else git's blob id."""
    return hashlib.sha256(body).hexdigest() if name.endswith(_LFS) else git_id(body)


def git_id(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextlib.contextmanager
def only_hub(running: HubServer, cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """A huggingface_hub that knows no other hub, cache or token."""
    import huggingface_hub
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in {
            "ENDPOINT": running.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            patch.setattr(constants, name, value)
        huggingface_hub.close_session()  # the client keeps the proxies of its first moment
        yield patch
        huggingface_hub.close_session()


def _listing(hub: HubServer, hub_id: str, kind: str, commit: str) -> object:
    """The answer of ``tree/`` (what huggingface_hub's snapshot_download asks) or ``revision/`` with ``blobs=true``."""
    entries = [(name, body, digest_of(name, body)) for name, body in hub.commits[commit].items()]
    if kind == "tree":
        return [
            {"type": "file", "path": name, "size": len(body), "oid": git_id(body)}
            | ({"lfs": {"oid": digest, "size": len(body), "pointerSize": 134}} if len(digest) == 64 else {})
            for name, body, digest in entries
        ]
    siblings = [
        {"rfilename": name, "size": len(body), "blobId": git_id(body)}
        | ({"lfs": {"sha256": digest, "size": len(body), "pointerSize": 134}} if len(digest) == 64 else {})
        for name, body, digest in entries
    ]
    return {"id": hub_id, "modelId": hub_id, "sha": commit, "siblings": siblings}


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, *, is_storage: bool) -> None:
        self.hub, self.is_storage = hub, is_storage
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed or hung up is part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the acknowledgement of its headers
    server: _Listener

    def log_message(self, format: str, *args: object) -> None:
        """The record is `HubServer.requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.record = Request(
            self.command,
            path,
            self.headers.get("Authorization"),
            self.headers.get("Range"),
            self.server.is_storage,
        )
        hub.requests.append(self.record)
        if self.server.is_storage:
            self._send_file(path.rsplit("/", 1)[1], *path.split("/")[1:2])
            return
        for hub_id in {hub_id for hub_id, _ in hub.branches}:
            model = f"/api/models/{hub_id}/"
            if path.startswith((f"{model}revision/", f"{model}tree/")):
                self._send_listing(hub_id, path.removeprefix(model))
                return
            if path.startswith(f"/{hub_id}/resolve/"):
                revision, name = path.removeprefix(f"/{hub_id}/resolve/").split("/", 1)
                self._resolve(hub.branches.get((hub_id, revision), revision), name)
                return
        self._refuse(Refusal(404, "RepoNotFound", "Repository not found"))

    def _send_listing(self, hub_id: str, path: str) -> None:
        hub, (kind, revision) = self.server.hub, path.split("/")[:2]
        commit = hub.branches.get((hub_id, revision), revision)
        if hub.refuse_listing:
            self._refuse(hub.refuse_listing)
        elif hub.listing_body is not None:
            self._send(200, hub.listing_body, {"Content-Type": "text/html"})
        elif commit not in hub.commits:
            self._refuse(Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}"))
        else:
            listing = json.dumps(_listing(hub, hub_id, kind, commit)).encode()
            self._send(200, listing, {"Content-Type": "application/json"})

    def _resolve(self, commit: str, name: str) -> None:
        hub = self.server.hub
        headers = {"X-Repo-Commit": commit}
        if hub.refuse_files:
            self._refuse(hub.refuse_files)
        elif name not in hub.commits.get(commit, {}):
            self._refuse(Refusal(404, "EntryNotFound", "Entry not found"), headers)
        else:
            body = hub.commits[commit][name]
            digest = digest_of(name, body)
            if len(digest) == 64:
                headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))}
                self._send(302, b"", headers | {"Location": f"{hub.storage}/{commit}/{urllib.parse.quote(name)}"})
            else:
                self._send_file(name, commit, headers | {"ETag": f'"{digest}"'})

    def _send_file(self, name: str, commit: str, headers: dict[str, str] | None = None) -> None:
        hub = self.server.hub
        body = hub.damaged.get(name, hub.commits[commit][name])
        status, start, headers = 200, 0, {"Accept-Ranges": "bytes"} | (headers or {})
        if self.record.range and not hub.without_ranges:
            start = int(self.record.range.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self._send(416, b"", {"Content-Range": f"bytes */{len(body)}"})
                return
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
        cuts = hub.cuts.get(name) if self.command == "GET" else None
        self._send(status, body[start:], headers, cut=cuts.pop(0) if cuts else None)

    def _refuse(self, refusal: Refusal, headers: dict[str, str] | None = None) -> None:
        pairs = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
        headers = (headers or {}) | {name: value for name, value in pairs.items() if value is not None}
        self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(body if cut is None else body[:cut]), 1 << 16):
            piece = body[start : min(start + (1 << 16), len(body) if cut is None else cut)]
            self.wfile.write(piece)
            self.record.sent += len(piece)
            if self.server.hub.delay_s:
                time.sleep(self.server.hub.delay_s)
        if cut is not None:
            self.close_connection = True
