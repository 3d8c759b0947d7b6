"""Commands for runs as Ray jobs: submit, logs, status, stop (after saving)."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from actors.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RunFailure, UserError
from pipeline.jobs.address import first_line
from pipeline.jobs.handover import leave_for_job
from pipeline.jobs.server import (
    POLL,
    at,
    connect,
    details,
    ended,
    explained,
    remember,
    runs_of,
    wait_for_end,
)
from pipeline.jobs.shipment import NAME_KEY, OUTPUT_KEY, plan_shipment, stop_command

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

    from pipeline.config.run_config import RunConfig

_COUNTED = re.compile(r"(^|: )\d+ problems?$")
"""A command's first line where several problems follow."""
SETTLE = 30.0
"""Seconds that a job may take to report its end after its log has ended."""
_LOOPBACK = ("127.0.0.1", "localhost")


Say = Callable[[str], None]


def submit(
    config: RunConfig,
    config_path: Path,
    overrides: Sequence[str],
    *,
    address: str | None,
    flags: Sequence[str] = (),
    follow: bool = True,
    say: Say = print,
) -> int:
    """Ship the working directory and run `config` there; with `follow`, the job's exit code.

    Raises:
        UserError: something would not be found on the cluster, or the run is already there.
    """
    shipment = plan_shipment(config, config_path, overrides, flags, Path.cwd())
    client = connect(address)
    here = any(host in client.get_address() for host in _LOOPBACK)
    taken = next(
        (j for j in runs_of(client) if j.metadata.get(NAME_KEY) == config.name and not ended(j)), None
    )
    if taken is not None:
        raise UserError(_already(config.name, str(taken.submission_id)))
    job_id = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with tempfile.TemporaryDirectory() as directory, explained(at(client)):
        archive = Path(directory) / "job.zip"
        shipment.package.write(archive)
        try:
            client.submit_job(
                entrypoint=shipment.entrypoint(sys.executable if here else "python"),
                runtime_env=shipment.runtime_env(archive, leave_for_job(client, shipment.values)),
                metadata=shipment.metadata,
                submission_id=job_id,
            )
        except RuntimeError as error:
            if "already" not in str(error):  # submitted twice in one second
                raise
            raise UserError(_already(config.name, job_id)) from None
    remember(job_id, config.name, client.get_address())
    say(f"job {job_id} on {client.get_address()}; results in {config.output_dir}")
    if not follow:
        say(f"follow it with `raylign logs {config.name} --follow`")
        return EXIT_DONE
    return follow_job(client, job_id, config.name, say)


def _already(name: str, job_id: str) -> str:
    return (
        f"name: the run {name!r} is already on this cluster as job {job_id}; follow it with "
        f"`raylign logs {name} --follow`, stop it with `raylign stop {name}`, or rename this one"
    )


def follow_job(client: JobSubmissionClient, job_id: str, name: str, say: Say = print) -> int:
    """Print the job's log until it ends; its exit code."""
    try:
        asyncio.run(_tail(client, job_id, sys.stdout))
    except KeyboardInterrupt:
        say(f"\nno longer following; the job goes on. `raylign logs {name} --follow`, `raylign stop {name}`")
        return EXIT_DONE
    job = wait_for_end(client, job_id, SETTLE)
    return exit_code(job)


async def _tail(client: JobSubmissionClient, job_id: str, out: TextIO) -> None:
    """Copy the log to `out`. A lost connection is made again, without printing a line twice."""
    printed, attempts = 0, 0
    while True:
        seen = 0
        try:
            async for chunk in client.tail_job_logs(job_id):
                seen += len(chunk)
                if seen > printed:
                    out.write(chunk[-(seen - printed) :])
                    out.flush()
                    printed, attempts = seen, 0
            return
        except Exception as error:
            attempts += 1
            if ended(details(client, job_id)) or attempts > 5:
                if attempts > 5:
                    raise RunFailure(f"job {job_id}", "logs", f"connection lost: {error}") from error
                return
            await asyncio.sleep(POLL)


def exit_code(job: JobDetails) -> int:
    """A job's outcome as this command's exit code: the run's own where it had one."""
    if str(job.status) == "SUCCEEDED":
        return EXIT_DONE
    if job.driver_exit_code is not None and job.driver_exit_code > 0:
        return int(job.driver_exit_code)
    raise RunFailure(f"job {job.submission_id}", "run", reason(job), f"raylign logs {job.submission_id}")


