"""A kernels hub on this machine: what the `kernels` library asks of the real one, served from a folder."""

import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMITS = {version: f"{version + 1:040x}" for version in range(4)}  # of each version, the same for every repository
BRANCHES = {f"v{version}": commit for version, commit in COMMITS.items()}


class LocalHub:
    """Serves each repository below `folder` (publisher/name/build/...), with the same files for its versions 0 to 3.

    trusted: publishers that the hub vouches for
    broken: files whose download breaks off in the middle
    asked: every request
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trusted: set[str] = set()
        self.broken: set[str] = set()
        self.asked: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request):
        path = unquote(urlparse(request.path).path).strip("/")
        self.asked.append(f"{request.command} {path}")
        parts = path.split("/")
        if parts[:2] == ["api", "organizations"]:
            return self._json(
                request, {"name": parts[2], "fullname": parts[2], "trustedKernelPublisher": parts[2] in self.trusted}
            )
        if parts[:2] == ["api", "kernels"]:
            return self._about(request, "/".join(parts[2:4]), parts[4:])
        if "resolve" in parts:
            at = parts.index("resolve")
            return self._file(request, "/".join(parts[at - 2 : at]), parts[at + 1], "/".join(parts[at + 2 :]))
        return request.send_error(404)

    def _about(self, request, name, rest):
        if not (self.folder / name).is_dir():
            return request.send_error(404)
        files = sorted(path for path in (self.folder / name).rglob("*") if path.is_file())
        if rest[:1] == ["refs"]:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in BRANCHES.items()
            ]
            return self._json(request, {"branches": branches, "converts": [], "tags": []})
        if rest[:1] == ["tree"]:
            below = self.folder / name / "/".join(rest[2:])
            found = below.rglob("*") if "recursive=true" in request.path.lower() else below.iterdir()
            entries = [self._entry(path, self.folder / name) for path in sorted(found)]
            return self._json(request, entries)
        siblings = [{"rfilename": path.relative_to(self.folder / name).as_posix()} for path in files]
        commit = rest[1] if len(rest) > 1 else COMMITS[3]
        return self._json(
            request, {"id": name, "sha": BRANCHES.get(commit, commit), "siblings": siblings, "private": False}
        )

    def _entry(self, path, root):
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": kind, "path": path.relative_to(root).as_posix(), "size": size, "oid": "0" * 40}

    def _file(self, request, name, commit, path):
        file = self.folder / name / path
        if not file.is_file():
            return request.send_error(404)
        content = file.read_bytes()
        request.send_response(200)
        request.send_header("X-Repo-Commit", BRANCHES.get(commit, commit))
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content[: len(content) // 2] if file.name in self.broken else content)
            if file.name in self.broken:
                request.wfile.flush()
                request.connection.close()
        return None

    def _json(self, request, value):
        content = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
