"""The hub's state in `raylign env`, told by a hub of the test's own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

TOKEN = "hf_secretsecretsecret"
ASK = "from pipeline.cli.environment import _hub; print(_hub())"


class Hub(BaseHTTPRequestHandler):
    """Answers who the owner of a token is."""

    def do_GET(self) -> None:
        right = self.headers.get("authorization") == f"Bearer {TOKEN}"
        busy = self.headers.get("authorization") == "Bearer busy"
        self.send_response(503 if busy else 200 if right else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"name": "somebody"} if right else {"error": "no"}).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's output stays readable."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(endpoint: str, home: Path, **variables: str) -> str:
    """The line about the hub, in a process of its own: huggingface_hub reads variables at its import."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        **variables,
    }
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"HF_TOKEN": TOKEN}, "answers; the token is that of somebody"),
        ({"HF_TOKEN": "hf_other"}, "answers; it refuses the token that is here"),
        ({}, "answers; no token here, so only public models and data can be read"),
        ({"HF_TOKEN": "busy"}, "answers with status 503: it may be busy, or a proxy answers for it"),
        ({"HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN}, "not asked: HF_HUB_OFFLINE is set"),
    ],
)
def test_the_hub_is_asked_whose_token_it_is(
    endpoint: str, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    assert said in ask(endpoint, tmp_path, **variables)


def test_a_hub_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    said = ask("http://127.0.0.1:9", tmp_path, HF_TOKEN=TOKEN)
    assert said.startswith("http://127.0.0.1:9 can't be reached: ")
    assert len(said.splitlines()) == 1
