"""An imitation of the Hugging Face Hub, as far as `huggingface_hub.HfFileSystem` asks it: one repository on loopback.

Small files travel inside a commit, large ones and ``*.pt`` ahead of it by the LFS protocol, as the Hub has it. What the Hub itself would
rather have, uploads by Xet, is not here: set ``HF_HUB_DISABLE_XET``.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Hub"]

_PAGE = 20  # entries of a listing at a time; the Hub has 1000
_LFS_FROM = 10_000_000  # bytes


class Hub:
    """The server, to be used as a context.

    Attributes:
        repository: Its one repository; whoever asks for another one, or does not show the token, is told that there is none.
        token: Of whoever may see it.
        files: What is committed, by path.
        commits: What each commit did, as it was sent.
        uploads: Bytes that came ahead of a commit, by SHA-256.
        cut: Connections of uploads are closed after half of the bytes.
    """

    def __init__(self, repository: str = "user/run", token: str = "hf_test") -> None:
        self.repository, self.token = repository, token
        self.files: dict[str, bytes] = {}
        self.commits: list[list[dict[str, Any]]] = []
        self.uploads: dict[str, bytes] = {}
        self.cut = False
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> "Self":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, Any]] | None:
        """What is in a folder; None where there is none."""
        prefix = f"{folder}/" if folder else ""
        with self.lock:
            below = {path: data for path, data in self.files.items() if path.startswith(prefix)}
        if folder and not below:
            return None
        entries = {path: _about(path, data) for path, data in below.items()}
        for path in below:
            parts = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        names = sorted(name for name in entries if recursive or "/" not in name[len(prefix) :])
        return [entries[name] for name in names]

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Make all of it visible at once."""
        with self.lock:
            files = dict(self.files)
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.uploads[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]  # KeyError where it is not there
            self.files = files
            self.commits.append(lines)


def is_large(path: str, size: int) -> bool:
    """Whether it is kept beside git, by what a new repository says in its ``.gitattributes``."""
    return size > _LFS_FROM or path.endswith(".pt")


def _about(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    about: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if is_large(path, len(data)):
        about["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True
    hub: Hub

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def route(self) -> None:
        """Find out what is asked for."""
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        repository = re.escape(self.hub.repository)
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("PUT", r"/upload/(\w+)", self.upload),
            ("GET", rf"/api/models/{repository}(?:/revision/main)?", self.info),
            ("GET", rf"/api/models/{repository}/tree/main(?:/(.+))?", self.tree),
            ("POST", rf"/api/models/{repository}/paths-info/main", self.paths_info),
            ("POST", rf"/api/models/{repository}/preupload/main", self.preupload),
            ("POST", rf"/{repository}\.git/info/lfs/objects/batch", self.batch),
            ("POST", rf"/api/models/{repository}/commit/main", self.commit),
            ("GET", rf"/{repository}/resolve/main/(.+)", self.resolve),
        ]
        self.query = query
        if self.command != "PUT" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.refuse(401, "RepoNotFound", "Invalid username or password.")  # the Hub does not say that there is one
            return
        for method, pattern, answer in routes:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                answer(*found.groups())
                return
        self.refuse(404, "RepoNotFound", "Repository not found")

    do_GET = do_POST = do_PUT = route  # noqa: N815

    def info(self) -> None:
        self.reply({"id": self.hub.repository, "sha": "0" * 40, "private": True, "tags": [], "siblings": []})

    def tree(self, folder: str | None) -> None:
        entries = self.hub.tree(folder or "", recursive=self.query.get("recursive") == ["true"])
        if entries is None:
            self.refuse(404, "EntryNotFound", f"{folder} does not exist on 'main'")
            return
        start = int(self.query.get("cursor", ["0"])[0])
        address = f"{self.hub.endpoint}{urlsplit(self.path).path}"
        recursive = self.query.get("recursive", ["false"])[0]
        more = f'<{address}?recursive={recursive}&cursor={start + _PAGE}>; rel="next"'
        self.reply(entries[start : start + _PAGE], {"Link": more} if start + _PAGE < len(entries) else {})

    def paths_info(self) -> None:
        files = self.hub.files
        wanted = parse_qs(self.body().decode())["paths"]
        self.reply([_about(path, files[path]) for path in wanted if path in files])

    def preupload(self) -> None:
        answers = []
        for file in json.loads(self.body())["files"]:
            old = self.hub.files.get(file["path"])
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            oid = None
            if old is not None:
                about = _about(file["path"], old)
                oid = about["lfs"]["oid"] if mode == "lfs" and "lfs" in about else about["oid"]
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answers})

    def batch(self) -> None:
        answers = []
        for wanted in json.loads(self.body())["objects"]:
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.uploads:
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/upload/{wanted['oid']}"}}
            answers.append(answer)
        self.reply({"transfer": "basic", "objects": answers})

    def upload(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            self.refuse(400, "BadDigest", "these are other bytes")
            return
        self.hub.uploads[oid] = data
        self.reply({})

    def commit(self) -> None:
        try:
            self.hub.commit([json.loads(line) for line in self.body().splitlines()])
        except KeyError as error:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": f"{error} does not exist"})
            return
        self.reply({"commitUrl": f"{self.hub.endpoint}/{self.hub.repository}/commit/{0:040}", "commitOid": "0" * 40})

    def resolve(self, path: str) -> None:
        data = self.hub.files.get(path)
        if data is None:
            self.refuse(404, "EntryNotFound", f"{path} does not exist on 'main'")
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.send(200, data)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if start > end:
            self.send(416, b"")
            return
        self.send(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        size = int(self.headers.get("Content-Length", 0))
        if self.hub.cut and self.command == "PUT":
            self.rfile.read(size // 2)
            raise ConnectionResetError
        return self.rfile.read(size)

    def reply(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, status: int, code: str, message: str) -> None:
        self.body()
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silence."""
