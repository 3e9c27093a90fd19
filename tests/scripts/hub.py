"""A local test double of the Hub: it accepts commits over HTTP, stores their files, and serves them."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


REPOSITORY = "/api/(?:models|datasets|spaces)/[^/]+/[^/]+"


class LocalHub:
    """
    One repository's worth of the Hub's HTTP interface, as far as `create_repo`, `upload_folder`, `list_repo_tree`,
    the download of single files, and `push_to_hub` and `load_dataset` of `datasets` use it.

    Attributes:
        url (`str`): For `HF_ENDPOINT`.
        files (`dict[str, bytes]`): What the repository holds.
        large (`dict[str, bytes]`): Large files by their SHA-256, uploaded before the commit that names them.
        created (`list[dict]`): The requests to create it. A data set does not exist before that.
        commits (`list[str]`): The messages of the commits made.
        unknown (`list[str]`): Requests it had no answer for.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.commits: list[str] = []
        self.unknown: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def revision(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


def oid(data: bytes) -> str:
    """A file's name in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            kind = {"dataset": "datasets/", "space": "spaces/"}.get(self.hub.created[-1].get("type"), "")
            self.answer({"url": f"{self.hub.url}/{kind}me/{self.hub.created[-1]['name']}"})
        elif path == "/api/validate-yaml":  # the card's header
            self.answer({"errors": [], "warnings": []})
        elif re.fullmatch(rf"{REPOSITORY}/preupload/main", path):
            modes = [
                (f["path"], "lfs" if f["path"].endswith(".parquet") else "regular") for f in json.loads(body)["files"]
            ]
            self.answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif re.fullmatch(rf"{REPOSITORY}/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.hub.commits.append(line["value"]["summary"])
                elif line["key"] == "file":
                    self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.hub.files[line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
                elif line["key"] == "deletedFile":
                    del self.hub.files[line["value"]["path"]]
            url = f"{self.hub.url}/{path.split('/')[3]}/{path.split('/')[4]}/commit/{self.hub.revision}"
            self.answer({"success": True, "commitOid": self.hub.revision, "commitUrl": url})
        else:
            self.refuse()

    def do_PUT(self):
        """A large file, named by its digest."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.large[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"(?:/datasets)?/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
        if path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "auth": {}})
        elif match and match[1] in self.hub.files:
            self.answer(self.hub.files[match[1]])
        elif match:
            self.no_entry()
        elif path.startswith("/api/datasets/") and not self.hub.created:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif tree := re.fullmatch(rf"{REPOSITORY}/tree/[^/]+(?:/(.+))?", path):
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            entries = self.entries(f"{tree[1]}/" if tree[1] else "", recursive)
            self.answer(entries) if entries or not tree[1] else self.no_entry()
        elif re.fullmatch(rf"{REPOSITORY}(/revision/[^/]+)?", path):
            names = sorted(self.hub.files)
            siblings = [{"rfilename": name} for name in names]
            self.answer({"id": "/".join(path.split("/")[3:5]), "sha": self.hub.revision, "siblings": siblings})
        else:
            self.refuse()

    do_HEAD = do_GET

    def entries(self, folder: str, recursive: bool) -> list[dict]:
        """What lies in a folder (`a/b/`, or empty), in the words of the Hub's `tree`: no folder without a file."""
        found: dict[str, dict] = {}
        for name in sorted(name for name in self.hub.files if name.startswith(folder)):
            parts = name.removeprefix(folder).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                inner = folder + "/".join(parts[:depth])
                found[inner] = {"type": "directory", "path": inner, "size": 0, "oid": oid(inner.encode())}
            if recursive or len(parts) == 1:
                data = self.hub.files[name]
                found[name] = {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
        return list(found.values())

    def no_entry(self) -> None:
        self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def refuse(self) -> None:
        self.hub.unknown.append(f"{self.command} {self.path}")
        self.answer({"error": "unknown"}, 404)

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{oid(data)}"')
        self.send_header("X-Repo-Commit", self.hub.revision)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass
