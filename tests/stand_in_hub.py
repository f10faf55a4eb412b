"""A local stand-in for the Hugging Face Hub: enough of its HTTP interface for uploads and downloads, all in memory.

It refuses as the Hub does: 401 for an unknown token, 403 for somebody else's namespace, 409 for a repository that exists.
Point a process at it with `environment()`; `huggingface_hub` reads these variables when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

TOKEN = "hf_" + "standin" * 4
OWNER = "tester"
LICENSES = ("mit", "apache-2.0", "other")
LFS_SUFFIXES = (".safetensors", ".parquet", ".png")


@dataclass
class Repository:
    """One repository: its files, how many commits it had, and the tags of the last."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0
    tags: tuple[str, ...] = ()

    @property
    def sha(self) -> str:
        return f"{self.commits:040d}"


class StandInHub:
    """The server; use it as a context manager.

    Attributes:
        repositories: by (type, id), as in `("model", "tester/x")`.
        requests: method, path and whether the right token came with it, in order.
        commit_status: answer commits with this status instead of accepting them.
        served: bytes of each file that were sent, by path in its repository.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bool]] = []
        self.commit_status = 200
        self.served: dict[str, int] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: str | os.PathLike[str], token: str = TOKEN) -> dict[str, str]:
        """Variables for a process that shall talk to this server; `cache` is its `HF_HOME`."""
        inherited = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN_PATH")}
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps({} if content is None else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def handle_request(self) -> None:
        path, body = urlparse(self.path).path, self.body()
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.hub.requests.append((self.command, path, known))
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, path):
                if not known and pattern in PROTECTED:
                    return self.answer(401, {"error": "Invalid username or password."})
                return action(self, body, **match.groupdict())
        return self.answer(404, {"error": "not part of the stand-in"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def whoami(self, body: bytes) -> None:
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.answer(200, {"type": "user", "name": OWNER, "orgs": [], "auth": token})

    def validate_yaml(self, body: bytes) -> None:
        license_line = re.search(r"^license: *(.*)$", json.loads(body)["content"], re.MULTILINE)
        bad = license_line is not None and license_line[1] not in LICENSES
        errors = [{"message": f'"license" must be one of {", ".join(LICENSES)}'}] if bad else []
        self.answer(400 if bad else 200, {"errors": errors, "warnings": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner, kind = asked.get("organization") or OWNER, asked.get("type") or "model"
        if owner != OWNER:
            return self.answer(403, {"error": f"You don't have the rights to create a {kind} under {owner}"})
        name = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[kind, name] = Repository(private)
        return self.answer(200, {"url": url, "name": name})

    def preupload(self, body: bytes, kind: str, name: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            known = item["oid"] in self.hub.objects
            objects.append(
                {"oid": item["oid"], "size": item["size"], **({} if known else {"actions": upload})}
            )  # none: it is there
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "the content is not that of its SHA-256"})
        self.hub.objects[oid] = body
        return self.answer(200)

    def commit(self, body: bytes, kind: str, name: str) -> None:
        if self.hub.commit_status != 200:
            return self.answer(self.hub.commit_status, {"error": "told to refuse"})
        repository = self.hub.repositories[kind, name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits += 1
        url = f"{self.hub.url}/{name}/commit/{repository.sha}"
        return self.answer(200, {"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, kind: str, name: str, revision: str | None = None) -> None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        sha = repository.sha
        if revision is not None and revision.isdigit() and int(revision) <= repository.commits:
            sha = revision  # an earlier commit; the files are those of now
        elif revision not in (None, "main", *repository.tags):
            return self.answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path} for path in repository.files]
        about = {"id": name, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings}
        return self.answer(200, about)

    def tree(self, body: bytes, kind: str, name: str, folder: str | None) -> None:
        prefix = f"{folder}/" if folder else ""
        files = self.hub.repositories[kind, name].files
        inside = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not inside:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        entries = []
        if "recursive=true" not in urlparse(self.path).query.lower():
            folders = {path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]}
            inside = {path: content for path, content in inside.items() if "/" not in path[len(prefix) :]}
            entries = [
                {"type": "directory", "path": prefix + child, "oid": "0" * 40, "size": 0} for child in sorted(folders)
            ]
        entries += [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in inside.items()
        ]
        return self.answer(200, entries)

    def resolve(self, body: bytes, kind: str | None, name: str, path: str) -> None:
        repository = self.hub.repositories.get(({"datasets": "dataset", None: "model"}[kind], name))
        if repository is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": repository.sha}
        content = repository.files.get(path)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            part, status = content, 200
        else:
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
            part, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if self.command != "HEAD":
            self.hub.served[path] = self.hub.served.get(path, 0) + len(part)
        return self.answer(status, part, headers)


NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (r"/api/repos/create", _Handler.create),
    (rf"/api/(?P<kind>model|dataset)s/{NAME}/preupload/main", _Handler.preupload),
    (rf"/api/(?P<kind>model|dataset)s/{NAME}/commit/main", _Handler.commit),
    (rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (rf"/api/(?P<kind>model|dataset)s/{NAME}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    (rf"/api/(?P<kind>model|dataset)s/{NAME}/tree/[^/]+(?:/(?P<folder>.+))?", _Handler.tree),
    (rf"/(?:(?P<kind>datasets)/)?{NAME}/resolve/[^/]+/(?P<path>.+)", _Handler.resolve),
]
PROTECTED = {pattern for pattern, action in ROUTES if action not in (_Handler.info, _Handler.tree, _Handler.resolve,
                                                                     _Handler.lfs_put)}  # fmt: skip
