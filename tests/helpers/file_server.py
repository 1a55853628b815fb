"""Server of files on the loopback interface, which knows ranges, and which breaks in all the ways that a test asks for."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """
    Server of `files`, bytes by path.

    `cut_after` cuts each connection after so many bytes. `knows_ranges` says whether the rest of a file can be asked for, and
    `says_length` whether the length of an answer is told.
    """

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cut_after: int | None = None
        self.cuts = 0  # number of connections that are cut from now on
        self.knows_ranges = True
        self.says_length = True
        self.ranges: list[str | None] = []  # what was asked for
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def shutdown(self) -> None:
        """Stops serving, and frees the port."""
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
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.server.knows_ranges else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.says_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: self.server.cut_after]
        self.wfile.write(body)
