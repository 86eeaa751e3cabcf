"""A hub on this machine, for subprocesses: as much of the hub's API as its clients need to fetch from a directory.

`python hub_server.py ROOT` serves the files of ROOT/models/ORG/NAME/REVISION/ and ROOT/datasets/ORG/NAME/REVISION/,
prints its port, and `METHOD PATH RANGE` of every request on standard error.
"""

import hashlib
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(sys.argv[1])


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def folder_of(kind: str, name: str, revision: str) -> Path | None:
    """The directory of a revision, given by its name or by its commit."""
    revisions = (ROOT / kind / name).glob("*")
    return next((path for path in revisions if revision in (path.name, digest(path.name.encode()))), None)


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        line = f"{self.command} {self.path} {self.headers.get('Range', '-')}\n"
        os.write(sys.stderr.fileno(), line.encode())  # at once: each request has a thread, and print writes in pieces

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == [""]:
            self.answer(b"")
        elif parts[0] == "api":
            self.about(*parts[1:])
        else:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            self.file(folder_of(kind, "/".join(parts[:2]), parts[3]), "/".join(parts[4:]))

    def about(self, kind: str, org: str = "", name: str = "", what: str = "", revision: str = "main", *_: str) -> None:
        """What is known of a revision, or the list of its files."""
        folder = folder_of(kind, f"{org}/{name}", revision)
        if folder is None:
            self.absent("RevisionNotFound" if (ROOT / kind / org / name).is_dir() else "RepoNotFound")
            return
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        oid = digest(folder.name.encode())
        value: object = [{"type": "file", "path": file, "size": size, "oid": oid} for file, size in files.items()]
        if what != "tree":
            siblings = [{"rfilename": file} for file in files]
            value = {"id": f"{org}/{name}", "sha": oid, "siblings": siblings, "private": False, "tags": []}
        self.answer(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def file(self, folder: Path | None, name: str) -> None:
        if folder is None or not (folder / name).is_file():
            self.absent("EntryNotFound")
            return
        content = (folder / name).read_bytes()
        about = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": digest(folder.name.encode())}
        asked = self.headers.get("Range")
        if asked is None:
            self.answer(content, about)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        end = min(int(last or len(content)), len(content) - 1)
        about["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
        self.answer(content[int(first) : end + 1], about, status=206)

    def absent(self, reason: str) -> None:
        self.answer(b"", {"X-Error-Code": reason}, status=404)

    def answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_address[1], flush=True)
    server.serve_forever()
