"""The forms in which a cluster can be named, and what is told where one leads to no job server."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from actors.errors import UserError
from pipeline.jobs.address import Named, first_line, job_server, named
from pipeline.jobs.server import connect


@pytest.fixture(autouse=True)
def without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def page() -> Iterator[str]:
    """A web server that knows nothing of Ray."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_option_goes_first_then_where_the_run_was_then_rays_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert named(None) == Named(None, "--address")
    monkeypatch.setenv("RAY_ADDRESS", " ")
    assert named("") == Named(None, "--address")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert named(None) == Named("head:6379", "RAY_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    assert named(None) == Named("http://head:8265", "RAY_API_SERVER_ADDRESS")
    assert named(None, "http://there:8265") == Named("http://there:8265", "--address")
    assert named("http://here:8265", "http://there:8265") == Named("http://here:8265", "--address")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ray://head:10001", "a Ray Client address, and jobs are sent elsewhere; give .*http://head:8265"),
        ("s3://bucket", "no address of a dashboard"),
        ("head", "has no port; give .*http://head:8265"),
        (":6379", "names no machine"),
        ("http://", "names no machine"),
        ("http://head:99999", r"no address \(Port out of range"),
        ("http://[::1", r"no address \(Invalid IPv6 URL"),
        ("127.0.0.1:1", "no Ray job server answers at http://127.0.0.1:1. Start a cluster"),
        ("http://127.0.0.1:10001", "10001 is the port of Ray Client, which takes no jobs"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_message_that_begins_with_its_source(
    address: str, says: str
) -> None:
    with pytest.raises(UserError, match=f"RAY_ADDRESS: .*{says}") as caught:
        job_server(Named(address, "RAY_ADDRESS"))
    assert len(caught.value.problems) == 1


def test_a_dashboard_needs_no_scheme(page: str) -> None:
    assert job_server(Named(page, "--address")) == f"http://{page}"
    assert job_server(Named(f"http://{page}/", "--address")) == f"http://{page}"


def test_a_server_that_is_none_of_rays_is_told_as_that(page: str) -> None:
    with pytest.raises(UserError, match=f"what answers at http://{page} is no Ray job server"):
        connect(page)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.cluster import joined_cluster
    from pipeline.jobs import address

    monkeypatch.setattr(address, "REACH_S", 0.5)
    monkeypatch.setattr(joined_cluster, "REACH_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        with pytest.raises(UserError, match="no Ray job server answers"):
            job_server(Named(f"http://127.0.0.1:{mute.getsockname()[1]}", "--address"))
        assert time.monotonic() - began < 10


def test_a_long_error_is_cut_to_its_first_line() -> None:
    assert first_line("\n  one\ntwo") == "one"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line("word. " * 100)) < 210
