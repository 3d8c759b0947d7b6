"""Values of environment variables that go with a job, and are in no file, log, command line or list of jobs.

A job's `env_vars` are shown by Ray to whoever lists jobs, are logged on every node, and stand for a moment in
a process's command line. So the values are put beside the package, over the same connection: into the memory
of the cluster's head, under a name that can't be guessed. The job takes them out when it starts, and deletes
them. Ray deletes those of a job that doesn't start within ten minutes.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actors.cluster import TRIED, head_address, private
from actors.errors import RunFailure, UserError
from pipeline.jobs.address import REACH_S

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

VARIABLE = "RAYLIGN_HANDOVER"
"""Variable of a job's environment: the name under which its values wait."""
HEAD = b"values for a job of raylign\n"
"""Begins what is stored; Ray logs the first 15 bytes of what it can't store."""
_HEADERS = ("ray._private.authentication.http_token_authentication", "get_auth_headers_if_auth_enabled")
_STORE = ("ray._raylet", "GcsClient")
SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
"""Names of variables whose values are secrets."""
LEAST = 8
"""Characters of a value that is looked for in overrides; a shorter one would be found by chance."""


def leave_for_job(client: JobSubmissionClient, values: Mapping[str, str]) -> dict[str, str]:
    """Put the values where the job takes them; variables for its environment that say where.

    Raises:
        UserError: this Ray has no way for it.
        RunFailure: the job server did not take them.
    """
    if not values:
        return {}
    import requests

    headers = private(*_HEADERS)
    if headers is None:
        raise UserError(_no_way(_HEADERS))
    name = f"_ray_pkg_{secrets.token_hex(24)}.zip"
    url = f"{client.get_address()}/api/packages/gcs/{name}"
    shown = dict(headers({}))
    # Asked for first: from then on Ray deletes it after ten minutes, unless a job that runs refers to it.
    requests.get(url, headers=shown, timeout=REACH_S)
    body = HEAD + json.dumps(dict(values)).encode()
    answer = requests.put(url, data=body, headers=shown, timeout=60)
    if answer.status_code != 200:
        raise RunFailure("Ray's job server", "submit", f"it took no values of ray.env ({answer.status_code})")
    return {VARIABLE: name}


def take_values() -> None:
    """In a job: put the values into this process's environment, and delete them where they waited.

    Raises:
        UserError: they are no longer there.
    """
    name = os.environ.pop(VARIABLE, None)
    if name is None:
        return
    store: Any = private(*_STORE)
    if store is None:
        raise UserError(_no_way(_STORE))
    client = store(address=head_address("auto"))
    key = f"gcs://{name}".encode()
    body = client.internal_kv_get(key, None)
    if body is None:
        raise UserError(
            "ray.env: the values that were sent with this job are no longer there; Ray keeps them for ten "
            "minutes until it starts. Submit it again"
        )
    client.internal_kv_del(key, False, None)
    os.environ.update(json.loads(body.removeprefix(HEAD)))


def told_secrets(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Problems of overrides that hold a secret variable's value: everybody on the cluster could read them.

    Args:
        names: variables whose values are secrets, beside those that are called so.
    """
    known = {
        name: value
        for name, value in os.environ.items()
        if (name in names or SECRET.search(name)) and len(value) >= LEAST
    }
    return [
        f"{argument.partition('=')[0]}: holds the value of the variable {name}, which the list of jobs "
        "and the processes' command lines would show; name it in ray.env, and let what needs it read it"
        for argument in arguments
        for name, value in known.items()
        if value in argument.partition("=")[2]
    ]


def _no_way(lacking: tuple[str, str]) -> str:
    import ray

    return (
        f"ray.env: Ray {ray.__version__} has no {'.'.join(lacking)}, which Ray {TRIED} has; install "
        f"ray=={TRIED}.*, or set the variables on every node and leave ray.env out"
    )
