"""The store at which processes meet, torch's TCPStore, listening where it is asked to and nowhere else."""

from __future__ import annotations

import ipaddress
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

BACKLOG = 2048
"""Connections that may wait to be accepted, as torch's own listener has it."""


def open_meeting_point(
    host: str, port: int, world_size: int | None, timeout: timedelta, *, wait: bool
) -> TCPStore:
    """The store's listening end at `host`; `port` 0 takes a free one. `wait`: until all of `world_size` came.

    torch itself listens on every address of the machine, whatever host it is given. At a loopback address
    the socket is bound to that alone; at one that other nodes reach, torch's own way stays.

    Raises:
        RuntimeError, OSError: the port is taken.
    """
    from torch.distributed import TCPStore

    if not _loopback(host):
        return TCPStore(host, port, world_size, True, timeout, wait)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=BACKLOG) as listener:
        port = listener.getsockname()[1]
        own = listener.detach()
    return TCPStore(host, port, world_size, True, timeout, wait, master_listen_fd=own)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
