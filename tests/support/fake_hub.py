"""A hub of one's own: the few endpoints that huggingface_hub needs to upload and download files."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory, each one branch: ``files`` [repo][path] -> bytes at its head,
    ``past`` [commit] -> the same of any commit; ``log`` of calls."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.past: dict[str, dict[str, bytes]] = {}
        self.log: list[str] = []
        hub = self

        class Handler(_Handler):
            store = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def sha(self, repo: str) -> str:
        """Of the repository's content: every commit that changes something has another."""
        digest = hashlib.sha1(repo.encode())
        for name, data in sorted(self.files[repo].items()):
            digest.update(name.encode() + b"\0" + data)
        return digest.hexdigest()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value, status: int = 200, **headers: str):
        self.answer(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def missing(self, what: str = "RepoNotFound"):
        self.json({"error": what}, 404, X_Error_Code=what)

    def handle_one(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.store.log.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if path == "api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            known = repo in self.store.files
            self.store.files.setdefault(repo, {})
            url = {"url": f"{self.store.address}/{repo}", "name": repo, "id": repo}
            return self.json(url, 409 if known else 200)
        parts = path.split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo not in self.store.files:
            return self.missing()
        if parts[0] == "api":
            return self.api(repo, parts[4:], body)
        return self.resolve(repo, parts[2:])

    do_GET = do_POST = do_HEAD = handle_one

    def api(self, repo: str, rest: list[str], body: bytes):
        files, sha = self.store.files[repo], self.store.sha(repo)
        if rest[:1] == ["preupload"]:
            names = [item["path"] for item in json.loads(body)["files"]]
            fixed = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.json({"files": [{"path": name, **fixed} for name in names]})
        if rest[:1] == ["commit"]:
            for line in body.decode().splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "deletedFile":
                    del files[value["path"]]
            sha = self.store.sha(repo)
            self.store.past[sha] = dict(files)
            url = f"{self.store.address}/{repo}/commit/{sha}"
            return self.json({"commitUrl": url, "commitOid": sha, "success": True})
        if rest[:1] == ["tree"]:
            files = self.store.past.get(rest[1], files)
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in files.items()
            ]
            return self.json(rows)
        revision = rest[1] if rest[:1] == ["revision"] else "main"
        if revision != "main" and revision not in self.store.past:
            return self.missing("RevisionNotFound")
        if revision != "main":
            sha, files = revision, self.store.past[revision]
        siblings = [{"rfilename": name} for name in sorted(files)]
        return self.json({"id": repo, "sha": sha, "siblings": siblings, "private": False})

    def resolve(self, repo: str, rest: list[str]):
        name, known = "/".join(rest[2:]), rest[1] in self.store.past
        files = self.store.past[rest[1]] if known else self.store.files[repo]
        if name not in files:
            return self.missing("EntryNotFound")
        data = files[name]
        commit = rest[1] if known else self.store.sha(repo)
        headers = {"ETag": f'"{_oid(data)}"', "X_Repo_Commit": commit}
        self.answer(data, **headers)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
