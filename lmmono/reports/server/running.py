"""Starting the server of runs, on loopback unless told otherwise, and the tools over stdio."""

import importlib.util
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from lmmono.errors import RunError

AT_ONCE = 64
"""Requests at one time; further ones are told to come again."""


def _require(extra: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"{', '.join(missing)}: not installed; run: pip install 'lmmono[{extra}]'")


def serve(
    places: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    names: Sequence[str] = (),
    seconds: float = 10.0,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve runs until Ctrl-C.

    Args:
        places: Run folders, or stores.
        host: Address to listen at; beyond loopback everybody needs the token.
        port: Port; 0 takes a free one.
        token: At least 16 characters; made where one is needed and none is given.
        names: Host names by which the server is reached besides its address.
        seconds: Longest time of a query of the console.
        tell: Gets the address.

    Raises:
        RunError: Extra `serve` is not installed, a place holds no store, or the port is taken.
        StoreError: A store cannot be opened.
    """
    _require("serve", "jinja2", "starlette", "uvicorn")
    import uvicorn

    from lmmono.reports.server.console import ConsoleLimits
    from lmmono.reports.server.guard import LOOPBACK, Access
    from lmmono.reports.server.served import Served
    from lmmono.reports.server.site import build_app

    if token is None and host not in LOOPBACK:
        token = secrets.token_urlsafe(24)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as fault:
            raise RunError(
                f"serve: cannot listen at {host}:{port}: {fault}; take another --port"
            ) from None
        port = listener.getsockname()[1]
        access = Access(host, port, token, tuple(names))
        served = Served(places, ConsoleLimits(seconds=seconds))
        config = uvicorn.Config(
            build_app(served, access),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=AT_ONCE,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=3,
            ws="none",
            h11_max_incomplete_event_size=100_000,
        )
        shown = f"[{host}]" if ":" in host else host
        secret = f"?token={token}" if token else ""
        listener.listen()  # or who asks as soon as the address is told is refused
        tell(f"http://{shown}:{port}/{secret}")
        uvicorn.Server(config).run(sockets=[listener])


def serve_tools(places: Sequence[str | Path], *, seconds: float = 10.0) -> None:
    """Answer a program's questions about runs over stdin and stdout, until stdin ends.

    Args:
        places: Run folders, or stores.
        seconds: Longest time of a query.

    Raises:
        RunError: Extra `mcp` is not installed, or a place holds no store.
        StoreError: A store cannot be opened.
    """
    _require("mcp", "jinja2", "mcp")
    from lmmono.reports.server.console import ConsoleLimits
    from lmmono.reports.server.served import Served
    from lmmono.reports.server.tools import build_tools

    served = Served(places, ConsoleLimits(seconds=seconds))
    try:
        build_tools(served).run("stdio")
    finally:
        served.close()
