"""The only place that imports Ray, and where the cluster is."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import socket
from typing import Any

from pipeline.errors import MissingError

_ADDRESS = "RAY_ADDRESS"
_REACH_SECONDS = 10.0


def library() -> Any:
    """Return the module ``ray``.

    Raises:
        MissingError: It is not installed; names the extra.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingError(
            "The executor ray needs Ray, which is not installed.", where="executor: ray", fix="pip install '.[ray]'"
        )
    return importlib.import_module("ray")


def scheduling() -> Any:
    """Return Ray's module of scheduling strategies."""
    return importlib.import_module("ray.util.scheduling_strategies")


def connect() -> bool:
    """Join the running cluster that ``RAY_ADDRESS`` names, or the one on this machine; return whether this call did.

    A cluster is never started here: one of a single machine would look like more than it is.

    Raises:
        MissingError: Ray is not installed, or there is no cluster.
    """
    ray = library()
    if ray.is_initialized():
        return False
    address = os.environ.get(_ADDRESS, "auto")
    if address.startswith("ray://") or address == "local":
        raise MissingError(
            "A build joins a cluster as one of its nodes: not through Ray Client, and it starts none itself.",
            where=f"{_ADDRESS}={address}",
            fix="Run it on a node of the cluster (its head, or `ray job submit`), with the address HOST:6379.",
        )
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingError(
            f"There is no Ray cluster to join: {' '.join(str(error).split())[:200]}",
            where=f"{_ADDRESS}={address}" if _ADDRESS in os.environ else "executor: ray",
            fix="Start one (`ray start --head`, and `ray start --address HOST:6379` on every other machine), or set "
            f"{_ADDRESS} to that of a running one.",
        ) from error
    return True


def _reach(address: str) -> None:
    """Open and close a connection to HOST:PORT: Ray itself tries for minutes before it says that nobody answers.

    Raises:
        OSError: Nobody answers there.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
