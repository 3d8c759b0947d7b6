"""A local cluster starts wherever an environment leaves a way, and leaves the variables as they were."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from actors.cluster.environment import beside_proxies

OURS = ("RAY_TMPDIR", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
UP_AND_DOWN = """
import os
from actors.cluster.connection import start_ray, stop_ray
before = dict(os.environ)
how = start_ray(None, num_cpus=1).how
changed = {name for name in before if os.environ.get(name) != before[name]}
added = {name for name in os.environ if name not in before and "RAY_A" in name}
stop_ray()
print(changed, added, how)
"""


def up_and_down(repository: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process that starts a local cluster and ends it."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    env = kept | {"PYTHONPATH": str(repository), "RAY_USAGE_STATS_ENABLED": "0"} | variables
    return subprocess.run([sys.executable, "-c", UP_AND_DOWN], env=env, capture_output=True, text=True)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["scratch_of_a_batch_system_" * 3, "ä's "])
def test_one_starts_where_ray_takes_no_path_and_says_where_its_files_are(repository: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(prefix=name, dir="/tmp") as place:
        done = up_and_down(repository, TMPDIR=place)
        assert os.listdir(place) == []
    said = re.search(
        r"its files are in (/\S+/raylign-\w+), as TMPDIR is (longer than|with char)", done.stdout
    )
    assert said is not None, done.stdout + done.stderr
    assert not Path(said[1]).exists()


@pytest.mark.ray
def test_one_starts_without_a_home_and_leaves_the_variables_as_they_were(repository: Path) -> None:
    done = up_and_down(repository, HOME="/proc/nohome")
    assert done.stdout.startswith("set() set() ray: fast start"), done.stdout + done.stderr


@pytest.mark.ray
def test_one_writes_no_token_into_a_home(tmp_path: Path, repository: Path) -> None:
    done = up_and_down(repository, HOME=str(tmp_path), TMPDIR=tempfile.gettempdir())
    assert done.stdout.startswith("set() set() ray:"), done.stdout + done.stderr
    assert not (tmp_path / ".ray").exists()


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.usefixtures("no_proxies")
def test_hosts_are_added_to_those_that_a_proxy_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert beside_proxies(["127.0.0.1"]) == {}
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "internal, 127.0.0.1")
    expected = "internal,127.0.0.1,localhost"
    assert beside_proxies(["127.0.0.1", "localhost"]) == {"no_proxy": expected, "NO_PROXY": expected}
