"""Client of a cluster's job server: connects, explains errors, lists jobs, waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import RunFailure, UserError
from pipeline.jobs.shipment import NAME_KEY

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

POLL = 1.0
"""Seconds between two looks at a job."""
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Ray's loggers that report every packaging step and closed socket."""

TOKEN_HELP = (
    "the cluster asks for a token. Client and cluster must share one: `ray get-auth-token --generate` makes "
    "it (in ~/.ray/auth_token, or where RAY_AUTH_TOKEN_PATH says); start the cluster with "
    "`RAY_AUTH_MODE=token ray start --head`, and set RAY_AUTH_MODE=token here as well"
)


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server.

    Raises:
        UserError: there is none, it can't be reached, or it refuses the token.
    """
    with _only(address), explained(address):
        import logging

        from ray.job_submission import JobSubmissionClient

        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        return JobSubmissionClient(address)


@contextlib.contextmanager
def explained(address: str | None) -> Iterator[None]:
    """Turn Ray's errors about reaching a cluster into UserError with a next step."""
    where = (
        address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine"
    )
    try:
        yield
    except (UserError, RunFailure):
        raise
    except OSError as error:
        raise UserError(
            f"--address: no Ray job server answers at {where} ({first_line(error)}). Start a cluster with "
            "`ray start --head`, or name its dashboard, e.g. --address http://HEAD:8265"
        ) from None
    except Exception as error:
        text = str(error)
        if any(word in text for word in ("nauthorized", "uthentication", "orbidden")):
            raise UserError(f"--address: {where}: {TOKEN_HELP} (Ray says: {first_line(error)})") from None
        raise RunFailure(f"Ray's job server at {where}", "call", first_line(error)) from error


@contextlib.contextmanager
def _only(address: str | None) -> Iterator[None]:
    """Ray lets its variables override an explicit address; the command line goes first here."""
    taken = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if address and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def runs_of(client: JobSubmissionClient) -> list[JobDetails]:
    """Runs of this program on the cluster, newest first."""
    with explained(client.get_address()):
        jobs = client.list_jobs()
    ours = [job for job in jobs if job.submission_id and NAME_KEY in (job.metadata or {})]
    return sorted(ours, key=lambda job: -(job.start_time or 0))


def details(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """A job as it is now."""
    with explained(client.get_address()):
        return client.get_job_info(job_id)


def ended(job: JobDetails) -> bool:
    """True for a job that has ended, in whatever way."""
    return str(job.status) in ("SUCCEEDED", "FAILED", "STOPPED")


def first_line(error: object) -> str:
    """The first line of an error of Ray, which may have a hundred."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:200].rsplit(". ", 1)[0] + " ..."


def wait_for_end(client: JobSubmissionClient, job_id: str, seconds: float) -> JobDetails:
    """The job once it has ended, or as it is after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        job = details(client, job_id)
        if ended(job) or time.monotonic() > deadline:
            return job
        time.sleep(POLL)


# Where a run was submitted, so that later commands need no --address.


def _memory() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "raylign" / "jobs.json"


def _remembered() -> dict[str, Any]:
    try:
        known = json.loads(_memory().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(job_id: str, name: str, address: str) -> None:
    """Note the cluster of a job and of its run's name; a home that can't be written is no error."""
    known = {**_remembered(), job_id: address, name: address}
    with contextlib.suppress(OSError):
        _memory().parent.mkdir(parents=True, exist_ok=True)
        aside = _memory().with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(known, indent=1))
        aside.replace(_memory())


def remembered_address(run: str | None) -> str | None:
    """Address of the cluster that a job or run was last submitted to from here."""
    return _remembered().get(run) if run else None
