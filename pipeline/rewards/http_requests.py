"""Many HTTP requests at once, each with a deadline and repetitions, and a deadline for all of them.

They run in an event loop in a thread of their own. Whoever waits for them waits until their deadline and no
longer, whatever a server, a name server or the loop itself does.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.rewards.values import cut

if TYPE_CHECKING:
    import aiohttp

AGAIN = (408, 429)
"""Statuses below 500 by which a server asks to come again."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Seconds before the first repetition, at most, and before any."""
MOST_BYTES = 1 << 26
"""Of one response."""
GRACE_S = 1.0
"""Seconds beyond the deadline in which the thread says what it has got."""


@dataclass(frozen=True)
class Calling:
    """Address and patience."""

    url: str
    timeout_s: float
    """For all requests."""
    request_timeout_s: float
    retries: int
    max_in_flight: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """With secrets: never shown."""

    def shown(self, text: str) -> str:
        """A server's words for a message: its beginning, without the secrets that it was sent."""
        for value in self.headers.values():
            text = text.replace(value, "***").replace(value.removeprefix("Bearer "), "***")
        return cut(text)


@dataclass(frozen=True)
class Reply:
    """A response's JSON, or the reason why there is none."""

    value: Any = None
    problem: str = ""


class Again(Exception):
    """Raised where a request may be sent again; its text says what was wrong."""

    def __init__(self, text: str, after_s: float = 0.0) -> None:
        super().__init__(text)
        self.after_s = after_s
        """Seconds that the server asks to wait."""


class Requests:
    """Requests under way, from when it is made."""

    def __init__(self, calling: Calling, bodies: Sequence[Any]) -> None:
        """`bodies`: of each request, to be sent as JSON."""
        self._calling, self._bodies = calling, bodies
        self._replies: list[Reply | None] = [None] * len(bodies)
        self._why = [""] * len(bodies)
        """By request: what was wrong with it last."""
        self._deadline = time.monotonic() + calling.timeout_s
        self._done = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="reward-requests").start()

    def result(self) -> list[Reply]:
        """A reply to each, at the deadline at the latest."""
        self._done.wait(max(0.0, self._deadline + GRACE_S - time.monotonic()))
        late = f"no answer within {self._calling.timeout_s:g} s"
        return [
            reply or Reply(problem=f"{late} ({why})" if why else late)
            for reply, why in zip(list(self._replies), list(self._why), strict=True)
        ]

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
        except Exception as error:  # a fault of this very module must not look like a server that hangs
            self._why = [f"{type(error).__name__}: {error}"] * len(self._bodies)
        finally:
            self._done.set()

    async def _all(self) -> None:
        import aiohttp

        calling = self._calling
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=calling.max_in_flight),
            timeout=aiohttp.ClientTimeout(total=None),
            headers=calling.headers,
            trust_env=not on_this_machine(calling.url),  # a proxy has no way to what runs here
        ) as session:
            room = asyncio.Semaphore(calling.max_in_flight)
            tasks = [asyncio.create_task(self._one(session, room, i)) for i in range(len(self._bodies))]
            if tasks:
                left = self._deadline - time.monotonic()
                await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
            if all(self._replies) or time.monotonic() >= self._deadline:
                self._done.set()  # Closing connections is nobody's to wait for.
            for task in tasks:
                task.cancel()
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(error, Exception):
                    raise error

    async def _one(self, session: aiohttp.ClientSession, room: asyncio.Semaphore, index: int) -> None:
        """Send one request until it is answered or its repetitions are used up."""
        calling = self._calling
        for attempt in range(calling.retries + 1):
            try:
                async with room:
                    self._replies[index] = await self._sent(session, self._bodies[index])
                    return
            except Again as again:
                self._why[index], asked = str(again), again.after_s
            if asked > self._deadline - time.monotonic():
                problem = f"{self._why[index]}, and asks to wait {asked:g} s, beyond `timeout_s`"
                self._replies[index] = Reply(problem=problem)
                return
            if attempt < calling.retries:
                await asyncio.sleep(max(asked, random.uniform(0, longest_wait(attempt))))
        times = f", asked {calling.retries + 1} times" if calling.retries else ""
        self._replies[index] = Reply(problem=self._why[index] + times)

    async def _sent(self, session: aiohttp.ClientSession, body: Any) -> Reply:
        """The reply to one request.

        Raises:
            Again: the connection failed, nothing came in time, or the server asks to come again.
        """
        import aiohttp

        calling = self._calling
        try:
            async with asyncio.timeout(calling.request_timeout_s):
                async with session.post(calling.url, json=body, allow_redirects=False) as response:
                    text = await _text(response)
        except TimeoutError:
            raise Again(f"no response within {calling.request_timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Again(f"{type(error).__name__}: {calling.shown(str(error))}") from None
        if 200 <= response.status < 300:
            try:
                return Reply(json.loads(text))
            except ValueError:
                return Reply(problem=f"it answered no JSON: {calling.shown(text)!r}")
        said = f"it answered {response.status} {response.reason}: {calling.shown(text)!r}"
        if response.status in AGAIN or response.status >= 500:
            raise Again(said, retry_after(response.headers.get("Retry-After", ""), time.time()))
        return Reply(problem=said)


async def _text(response: aiohttp.ClientResponse) -> str:
    import aiohttp

    parts, size = [], 0
    async for part in response.content.iter_chunked(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise aiohttp.ClientPayloadError(f"a response of more than {MOST_BYTES >> 20} MiB")
    return b"".join(parts).decode("utf-8", "replace")


def longest_wait(attempt: int) -> float:
    """Seconds to wait at most after a request that failed, the first being attempt 0: doubled each time, and
    drawn from 0 up, so that many that failed together don't come back together."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt, 30))


def retry_after(header: str, now: float) -> float:
    """Seconds that a Retry-After asks to wait: a number of them, or a date (RFC 9110, 10.2.3); 0 for none.

    Args:
        now: seconds since the epoch.
    """
    try:
        return max(0.0, float(int(header)))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def on_this_machine(url: str) -> bool:
    """True where a URL's host is this machine's own loopback."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
