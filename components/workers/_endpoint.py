"""A client for an OpenAI-compatible chat endpoint, with many requests in flight, a budget and a key that never shows.

The `openai` library sends the requests and repeats those that may succeed later: after connection errors, timeouts and
the statuses 408, 409, 429 and 5xx. It waits as long as the server asks, up to two minutes, or else a growing time. This
module keeps the budget. It also refuses answers that do not follow the protocol, since the library lets them through.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mmemb.common.digests import describe
from mmemb.data.images import load_image
from mmemb.types import Item, Text, Video

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from PIL.Image import Image as PILImage

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """An answer of the endpoint.

    Attributes:
        text: the unchanged text.
        tokens: completion tokens, including reasoning that is not in the text; 0 if the endpoint does not report them.
        finish_reason: the reason as the endpoint names it: ``stop``, ``length``, ``content_filter``...
        model: the model's name as the endpoint gives it, with its fingerprint after an ``@`` if there is one.
    """

    text: str
    tokens: int
    finish_reason: str
    model: str


@dataclass
class Budget:
    """Counts the tokens and the money used, and holds their limits.

    Attributes:
        tokens: maximum number of prompt and completion tokens; None for no limit.
        cost: maximum cost, in the unit of the prices; None for no limit.
        input_price: price of a million prompt tokens.
        output_price: price of a million completion tokens.
        requests: requests answered so far, including damaged answers that were counted.
        prompt_tokens: tokens that the endpoint has read so far.
        completion_tokens: tokens that the endpoint has written so far.
    """

    tokens: int | None
    cost: float | None
    input_price: float
    output_price: float
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def spent(self) -> float:
        """Cost so far, in the unit of the prices."""
        return (self.prompt_tokens * self.input_price + self.completion_tokens * self.output_price) / 1e6

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self.tokens is not None or self.cost is not None

    def count(self, usage: Any) -> None:
        """Adds an answer with the usage that the endpoint reports; None adds no tokens."""
        self.requests += 1
        self.prompt_tokens += int(getattr(usage, "prompt_tokens", 0) or 0)
        self.completion_tokens += int(getattr(usage, "completion_tokens", 0) or 0)

    def excess(self, tokens: int) -> str:
        """The limit, in words, that this number of completion tokens alone would exceed; empty if there is none."""
        if self.tokens is not None and tokens > self.tokens:
            return f"token_budget of {self.tokens:,}"
        if self.cost is not None and tokens * self.output_price / 1e6 > self.cost:
            return f"cost_budget of {self.cost:g}"
        return ""

    def check(self) -> None:
        """Raises an error once a limit is reached.

        Raises:
            ValueError: a limit is reached; the message names the limit and the usage.
        """
        used = self.prompt_tokens + self.completion_tokens
        if self.tokens is not None and used >= self.tokens:
            _stop(f"token_budget of {self.tokens:,} tokens", f"{used:,} tokens in {self.requests} requests")
        if self.cost is not None and self.spent >= self.cost:
            _stop(f"cost_budget of {self.cost:g}", f"{self.spent:.4g} in {self.requests} requests")

    def __str__(self) -> str:
        cost = f", cost {self.spent:.4g}" if self.input_price or self.output_price else ""
        return (
            f"{self.requests} answers, {self.prompt_tokens:,} prompt and {self.completion_tokens:,} "
            f"completion tokens{cost}"
        )


class Refused(Exception):
    """The endpoint refuses this one request, or its answer is not usable; another request may succeed."""


class Endpoint:
    """Asks an OpenAI-compatible chat endpoint.

    Args:
        base_url: address such as ``http://host:8000/v1``; None for the library's (``OPENAI_BASE_URL`` or OpenAI).
        key_variable: environment variable that holds the key; None for an endpoint that needs no key.
        timeout: maximum time for an answer, in seconds.
        retries: number of times that the library repeats a request.
        budget: counts the usage and stops at its limits.
    """

    def __init__(
        self, *, base_url: str | None, key_variable: str | None, timeout: float, retries: int, budget: Budget
    ) -> None:
        self.base_url = base_url
        self.key_variable = key_variable
        self.timeout = timeout
        self.retries = retries
        self.budget = budget

    def run(self, work: Callable[[AsyncOpenAI], Coroutine[Any, Any, T]]) -> T:
        """Runs a coroutine with an open client, also inside a running event loop (as in a notebook).

        Raises:
            ImportError: the client library is not installed.
            ValueError: there is no key, or the endpoint refuses it, the model or the address.
            ConnectionError: the endpoint did not answer after all attempts.
        """
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise ImportError("the openai worker needs the `openai` library: pip install 'mmemb[openai]'") from None
        key = self._key()

        async def inside() -> T:
            client = AsyncOpenAI(api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=self.retries)
            async with client:
                return await work(client)

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(inside())
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, inside()).result()

    async def ask(self, client: AsyncOpenAI, **request: Any) -> Answer:
        """Asks for one answer; `request` holds the arguments of ``chat.completions.create``.

        Raises:
            Refused: the endpoint refuses this request (400, 413, 422), or its answer does not follow the protocol.
            ValueError: a limit of the budget is reached, or the endpoint refuses key, model or address.
            ConnectionError: there was no answer after all attempts.
        """
        import openai

        self.budget.check()
        try:
            return self._read(await client.chat.completions.create(**request))
        except openai.APIStatusError as error:
            what = self._status(error)
            failure: Exception = error
        except openai.APITimeoutError as error:
            what, failure = f"took longer than {self.timeout:g} s", error
        except openai.APIConnectionError as error:
            what, failure = "cannot be reached, or cut the connection", error
        except (_DamagedAnswer, openai.APIResponseValidationError, ValueError) as error:
            if isinstance(error, ValueError) and not _is_decoding(error):
                raise
            raise Refused(f"the answer does not follow the protocol ({self._clean(error)})") from None
        raise self._down(what, failure) from None

    def _status(self, error: APIStatusError) -> str:
        """Describes the state of the endpoint by a status that may change with time.

        Raises:
            Refused: the endpoint will never answer this request.
            ValueError: the endpoint will answer no request at all.
        """
        if error.status_code in (400, 413, 422):
            raise Refused(self._clean(error)) from None
        pause = error.response.headers.get("retry-after")
        asked = f" and asks for a pause ({pause[:50]})" if pause else ""
        if error.status_code == 429:
            return f"limits the rate of requests{asked}"
        if error.status_code in (408, 409) or error.status_code >= 500:
            return f"failed{asked}"
        key = f" and the key in {self.key_variable}" if self.key_variable else " (it was sent no key)"
        raise ValueError(
            f"openai worker: {self._place} refuses the request ({self._clean(error)}); "
            f"check base_url, the model's name{key}"
        ) from None

    def _read(self, completion: Any) -> Answer:
        """Checks an answer. The library does not, so any JSON or text may arrive here."""
        choices, usage = (getattr(completion, name, None) for name in ("choices", "usage"))
        if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
            if usage is not None:
                self.budget.count(usage)  # it is worthless but was paid for
            raise _DamagedAnswer("the answer has no choices")
        if usage is None and self.budget.limited:
            raise _NoUsage(
                f"openai worker: {self._place} does not say how many tokens it used, so a budget cannot be kept; "
                f"remove token_budget and cost_budget, and bound the run by its pairs and max_new_tokens"
            )
        self.budget.count(usage)
        message = choices[0].message
        # Some servers put reasoning into a separate field, and there may be nothing else.
        fields = ("content", "reasoning_content", "reasoning")
        text = next(filter(None, (_text(getattr(message, name, None)) for name in fields)), "")
        fingerprint = getattr(completion, "system_fingerprint", None)
        return Answer(
            text=text,
            tokens=int(getattr(usage, "completion_tokens", 0) or 0),
            finish_reason=str(getattr(choices[0], "finish_reason", None) or "stop"),
            model=_encodable(f"{getattr(completion, 'model', '')}{f'@{fingerprint}' if fingerprint else ''}"),
        )

    def _key(self) -> str:
        if self.key_variable is None:
            return "none"
        key = os.environ.get(self.key_variable, "")
        if not key:
            raise ValueError(
                f"openai worker: the environment variable {self.key_variable} is not set; "
                f"put the endpoint's key there, or set api_key_variable: null for an endpoint that needs no key"
            )
        return key

    @property
    def _place(self) -> str:
        return self._clean(self.base_url or os.environ.get("OPENAI_BASE_URL") or "the OpenAI endpoint")

    def _clean(self, said: object) -> str:
        """A message in one line and without the key, since servers often repeat the key."""
        text = " ".join(str(said).split())
        key = os.environ.get(self.key_variable or "", "")
        return (text.replace(key, "***") if key else text)[:500]  # cut last: half a key would not be recognised

    def _down(self, what: str, error: Exception) -> ConnectionError:
        return ConnectionError(
            f"openai worker: {self._place} {what}, retries: {self.retries} "
            f"({self._clean(error) or type(error).__name__}); "
            f"finished shards are kept; run the same command again when the endpoint is back"
        )


class _DamagedAnswer(Exception):
    """An answer that does not follow the protocol."""


class _NoUsage(ValueError):
    """An answer without a token count, so that a budget cannot be kept."""


def _text(content: Any) -> str:
    """The text of a message. Of a list of parts, the parts of type text are joined.

    Raises:
        _DamagedAnswer: the content is neither a text nor such a list.
    """
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
    else:
        texts = [content]
    if not all(isinstance(text, str) for text in texts):
        raise _DamagedAnswer("the answer's content is not a text")
    return _encodable("".join(texts))


def _encodable(text: str) -> str:
    """Replaces lone surrogates by question marks: JSON may contain them, but UTF-8 (a shard on disk) may not."""
    return text.encode("utf-8", "replace").decode("utf-8")


async def all_of(jobs: Sequence[Callable[[], Awaitable[T]]], *, at_once: int) -> list[T]:
    """Runs coroutines, ``at_once`` at a time, and returns their results in order.

    The first error stops the rest and is raised.
    """
    gate = asyncio.Semaphore(at_once)

    async def gated(job: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await job()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(gated(job)) for job in jobs]
    except BaseExceptionGroup as group_error:
        first: BaseException = group_error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [task.result() for task in tasks]


def message_content(item: Item, *, max_pixels: int) -> str | list[dict[str, Any]]:
    """Turns an item into the content of a chat message: its instruction and its parts in order.

    Pictures and video frames become data URLs.

    Args:
        item: the item.
        max_pixels: largest picture area; a larger picture is shrunk.

    Raises:
        FileNotFoundError: a picture's file does not exist.
        ValueError: a picture cannot be read.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": item.instruction}] if item.instruction else []
    for part in item.parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
            continue
        for source in part.frames if isinstance(part, Video) else (part.source,):
            try:
                url = data_url(source, max_pixels=max_pixels)
            except ValueError as error:
                raise ValueError(f"openai worker: the item {describe(item)!r}: {error}") from None
            content.append({"type": "image_url", "image_url": {"url": url}})
    if all(entry["type"] == "text" for entry in content):  # every endpoint understands plain text
        return "\n".join(entry["text"] for entry in content)
    return content


def data_url(source: str | PILImage, *, max_pixels: int) -> str:
    """A picture as ``data:image/jpeg;base64,...``: upright, RGB, shrunk to the maximum area, hardly compressed."""
    picture = load_image(source)
    area = picture.width * picture.height
    if area > max_pixels:
        factor = math.sqrt(max_pixels / area)
        picture = picture.resize((max(1, int(picture.width * factor)), max(1, int(picture.height * factor))))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _is_decoding(error: ValueError) -> bool:
    """Whether the error says that the body of an answer is not JSON, or not text."""
    return isinstance(error, UnicodeDecodeError) or type(error).__name__ == "JSONDecodeError"


def _stop(limit: str, used: str) -> NoReturn:
    raise ValueError(
        f"openai worker: the {limit} is used up ({used}); finished shards are kept; "
        f"run the same command again to continue with a full budget"
    )
