"""Client of a cluster's job server: connects, explains errors, lists jobs, waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.cluster import MODE, use_token
from actors.errors import RunFailure, UserError
from pipeline.jobs.address import VARIABLES, Named, first_line, job_server, named
from pipeline.jobs.shipment import NAME_KEY

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

POLL = 1.0
"""Seconds between two looks at a job."""
_CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Ray's loggers that report every packaging step and closed socket."""

TOKEN_HELP = (
    "the cluster asks for a token, and client and cluster must share it: copy the head's ~/.ray/auth_token "
    "to the same place here or name the file in RAY_AUTH_TOKEN_PATH, and leave RAY_AUTH_MODE unset or set "
    "RAY_AUTH_MODE=token"
)


def connect(option: str | None, run: str | None = None) -> JobSubmissionClient:
    """A client of the job server of the cluster that is named: by `option`, else by where `run` was submitted
    to, else by Ray's variables, else the one that was started on this machine.

    It shows this machine's token where the cluster asks for one, and nowhere else.

    Raises:
        UserError: there is none, it can't be reached, or it refuses the token.
    """
    cluster = named(option, remembered_address(run))
    with _unsaid(), explained(cluster):
        import logging

        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        url = job_server(cluster)
        try:
            return JobSubmissionClient(url)
        except AuthenticationError:
            if MODE in os.environ or not use_token(url, cluster.by):
                raise
            return JobSubmissionClient(url)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"{cluster.by}: what answers at {url} is no Ray job server ({first_line(error)}); name the "
                "cluster's dashboard, e.g. --address http://HEAD:8265"
            ) from None


@contextlib.contextmanager
def explained(cluster: Named) -> Iterator[None]:
    """Turn Ray's errors about reaching a cluster into UserError with a next step."""
    where = cluster.address or "this machine"
    try:
        yield
    except (UserError, RunFailure):
        raise
    except OSError as error:
        raise UserError(
            f"{cluster.by}: the job server at {where} no longer answers ({first_line(error)}); try again, or "
            "look whether the cluster is up"
        ) from None
    except Exception as error:
        text = str(error)
        if any(word in text for word in ("nauthorized", "uthentication", "orbidden")):
            raise UserError(f"{cluster.by}: {where}: {TOKEN_HELP} (Ray says: {first_line(error)})") from None
        raise RunFailure(f"Ray's job server at {where}", "call", first_line(error)) from error


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Without Ray's variables, which would override the URL that was found."""
    taken = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def at(client: JobSubmissionClient) -> Named:
    """The cluster of a client, for errors."""
    return Named(client.get_address(), "--address")


def runs_of(client: JobSubmissionClient) -> list[JobDetails]:
    """Runs of this program on the cluster, newest first."""
    with explained(at(client)):
        jobs = client.list_jobs()
    ours = [job for job in jobs if job.submission_id and NAME_KEY in (job.metadata or {})]
    return sorted(ours, key=lambda job: -(job.start_time or 0))


def details(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """A job as it is now."""
    with explained(at(client)):
        return client.get_job_info(job_id)


def ended(job: JobDetails) -> bool:
    """True for a job that has ended, in whatever way."""
    return str(job.status) in ("SUCCEEDED", "FAILED", "STOPPED")


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
