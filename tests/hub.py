"""A repository as Hugging Face serves it, on loopback, with faults on request."""

import contextlib
import hashlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOGIN_PAGE = b"<html>Welcome to our wireless network. Please sign in.</html>"


class Hub:
    """`files`: path on the hub ("owner/model/model.nemo") → content. What it was asked is in `asked`.

    A file in LFS is a redirect to a content network of another origin, here "localhost" beside "127.0.0.1", and only
    the redirect tells commit, size and SHA-256. `heads` and `gets` hold what becomes of the next requests for either:
    a status; (status, headers); ("drop" | "reset" | "stall" | "flip", bytes sent before); "login"; "no range"; a
    number of bytes a second as ("slow", rate).
    """

    def __init__(self, files: dict[str, bytes]):
        self.files, self.revisions, self.size = files, {"main", COMMIT}, None
        self.heads, self.gets = deque(), deque()
        self.asked: list[tuple[str, str, dict]] = []  # method, path, headers
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def ranges(self) -> list[str | None]:
        """The Range of each request to the content network."""
        return [headers.get("Range") for method, path, headers in self.asked if path.startswith("/content/")]

    def _handler(hub) -> type:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def log_message(self, *args):
                pass

            def answer(self):
                hub.asked.append((self.command, self.path, dict(self.headers)))
                if self.path.startswith("/content/"):
                    self.content(hub.gets.popleft() if hub.gets else None)
                elif "/resolve/" in self.path:
                    self.resolve(hub.heads.popleft() if hub.heads and self.command == "HEAD" else None)
                else:
                    self.reply(404)

            def reply(self, status, headers=(), body=b""):
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **dict(headers)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def resolve(self, fault):
                repository, _, rest = self.path[1:].partition("/resolve/")
                revision, _, file = rest.partition("/")
                content = hub.files.get(f"{repository}/{file}")
                if fault == "login":
                    self.reply(200, {"Content-Type": "text/html"}, LOGIN_PAGE)
                elif fault is not None:
                    self.reply(*(fault if isinstance(fault, tuple) else (fault,)))
                elif not any(path.startswith(f"{repository}/") for path in hub.files):
                    self.reply(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
                elif revision not in hub.revisions:
                    self.reply(404, {"X-Error-Code": "RevisionNotFound"})
                elif content is None:
                    self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                else:
                    digest = hashlib.sha256(content).hexdigest()
                    self.reply(
                        302,
                        {
                            "X-Repo-Commit": COMMIT,
                            "X-Linked-Etag": f'"{digest}"',
                            "X-Linked-Size": hub.size or len(content),
                            "Location": f"http://localhost:{hub.port}/content/{digest}",
                        },
                    )

            def content(self, fault):
                digest = self.path.rpartition("/")[2]
                whole = next(c for c in hub.files.values() if hashlib.sha256(c).hexdigest() == digest)
                start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
                kind, amount = fault if isinstance(fault, tuple) else (fault, None)
                if kind == "login":
                    self.reply(200, {"Content-Type": "text/html"}, LOGIN_PAGE)
                    return
                if isinstance(kind, int):
                    self.reply(kind, amount or ())
                    return
                partial = "Range" in self.headers and kind != "no range"
                body = whole[start if partial else 0 :]
                self.send_response(206 if partial else 200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{digest}"')
                if partial:
                    self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
                self.end_headers()
                if kind == "slow":
                    for first in range(0, len(body), amount // 10):
                        self.wfile.write(body[first : first + amount // 10])
                        time.sleep(0.1)
                elif kind in ("drop", "reset", "stall"):
                    self.wfile.write(body[:amount])
                    self.wfile.flush()
                    time.sleep(20 if kind == "stall" else 0.2)
                    if kind == "reset":  # RST in place of FIN
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self.connection.close()
                    self.close_connection = True
                elif kind == "flip":
                    self.wfile.write(body[:amount] + bytes([body[amount] ^ 1]) + body[amount + 1 :])
                else:
                    self.wfile.write(body)

            def finish(self):
                with contextlib.suppress(OSError, ValueError):  # of a connection that was reset
                    super().finish()

        return Handler


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
