"""JSON over HTTP: retries, errors in one sentence, and a key that stays in the environment."""

from __future__ import annotations

import json
import os
import time
from email.message import Message
from http.client import HTTPException
from json import JSONDecodeError
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tpmm_pl.types import InputError, RunError

_AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""Statuses of a server that may answer later."""


class Endpoints:
    """Servers of one kind; what one of them fails to answer, the next is asked.

    The key is read from the environment when a request is made: it is in no attribute, and in no
    sentence either.

    Args:
        urls: Of the servers, as ``http://node1:8000``.
        api_key_env: Name of the environment variable that holds their key.
        timeout: Seconds a request may take.
        attempts: How often a request is made before the run ends.
        backoff: Seconds before the second attempt; twice as many before each further one.

    Raises:
        InputError: If there is no URL, or one that is none or holds a password.
    """

    def __init__(
        self,
        urls: list[str],
        api_key_env: str | None,
        timeout: float,
        attempts: int,
        backoff: float,
    ) -> None:
        if not urls or attempts < 1:
            raise InputError(f"urls is {urls} and attempts {attempts}; give at least one of each")
        for url in urls:
            parts = urlsplit(url)
            if parts.password or parts.username:
                raise InputError(
                    f"a URL of {parts.hostname} holds a password; put the key into an environment"
                    " variable and give its name as api_key_env"
                )
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise InputError(f"{url} is no URL of a server; write it as http://node1:8000")
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.api_key_env = api_key_env
        self.timeout = timeout
        self.attempts = attempts
        self.backoff = backoff

    def ask(self, path: str, body: Any = None, *, first: int = 0) -> Any:
        """Ask one server after the other, beginning with the ``first``, until one answers.

        Args:
            path: As ``/v1/models``.
            body: Sent as JSON by POST; ``None`` is a GET.
            first: Number of the server, counted on from the end.

        Returns:
            The JSON that is answered, ``None`` for an empty answer.

        Raises:
            InputError: If a server refuses the request.
            RunError: If none answers.
        """
        urls = [self.urls[(first + n) % len(self.urls)] for n in range(self.attempts)]
        return self._ask(urls, path, body)

    def ask_each(self, path: str, body: Any) -> None:
        """Ask every server the same."""
        for url in self.urls:
            self._ask([url] * self.attempts, path, body)

    def _ask(self, urls: list[str], path: str, body: Any) -> Any:
        reason = ""
        for attempt, url in enumerate(urls):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                return self._send(url + path, body)
            except HTTPError as error:
                reason = f"{url}{path} answers {error.code} {error.reason}"
                if error.code not in _AGAIN:
                    sentence = f"{reason}; {self._way_out(error)}"
                    raise InputError(self._without_key(sentence)) from None
            except (OSError, HTTPException, JSONDecodeError, UnicodeDecodeError) as error:
                reason = f"{url}{path} does not answer ({type(error).__name__}: {error})"
        raise RunError(
            f"{self._without_key(reason)}, after {len(urls)} attempts; see to the server, then go"
            " on with --ckpt_path last"
        )

    def _send(self, url: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if (key := self._key()) is not None:
            headers["Authorization"] = f"Bearer {key}"
        with _OPENER.open(Request(url, data, headers), timeout=self.timeout) as answer:
            content = answer.read()
        return json.loads(content) if content.strip() else None

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        # http.client would quote a header that it refuses
        if not key or not key.isascii() or not key.isprintable():
            raise InputError(
                f"the environment variable {self.api_key_env} holds no key; set it to the server's,"
                " or leave api_key_env out"
            )
        return key

    def _way_out(self, error: HTTPError) -> str:
        if error.code in (401, 403):
            name = self.api_key_env or "of a name given as api_key_env"
            return f"put the server's key into the environment variable {name}"
        if error.code == 404:
            return "check the URL, and start vLLM with VLLM_SERVER_DEV_MODE=1"
        said = " ".join(error.read(500).decode(errors="replace").split())
        return f"it says: {said}"

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.api_key_env or "", "").strip()
        return text.replace(key, "***") if key else text


class _NoRedirects(HTTPRedirectHandler):
    """Leaves a redirect unfollowed: the key would go along, wherever it leads."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


_OPENER = build_opener(_NoRedirects)