def reason(job: JobDetails) -> str:
    """The line that says why a job ended as it did: its own last error, its signal, or Ray's words."""
    lines = [line.strip() for line in (job.message or "").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("error: ", "failed: "))]
    counted = [place for place, line in enumerate(lines) if _COUNTED.search(line)]
    code = job.driver_exit_code
    if told:
        return told[-1].partition(": ")[2]
    if counted:
        return " ".join(lines[counted[-1] : counted[-1] + 2])
    if code is not None and code < 0:
        extra = " (kill -9, or no memory left on its machine)" if code == -signal.SIGKILL else ""
        return f"ended by signal {-code}{extra}"
    if not lines:
        return str(job.status)
    traceback = any(line.startswith("Traceback") for line in lines)
    return first_line(lines[-1] if traceback or code is not None else lines[0])


def failures(jobs: Sequence[JobDetails]) -> list[str]:
    """A line for each job that failed: its id and the reason."""
    return [
        f"{job.submission_id}: {reason(job)}"
        for job in jobs
        if str(job.status) == "FAILED" and job.driver_exit_code != EXIT_STOPPED
    ]


def find(client: JobSubmissionClient, run: str) -> JobDetails:
    """The job with this id, or the newest of the run with this name.

    Raises:
        UserError: there is none; lists those that there are.
    """
    jobs = runs_of(client)
    found = [job for job in jobs if run in (job.submission_id, job.metadata.get(NAME_KEY))]
    if found:
        return found[0]
    known = ", ".join(dict.fromkeys(job.metadata[NAME_KEY] for job in jobs)) or "none"
    raise UserError(f"no job or run is named {run!r} on {client.get_address()} (runs there: {known})")


def logs(run: str, *, address: str | None, follow: bool, say: Say = print) -> int:
    """Print a run's log so far, or follow it and return its exit code."""
    client = connect(address, run)
    job = find(client, run)
    if follow:
        return follow_job(client, str(job.submission_id), run, say)
    with explained(at(client)):
        sys.stdout.write(client.get_job_logs(str(job.submission_id)))
    return EXIT_DONE


def status(run: str | None, *, address: str | None) -> list[JobDetails]:
    """The jobs of a run (newest first), or all that this program submitted."""
    client = connect(address, run)
    if run is None:
        return runs_of(client)
    job = find(client, run)
    return [job, *(j for j in runs_of(client) if j.metadata.get(NAME_KEY) == run and j != job)]


def status_rows(jobs: Sequence[JobDetails]) -> list[list[str]]:
    """Run, job, state, start, duration, exit code, output directory; a row a job."""
    rows = []
    for job in jobs:
        metadata = job.metadata or {}
        began, ended = (job.start_time or 0) / 1000, (job.end_time or time.time() * 1000) / 1000
        code = "" if job.driver_exit_code is None else str(job.driver_exit_code)
        state = "stopped, saved" if job.driver_exit_code == EXIT_STOPPED else str(job.status).lower()
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))
        took = f"{max(0, ended - began):.0f} s"
        rows.append(
            [
                metadata.get(NAME_KEY, ""),
                str(job.submission_id),
                state,
                started,
                took,
                code,
                metadata.get(OUTPUT_KEY, ""),
            ]
        )
    return rows


def stop(run: str, *, address: str | None, seconds: float, now: bool = False, say: Say = print) -> int:
    """Ask a run to save and stop; end its job if it has not within `seconds`.

    Ray kills a job three seconds after SIGTERM, which is less than a checkpoint takes. So the
    request is a file in the run directory, written by a job of its own where the run's driver is.
    """
    client = connect(address, run)
    job = find(client, run)
    job_id = str(job.submission_id)
    if ended(job):
        say(f"{job_id} has already ended: {job.status}")
        return EXIT_DONE
    if now or str(job.status) == "PENDING":
        return _end(client, job_id, say)
    helper = f"{job_id}-stop-{time.strftime('%H%M%S')}"
    with explained(at(client)):
        client.submit_job(entrypoint=stop_command(job.metadata[OUTPUT_KEY], seconds), submission_id=helper)
    say(f"asked {job_id} to save and stop; waiting up to {seconds:.0f} s")
    try:
        job = wait_for_end(client, job_id, seconds)
    finally:
        client.stop_job(helper)
    if not ended(job):
        say(f"it has not stopped within {seconds:.0f} s: ending it. Its last complete checkpoint stays")
        return _end(client, job_id, say)
    saved = job.driver_exit_code == EXIT_STOPPED
    say(f"{job_id}: {'stopped after saving; submit it again to go on' if saved else f'ended: {job.status}'}")
    return EXIT_DONE


def _end(client: JobSubmissionClient, job_id: str, say: Say) -> int:
    client.stop_job(job_id)
    job = wait_for_end(client, job_id, SETTLE)
    say(f"{job_id}: {job.status}")
    return EXIT_DONE if ended(job) else EXIT_FAILED
