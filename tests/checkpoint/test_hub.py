"""A model from the hub: a server on this machine answers as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SHA = "a" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "README.md": b"not fetched",
    "onnx/config.json": b"a copy in another format",
}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.rpartition(f"/{SHA}/")[2]
        if not path.startswith(("/api/models/some/model", "/some/model")):
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/") and "/tree/" in path:
            files = [
                {"type": "file", "path": n, "size": len(d), "oid": self.sum(d)}
                for n, d in FILES.items()
            ]
            return self.answer(200, json.dumps(files).encode())
        if path.startswith("/api/"):
            files = [{"rfilename": n, "size": len(d)} for n, d in FILES.items()]
            info = {"id": "some/model", "sha": SHA, "siblings": files}
            return self.answer(200, json.dumps(info).encode())
        tags = {"ETag": f'"{self.sum(FILES[name])}"', "X-Repo-Commit": SHA}
        return self.answer(200, FILES[name], tags)

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    @staticmethod
    def sum(data):
        return hashlib.sha1(data).hexdigest()

    def log_message(self, *args):
        pass


FETCH = """
import sys
from mlx_dgemma.checkpoint.hub import resolve
from mlx_dgemma.errors import HubError
try:
    print(*sorted(path.name for path in resolve(sys.argv[1]).iterdir()))
except HubError as error:
    print(error)
"""


@pytest.fixture
def run(tmp_path):
    """`run(*args, **environment)`: a process of Python that finds only this hub."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    def start(*args, **environment):
        env = os.environ | home | environment
        command = [sys.executable, *args]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        home["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        yield start
        server.shutdown()


def test_what_will_be_fetched_is_said_before_and_not_again(run):
    first = run("-c", FETCH, "some/model")
    assert first.stdout.split() == ["config.json", "model.safetensors"], first.stderr
    said = first.stderr.splitlines()[0]
    assert said == "some/model is no folder here: 2 files of 0.0 GB come from the hub"
    for again in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        later = run("-c", FETCH, "some/model", **again)
        assert later.stdout == first.stdout and "come from" not in later.stderr


def test_a_mistyped_name_and_a_hub_that_is_off_are_refused(run):
    mistyped = run("-c", FETCH, "some/modle").stdout
    assert mistyped.startswith("some/modle: the hub refused (")
    gone = run("-c", FETCH, "some/model", HF_ENDPOINT="http://127.0.0.1:9").stdout
    assert gone == "some/model: not downloaded before, and the hub cannot be reached\n"
    asked = ["--model", "some/model", "--prompt", "1", "--offline"]
    off = run("-W", "ignore", "-m", "mlx_dgemma.generate", *asked)
    assert off.returncode == 1 and off.stderr.startswith(
        "error: some/model: not downloaded before, and --offline or HF_HUB_OFFLINE"
    )
