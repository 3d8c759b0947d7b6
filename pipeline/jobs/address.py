"""The cluster that a command on jobs means: the URL of its job server, from any form of its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from actors.cluster import asks_for_token, head_address, match_tokens, private
from actors.errors import UserError

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray looks for a cluster. It lets them override an explicit address; here the option goes first."""
DASHBOARD, HEAD, CLIENT = 8265, 6379, 10001
"""Ports that Ray takes by default: of its dashboard, which has the job server; of the cluster's head; of Ray
Client."""
REACH_S = 5.0
"""Seconds to wait for a first answer."""
_LOOK_UP = ("ray.dashboard.utils", "ray_address_to_api_server_url")


@dataclass(frozen=True)
class Named:
    """A cluster as it was named."""

    address: str | None
    """None: nowhere, so it is the one that was started on this machine."""
    by: str
    """The option or the variable; it begins an error's text."""


def named(option: str | None, remembered: str | None = None) -> Named:
    """The cluster that is named: by the option, else by where the run is, else by Ray's variables."""
    if option:
        return Named(option, "--address")
    if remembered:
        return Named(remembered, "--address")
    found = [name for name in VARIABLES if os.environ.get(name, "").strip()]
    return Named(os.environ[found[0]].strip(), found[0]) if found else Named(None, "--address")


def job_server(cluster: Named) -> str:
    """URL of the cluster's job server, e.g. http://HEAD:8265, which answers.

    A dashboard is taken as it is; at the port of a cluster's head its dashboard is asked for.

    Raises:
        UserError: it is named in a form that leads to no job server, or nothing answers there.
    """
    address = cluster.address
    if address is None or address in ("auto", "local"):
        return _answering(_of_this_machine(cluster), cluster)
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{cluster.by}: {address!r} is no address ({error}); give {_dashboard()}") from None
    if not host:
        raise UserError(f"{cluster.by}: {address!r} names no machine; give {_dashboard()}")
    if parts.scheme in ("http", "https"):
        return _answering(address.rstrip("/"), cluster)
    if parts.scheme:
        what = "a Ray Client address" if parts.scheme == "ray" else "no address of a dashboard"
        raise UserError(
            f"{cluster.by}: {address} is {what}, and jobs are sent elsewhere; give {_dashboard(host)}"
        )
    if port is None:
        raise UserError(f"{cluster.by}: {address!r} has no port; give {_dashboard(host)}")
    url = f"http://{parts.netloc}"
    return url if speaks_http(url) else _answering(_of_head(parts.netloc, cluster), cluster)


def speaks_http(url: str) -> bool:
    """True where any HTTP answer comes, also a refusal."""
    import requests

    try:
        requests.get(f"{url}/api/version", timeout=REACH_S, allow_redirects=False)
    except (requests.RequestException, ValueError):
        return False
    return True


def _answering(url: str, cluster: Named) -> str:
    """The URL, if something that speaks HTTP answers there; a UserError with what to do if not."""
    if speaks_http(url):
        return url
    raise UserError(silent(url, cluster))


def silent(url: str, cluster: Named) -> str:
    """The message where nothing that speaks HTTP answers at `url`."""
    parts = urlsplit(url)
    host, by = parts.hostname or "HEAD", cluster.by
    if proxy := _proxy(url):
        variable, value = proxy
        return (
            f"{by}: no Ray job server answers at {url} through the proxy of {variable} ({value}); set "
            f"no_proxy={host}, so that the cluster is asked directly"
        )
    if parts.port == CLIENT:
        return f"{by}: {CLIENT} is the port of Ray Client, which takes no jobs; give {_dashboard(host)}"
    if asks_for_token(parts.netloc) is not None:
        return (
            f"{by}: a cluster's head answers at {url}, which takes no jobs; give {_dashboard(host)}, or the "
            f"head without a scheme: --address {parts.netloc}"
        )
    return (
        f"{by}: no Ray job server answers at {url}. Start a cluster with `ray start --head`, or name its "
        f"dashboard, e.g. --address http://HEAD:{DASHBOARD}"
    )


def _of_this_machine(cluster: Named) -> str:
    try:
        head = head_address("auto")
    except (UserError, ConnectionError, ValueError):
        head = None
    # Its dashboard may have another port, or listen on loopback only; the head knows.
    return f"http://127.0.0.1:{DASHBOARD}" if head is None else _of_head(head, cluster)


def _of_head(head: str, cluster: Named) -> str:
    """Ask the cluster's head, at host:port, for its dashboard."""
    host = head.rpartition(":")[0]
    if asks_for_token(head) is None:
        raise UserError(silent(f"http://{head}", cluster))
    match_tokens(head, cluster.by)
    look_up: Any = private(*_LOOK_UP)
    if look_up is None:
        raise UserError(f"{cluster.by}: {head} is the address of a cluster's head; give {_dashboard(host)}")
    try:
        url = str(look_up(head))
    except Exception as error:  # of the head's client, by kind of fault
        raise UserError(
            f"{cluster.by}: the cluster at {head} names no dashboard ({first_line(error)}); give "
            f"{_dashboard(host)}"
        ) from None
    return url


def _dashboard(host: str = "HEAD") -> str:
    return f"the dashboard, e.g. --address http://{host}:{DASHBOARD}"


def first_line(error: object) -> str:
    """The first line of an error of Ray, which may have a hundred."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:200].rsplit(". ", 1)[0] + " ..."


def _proxy(url: str) -> tuple[str, str] | None:
    """(variable, proxy) that requests to `url` go through; None: they go directly."""
    from requests.utils import get_environ_proxies

    scheme = urlsplit(url).scheme
    proxies = get_environ_proxies(url, no_proxy=None)
    for kind in (scheme, "all"):
        if kind in proxies:
            names = (f"{kind}_proxy", f"{kind}_proxy".upper())
            return next((n for n in names if n in os.environ), names[0]), proxies[kind]
    return None
