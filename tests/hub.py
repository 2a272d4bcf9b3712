"""A repository as Hugging Face serves it, on loopback, with faults on request."""

import contextlib
import functools
import hashlib
import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOGIN_PAGE = b"<html>Welcome to our wireless network. Please sign in.</html>"


class Hub:
    """`files`: path on the hub ("owner/model/model.nemo") → content. The requests that it got are in `asked`.

    The paths of data sets begin with "datasets/". A JSON file is sent as it is. Any other file is in LFS: a redirect to
    a content network of another origin, here "localhost" beside "127.0.0.1", and only the redirect gives commit, size
    and SHA-256. `heads` and `gets` hold the faults for the next HEAD and GET requests: a status; (status, headers);
    ("drop" | "reset" | "stall" | "flip", bytes sent before); "login"; "no range"; a number of bytes a second as
    ("slow", rate).
    """

    def __init__(self, files: dict[str, bytes]):
        self.files, self.revisions, self.size = files, {"main", COMMIT}, None
        self.heads, self.gets = deque(), deque()
        self.asked: list[tuple[str, str, dict]] = []  # method, path, headers
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def fetched(self) -> set[str]:
        """The names of the files whose content was sent, not only asked about."""
        files = reversed(self.files.items())  # of two files of one content the first one is named
        named = {f"/content/{hashlib.sha256(content).hexdigest()}": path for path, content in files}
        paths = (named.get(path, path) for method, path, _ in self.asked if method == "GET")
        return {path.rpartition("/")[2] for path in paths if path in named.values() or "/resolve/" in path}

    def resolved(self) -> list[str]:
        """The paths of the requests about files of repositories."""
        return [path for _, path, _ in self.asked if "/resolve/" in path]

    def ranges(self) -> list[str | None]:
        """The Range of each request to the content network."""
        return [headers.get("Range") for method, path, headers in self.asked if path.startswith("/content/")]


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection to `hub`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args):
        self.hub = hub
        super().__init__(*args)

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *args):
        pass

    def finish(self):
        with contextlib.suppress(OSError, ValueError):  # of a connection that was reset
            super().finish()

    def _answer(self):
        hub = self.hub
        hub.asked.append((self.command, self.path, dict(self.headers)))
        if self.path.startswith("/content/"):
            self._content(hub.gets.popleft() if hub.gets else None)
        elif self.path.startswith(("/api/models/", "/api/datasets/")):
            self._describe()
        elif "/resolve/" in self.path:
            self._resolve(hub.heads.popleft() if hub.heads and self.command == "HEAD" else None)
        else:
            self._reply(404)

    def _reply(self, status, headers=(), body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _describe(self):
        """The files of a repository at a revision, as HfApi.repo_info and HfApi.list_repo_tree ask for them."""
        kind, owner, model, what, revision = self.path.partition("?")[0].removeprefix("/api/").split("/")
        repository = f"{owner}/{model}" if kind == "models" else f"{kind}/{owner}/{model}"
        files = {path: content for path, content in self.hub.files.items() if path.startswith(f"{repository}/")}
        if not files:
            self._reply(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in self.hub.revisions:
            self._reply(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            listed = []
            for path, content in files.items():
                size, name = self.hub.size or len(content), path.removeprefix(f"{repository}/")
                digest = hashlib.sha256(content).hexdigest()
                lfs = {"size": size, "sha256": digest, "oid": digest, "pointerSize": 1}
                listed.append({"type": "file", "rfilename": name, "path": name, "size": size, "oid": "", "lfs": lfs})
            info = {"id": f"{owner}/{model}", "sha": COMMIT, "siblings": listed}
            answer = listed if what == "tree" else info
            self._reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _resolve(self, fault):
        """Redirect to the content of a file, or say what is missing."""
        hub = self.hub
        repository, _, rest = self.path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        content = hub.files.get(f"{repository}/{file}")
        if fault == "login":
            self._reply(200, {"Content-Type": "text/html"}, LOGIN_PAGE)
        elif fault is not None:
            self._reply(*(fault if isinstance(fault, tuple) else (fault,)))
        elif not any(path.startswith(f"{repository}/") for path in hub.files):
            self._reply(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in hub.revisions:
            self._reply(404, {"X-Error-Code": "RevisionNotFound"})
        elif content is None:
            self._reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif file.endswith((".json", ".md")):
            self._plain_file(content)
        else:
            digest = hashlib.sha256(content).hexdigest()
            self._reply(
                302,
                {
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": hub.size or len(content),
                    "Location": f"http://localhost:{hub.port}/content/{digest}",
                },
            )

    def _plain_file(self, content):
        """A small file, which is in git itself: from the same origin, named by git's SHA-1."""
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        blob = hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{blob}"', "Content-Length": len(content) - start}
        if self.command == "GET" and "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._reply(206 if "Content-Range" in headers else 200, headers, content[start:])

    def _content(self, fault):
        """Send a file, or the rest of it that the Range asks for, with a fault."""
        kind, amount = fault if isinstance(fault, tuple) else (fault, None)
        if kind == "login":
            self._reply(200, {"Content-Type": "text/html"}, LOGIN_PAGE)
            return
        if isinstance(kind, int):
            self._reply(kind, amount or ())
            return
        digest = self.path.rpartition("/")[2]
        whole = next(c for c in self.hub.files.values() if hashlib.sha256(c).hexdigest() == digest)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        partial = "Range" in self.headers and kind != "no range"
        body = whole[start if partial else 0 :]
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{digest}"')
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        self._send(body, kind, amount)

    def _send(self, body, kind, amount):
        if kind == "slow":
            for first in range(0, len(body), amount // 10):
                self.wfile.write(body[first : first + amount // 10])
                time.sleep(0.1)
        elif kind == "flip":
            self.wfile.write(body[:amount] + bytes([body[amount] ^ 1]) + body[amount + 1 :])
        elif kind in ("drop", "reset", "stall"):
            self._break_off(body, kind, amount)
        else:
            self.wfile.write(body)

    def _break_off(self, body, kind, amount):
        self.wfile.write(body[:amount])
        self.wfile.flush()
        time.sleep(20 if kind == "stall" else 0.2)
        if kind == "reset":  # RST in place of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True


def point_client_at(url: str, monkeypatch) -> None:
    """Let huggingface_hub, which reads the environment when it is imported, ask this address."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
