"""A stand-in for the Hugging Face Hub: what huggingface_hub asks of it to make a repository, commit files to it and
download them. Every file is committed inline (the real one sends large ones to another store)."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


class Hub:
    """Repositories as {name: {path: content}}."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.url = ""


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def json(self, value: Any, status: int = 200) -> None:
            self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

        def body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            body = self.body()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.json({"error": "Unauthorized"}, 401)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                if name in hub.repos:
                    return self.json({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
                hub.repos[name], hub.private[name] = {}, asked.get("visibility") == "private"
                return self.json({"url": f"{hub.url}/{name}"})
            if self.path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for f in json.loads(body)["files"]
                ]
                return self.json({"files": files})
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main.*", self.path):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.repos[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = self.commit(match[1])
                url = f"{hub.url}/{match[1]}/commit/{commit}"
                return self.json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
            return self.json({"error": self.path}, 404)

        def commit(self, name: str) -> str:
            return hashlib.sha1(repr(sorted(hub.repos[name].items())).encode()).hexdigest()

        def do_GET(self) -> None:
            missing = {"X_Error_Code": "RepoNotFound"}
            if match := re.match(r"/api/models/([^/]+/[^/?]+)(/revision/main)?(/tree/[^?]*)?", self.path):
                if match[1] not in hub.repos:
                    return self.answer(404, b"{}", **missing)
                files = hub.repos[match[1]]
                if match[3]:
                    return self.json(
                        [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
                    )
                siblings = [{"rfilename": path} for path in files]
                return self.json({"id": match[1], "sha": self.commit(match[1]), "siblings": siblings, "private": False})
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
                if match[1] not in hub.repos:
                    return self.answer(404, b"", **missing)
                if match[2] not in hub.repos[match[1]]:
                    return self.answer(404, b"", X_Error_Code="EntryNotFound")
                content = hub.repos[match[1]][match[2]]
                etag = hashlib.sha1(content).hexdigest()
                return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=self.commit(match[1]))
            return self.answer(404)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
