"""Server of files on the loopback interface. It supports ranges, and can fail in many ways."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """
    Server of `files`, bytes by path.

    `cut_after` cuts connections after so many bytes, and `stall_after` makes them wait there. `knows_ranges` says whether the rest
    of a file can be asked for, `knows_if_range` whether only of one version, `says_length` whether the length of an answer is told,
    and `page` is the answer to all requests, if it is not `None`.
    """

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cut_after: int | None = None
        self.cuts = 0  # number of connections that are cut from now on
        self.stall_after: int | None = None
        self.page: bytes | None = None
        self.knows_ranges = True
        self.knows_if_range = True
        self.says_length = True
        self.stalled = threading.Event()  # ends the waiting
        self.ranges: list[str | None] = []  # what was asked for
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def shutdown(self) -> None:
        """Stops serving, and frees the port."""
        self.stalled.set()
        super().shutdown()
        self.server_close()

    def handle_error(self, *_) -> None:
        """Keeps the log empty where a client has left."""


class Handler(BaseHTTPRequestHandler):
    """Handler of one request."""

    server: FileServer

    def log_message(self, *_) -> None:
        """Keeps the log empty."""

    def do_GET(self) -> None:
        """Sends a file, or the part of it that was asked for."""
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        content = self.server.files.get(self.path.removeprefix("/"))
        if content is None:
            return self.send_error(404)
        content = content if self.server.page is None else self.server.page
        version = f'"{hashlib.sha256(content).hexdigest()}"'
        knows_range = self.server.knows_ranges and self.server.page is None
        if self.server.knows_if_range:
            knows_range &= self.headers.get("If-Range", version) == version
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and knows_range else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("ETag", version)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.says_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: self.server.cut_after]
        if self.server.stall_after is not None:
            self.wfile.write(body[: self.server.stall_after])
            self.wfile.flush()
            self.server.stalled.wait()
            return
        self.wfile.write(body)
