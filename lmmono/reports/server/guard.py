"""Who may ask the server: the host that was meant, pages of its own, and whoever has the token.

A page of a stranger, open in the same browser, can send requests to loopback too. It cannot set the
`Host` of its own name (DNS rebinding) nor hide its `Origin`, so both are checked; and the policy of
our pages lets them load and send nothing elsewhere.
"""

import hmac
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmmono.errors import RunError

COOKIE = "lmmono_token"
LARGEST_BODY = 200_000
"""Bytes of a request: a query and a text fit many times."""
LONGEST_URL = 60_000
"""Bytes of path and query, in which a deep link carries a query."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    # with no-referrer a browser sends `Origin: null` with a form, also to the server itself
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Access:
    """Where the server is reached and what one has to bring."""

    host: str = "127.0.0.1"
    """Address that it listens at."""
    port: int = 8765
    """Port, 1 to 65535."""
    token: str | None = None
    """Secret that every request has to bring; None only on loopback."""
    names: tuple[str, ...] = ()
    """Host names by which it is reached besides its address."""

    def __post_init__(self) -> None:
        """Refuse an open door.

        Raises:
            RunError: It listens beyond loopback without a token, or the token is short.
        """
        if self.token is None and self.host not in LOOPBACK:
            raise RunError(
                f"serve: {self.host} can be reached from other machines, so a token is needed"
            )
        if self.token is not None and len(self.token) < 16:
            raise RunError("serve: want a token of at least 16 characters")

    def hosts(self) -> set[str]:
        """Return the values of `Host` that are meant for this server."""
        names = {*self.names, self.host} - {"0.0.0.0", "::"}  # noqa: S104 - not bound, compared
        if self.host in LOOPBACK:
            names |= set(LOOPBACK)
        shown = {f"[{name}]" if ":" in name else name for name in names}
        return {f"{name.lower()}:{self.port}" for name in shown} | (
            {name.lower() for name in shown} if self.port == 80 else set()
        )


class Guard:
    """ASGI middleware: checks every request, and adds the headers of `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access, self._hosts = app, access, access.hosts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or say why not."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, with_headers)
            return
        n_bytes = 0

        async def bounded() -> Message:
            # a body may come in pieces and without a length
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > LARGEST_BODY:
                raise _TooLarge
            return message

        try:
            await self._app(scope, bounded, with_headers)
        except _TooLarge:
            await _plain(413, "The request is too large.")(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if host not in self._hosts:
            return _plain(421, "This server has another name; see --allow-host.")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return _plain(405, "GET and POST only.")
        if len(scope["path"]) + len(scope["query_string"]) > LONGEST_URL:
            return _plain(414, "The address is too long.")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            return _plain(413, "The request is too large.")
        if not self._is_own_page(headers, host, scope["method"]):
            return _plain(403, "Requests from other sites are refused.")
        return self._token_refusal(scope, headers)

    def _is_own_page(self, headers: Headers, host: str, method: str) -> bool:
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host:
            return False
        site = headers.get("sec-fetch-site", "none")
        # a link from elsewhere may be followed; a request that a foreign page makes may not
        is_navigation = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return site in ("none", "same-origin") or is_navigation

    def _token_refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        token = self._access.token
        if token is None:
            return None
        bearer = headers.get("authorization", "")
        if bearer[:7].lower() == "bearer " and _same(bearer[7:], token):
            return None
        if _same(_cookie(headers.get("cookie", "")), token):
            return None
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["method"] == "GET" and any(k == "token" and _same(v, token) for k, v in pairs):
            rest = urlencode([pair for pair in pairs if pair[0] != "token"])
            # of the address only what stands behind the host: `//elsewhere` would lead away
            path = "/" + scope["raw_path"].decode("latin-1").partition("?")[0].lstrip("/\\")
            answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return answer
        return _plain(401, "This server wants its token: open the address that it printed.")


class _TooLarge(Exception):  # noqa: N818 - never seen by a caller
    """A body grew beyond what is taken."""


def _same(text: str, token: str) -> bool:
    return hmac.compare_digest(text.encode(), token.encode())


def _cookie(text: str) -> str:
    try:
        morsel = SimpleCookie(text).get(COOKIE)
    except CookieError:
        return ""
    return "" if morsel is None else morsel.value


def _plain(status: int, text: str) -> PlainTextResponse:
    return PlainTextResponse(text + "\n", status)
