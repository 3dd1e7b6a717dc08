"""A W&B server on loopback: what the API answers to a run, its resumes, and its faults.

It keeps the rows as W&B's does: each request names the row that its first one is, and what is there
already is not written twice. What a client must not do is noted in `complaints`.
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "5ec2e7" + "0f" * 17  # 40 characters, as the real ones


class Run:
    """What the server knows of one run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[dict[str, Any]] = []
        self.upserts: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.inits = 0

    def bucket(self) -> dict[str, Any]:
        """Return what a client that goes on with the run is told."""
        return {
            "id": self.name,
            "name": self.name,
            "displayName": self.upserts[0].get("displayName"),
            "description": None,
            "summaryMetrics": json.dumps(self.summary),
            "logLineCount": 0,
            "historyLineCount": len(self.rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in self.rows[-1:]]),
            "eventsTail": "[]",
            "config": json.dumps({key: {"value": value} for key, value in self.config.items()}),
            "tags": self.upserts[0].get("tags"),
            "notes": self.upserts[0].get("notes"),
            "wandbConfig": json.dumps({"t": {"value": 1}}),
            "sweepName": None,
            "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "somebody"}},
        }


class Server(ThreadingHTTPServer):
    """The server.

    Attributes:
        fault: takes a handler before it answers, and returns whether it has dealt with the request.
    """

    daemon_threads = True
    # A client that is killed leaves its connection as it was.
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, Run] = {}
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.keys: set[str] = set()
        self.fault: Callable[[Handler], bool] = lambda handler: False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """Return what makes W&B take this for its server."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_MODE": "online",
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",  # seconds; else 15
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        self.content = content
        self.server.requests.append(self.path)
        if self.server.fault(self):
            return
        with self.server.lock:
            if self.path == "/graphql":
                answer = self._graphql(json.loads(content))
            elif self.path.endswith("/file_stream"):
                answer = self._file_stream(json.loads(content))
            else:
                answer = {}
        self.answer(200, json.dumps(answer).encode())

    def answer(self, code: int, content: bytes, *, length: int | None = None) -> None:
        """Send an answer, which may claim to be longer than it is."""
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def reset(self) -> None:
        """Break the connection off."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _graphql(self, query: dict[str, Any]) -> dict[str, Any]:
        variables = query.get("variables") or {}
        runs = self.server.runs
        name = query.get("operationName")
        if name == "Viewer":
            viewer = {"id": "e", "entity": "somebody", "username": "somebody", "email": "a@b.c",
                      "flags": "{}", "teams": {"edges": []}}  # fmt: skip
            return {"data": {"viewer": viewer}}
        if name == "RunResumeStatus" or "RowsThere" in query["query"]:
            run = runs.get(variables["name"])
            bucket = None if run is None else run.bucket()
            owner = {"id": "e", "name": "somebody"}
            model = {"id": "p", "name": variables["project"], "entity": owner, "bucket": bucket}
            return {"data": {"model": model}}
        if name == "UpsertBucket":
            is_new = variables["name"] not in runs
            run = runs.setdefault(variables["name"], Run(variables["name"]))
            run.upserts.append({key: value for key, value in variables.items() if value})
            run.inits += variables.get("displayName") is not None
            config = json.loads(variables.get("config") or "{}")
            run.config |= {key: value["value"] for key, value in config.items()}
            return {"data": {"upsertBucket": {"bucket": run.bucket(), "inserted": is_new}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.server.url}/put"}
                     for file in variables["files"]]  # fmt: skip
            return {"data": {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [],
                                                "files": files}}}  # fmt: skip
        return {"data": {}}

    def _file_stream(self, body: dict[str, Any]) -> dict[str, Any]:
        run = self.server.runs[self.path.split("/")[-2]]
        for name, chunk in (body.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                if chunk["offset"] > len(run.rows):
                    self.server.complaints.append(
                        f"{run.name}: rows {len(run.rows)} to {chunk['offset'] - 1} are missing"
                    )
                run.rows[chunk["offset"] :] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        if body.get("complete") is not None or body.get("exitcode") is not None:
            run.exit_code = body.get("exitcode")
        return {"limits": {}}


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server for as long as the block."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def after(seconds: float) -> Callable[[Handler], bool]:
    """Return the fault of a server that is slow."""

    def fault(handler: Handler) -> bool:
        time.sleep(seconds)
        return False

    return fault
