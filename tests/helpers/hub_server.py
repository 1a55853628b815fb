"""Server of the Hub's protocol on the loopback interface, with as much of it as tests need."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_of_the_owner"


@dataclass
class Repository:
    """Repository: tables of files by the hash of their commit, and branches."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Adds a commit to a branch, and returns its hash."""
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for name in sorted(files):
            digest.update(name.encode() + files[name])
        self.commits[digest.hexdigest()] = files
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        """Returns the hash of a branch's last commit, or of a commit."""
        revision = unquote(revision)
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    """Server of `repositories`. The client's `HF_ENDPOINT` must be `url`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.fail_commits = 0  # number of commits that are refused before one succeeds
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def shutdown(self) -> None:
        """Stops serving, and frees the port."""
        super().shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Handler of one request."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Keeps the log empty."""

    def reply(self, status: int, body: dict | list | bytes = b"", **headers: str) -> None:
        """Sends an answer. A HEAD request gets only its headers."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        """Sends an error in the form that the client expects."""
        self.reply(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str) -> Repository | None:
        """Returns a repository that the client may see. Sends an error for any other."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.authorized):
            self.refuse(401 if repository else 404, "RepoNotFound")
            return None
        return repository

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            name, revision = match.groups()
            if repository := self.repository(name):
                files = repository.commits[repository.resolve(revision)]
                self.reply(200, [self.entry(path, data) for path, data in sorted(files.items())])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check/write", path):
            if self.repository(match[1]):
                self.reply(200, {}) if self.authorized else self.refuse(403, "Forbidden")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            name, revision = match.groups()
            if repository := self.repository(name):
                commit = repository.resolve(revision or "main")
                if commit is None:
                    return self.refuse(404, "RevisionNotFound")
                siblings = [{"rfilename": file} for file in sorted(repository.commits[commit])]
                self.reply(200, {"id": name, "sha": commit, "siblings": siblings, "private": repository.private})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = match.groups()
            if repository := self.repository(name):
                commit = repository.resolve(revision)
                if commit is None:
                    return self.refuse(404, "RevisionNotFound")
                data = repository.commits[commit].get(file)
                if data is None:
                    return self.refuse(404, "EntryNotFound")
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                self.reply(200, data, ETag=etag, X_Repo_Commit=commit)
        else:
            self.refuse(404, "NotFound")

    @staticmethod
    def entry(path: str, data: bytes) -> dict:
        """Returns the entry of a file in a listing."""
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.authorized:
            return self.refuse(401, "InvalidToken")
        if path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            if name in self.server.repositories:
                return self.reply(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
            private = bool(request.get("private") or request.get("visibility") == "private")
            self.server.repositories[name] = Repository(private)
            self.server.repositories[name].commit("main", {".gitattributes": b""})
            self.reply(200, {"url": f"{self.server.url}/{name}", "id": name})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path):
            name, action, revision = match.groups()
            if repository := self.repository(name):
                getattr(self, action)(repository, revision, body)
        else:
            self.refuse(404, "NotFound")

    def branch(self, repository: Repository, revision: str, body: bytes) -> None:
        """Creates a branch at the last commit of main."""
        if revision in repository.branches:
            return self.reply(409, {"error": "exists"})
        repository.branches[revision] = repository.branches["main"]
        self.reply(200, {})

    def preupload(self, repository: Repository, revision: str, body: bytes) -> None:
        """Asks the client to send all files inside the commit."""
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.reply(200, {"files": files})

    def commit(self, repository: Repository, revision: str, body: bytes) -> None:
        """Adds a commit to a branch."""
        if self.server.fail_commits:
            self.server.fail_commits -= 1
            return self.refuse(500, "Internal")
        files = dict(repository.commits[repository.resolve(revision)])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        commit = repository.commit(revision, files)
        name = next(name for name, known in self.server.repositories.items() if known is repository)
        self.reply(
            200, {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"}
        )
