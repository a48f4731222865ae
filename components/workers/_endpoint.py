"""A client of an OpenAI-compatible chat endpoint: many requests in flight, a budget, and a key that is never shown.

The `openai` library sends the requests and repeats those that may succeed later: after connection errors, timeouts and
the statuses 408, 409, 429 and 5xx. It waits as long as the server asks, up to two minutes, or else a growing time. Here
the budget is kept, and answers that do not follow the protocol are refused: the library passes them through.
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
    """What the endpoint wrote.

    Attributes:
        text: as it came.
        tokens: completion tokens, thoughts that are not in the text included; 0 where the endpoint does not say.
        finish_reason: the endpoint's word for it: ``stop``, ``length``, ``content_filter``...
        model: the model's name by the endpoint, and its fingerprint after an ``@`` if there is one.
    """

    text: str
    tokens: int
    finish_reason: str
    model: str


@dataclass
class Budget:
    """What was used, and how much may be.

    Attributes:
        tokens: most prompt and completion tokens; None: no limit.
        cost: most money, in the unit of the prices; None: no limit.
        input_price: of a million prompt tokens.
        output_price: of a million completion tokens.
        requests: answered so far, damaged answers that were counted included.
        prompt_tokens: read by the endpoint so far.
        completion_tokens: written by it so far.
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
        """Money so far."""
        return (self.prompt_tokens * self.input_price + self.completion_tokens * self.output_price) / 1e6

    @property
    def limited(self) -> bool:
        """Whether there is a limit to keep."""
        return self.tokens is not None or self.cost is not None

    def count(self, usage: Any) -> None:
        """Adds an answer by what the endpoint says that it used; None adds no tokens."""
        self.requests += 1
        self.prompt_tokens += int(getattr(usage, "prompt_tokens", 0) or 0)
        self.completion_tokens += int(getattr(usage, "completion_tokens", 0) or 0)

    def excess(self, tokens: int) -> str:
        """The limit that so many completion tokens alone would exceed, in words; empty if none."""
        if self.tokens is not None and tokens > self.tokens:
            return f"token_budget of {self.tokens:,}"
        if self.cost is not None and tokens * self.output_price / 1e6 > self.cost:
            return f"cost_budget of {self.cost:g}"
        return ""

    def check(self) -> None:
        """Refuses to go on once a limit is reached.

        Raises:
            ValueError: names the limit and what was used.
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
        base_url: as in ``http://host:8000/v1``; None: the library's (``OPENAI_BASE_URL`` or OpenAI itself).
        key_variable: environment variable that holds the key; None for an endpoint that wants none.
        timeout: seconds an answer may take.
        retries: further attempts of a request by the library.
        budget: counts what is used and stops at its limits.
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
        """Runs a coroutine with an open client, also from within a running event loop (a notebook's).

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
        """One answer; `request` holds the arguments of ``chat.completions.create``.

        Raises:
            Refused: the endpoint refuses this request (400, 413, 422), or its answer does not follow the protocol.
            ValueError: a limit of the budget is reached, or the endpoint refuses key, model or address.
            ConnectionError: no answer after all attempts.
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
            raise Refused(f"no proper answer ({self._clean(error)})") from None
        raise self._down(what, failure) from None

    def _status(self, error: APIStatusError) -> str:
        """What a status that may change with time says about the endpoint.

        Raises:
            Refused: the endpoint will never answer the request.
            ValueError: it will answer no request.
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
        """Checks an answer, which the library does not: any JSON, or text, may come."""
        choices, usage = (getattr(completion, name, None) for name in ("choices", "usage"))
        if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
            if usage is not None:
                self.budget.count(usage)  # worthless, and paid for
            raise _DamagedAnswer("an answer without choices")
        if usage is None and self.budget.limited:
            raise _NoUsage(
                f"openai worker: {self._place} does not say how many tokens it used, so a budget cannot be kept; "
                f"leave token_budget and cost_budget out, or bound the run by its pairs and max_new_tokens"
            )
        self.budget.count(usage)
        message = choices[0].message
        # Servers that tell thoughts from the answer put them into a field of their own; it is all there may be.
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
                f"put the endpoint's key there, or say api_key_variable: null for an endpoint that wants none"
            )
        return key

    @property
    def _place(self) -> str:
        return self._clean(self.base_url or os.environ.get("OPENAI_BASE_URL") or "the OpenAI endpoint")

    def _clean(self, said: object) -> str:
        """What was said, in one line, without the key: servers like to repeat it."""
        text = " ".join(str(said).split())
        key = os.environ.get(self.key_variable or "", "")
        return (text.replace(key, "***") if key else text)[:500]  # cut last: half a key is one to be seen

    def _down(self, what: str, error: Exception) -> ConnectionError:
        return ConnectionError(
            f"openai worker: {self._place} {what}, retries: {self.retries} "
            f"({self._clean(error) or type(error).__name__}); "
            f"finished shards are kept: run the same command again when it is back"
        )


class _DamagedAnswer(Exception):
    """An answer that is not what the protocol says."""


class _NoUsage(ValueError):
    """An answer that cannot be counted against a budget."""


def _text(content: Any) -> str:
    """A message's text, which may come as a list of parts: those of type text, joined.

    Raises:
        _DamagedAnswer: it is neither a text nor such a list.
    """
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
    else:
        texts = [content]
    if not all(isinstance(text, str) for text in texts):
        raise _DamagedAnswer("an answer whose text is none")
    return _encodable("".join(texts))


def _encodable(text: str) -> str:
    """Lone surrogates, which JSON may hold and UTF-8 (a shard on disk) may not, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


async def all_of(jobs: Sequence[Callable[[], Awaitable[T]]], *, at_once: int) -> list[T]:
    """The results of many coroutines in order, so many at a time; the first error stops the rest and is raised."""
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
    """An item as the content of a chat message: instruction and parts in order, pictures and video frames as data URLs.

    Args:
        item: the item.
        max_pixels: largest picture area; a larger one is shrunk.

    Raises:
        FileNotFoundError: a picture is not there.
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
    if all(entry["type"] == "text" for entry in content):  # a plain text is understood by every endpoint
        return "\n".join(entry["text"] for entry in content)
    return content


def data_url(source: str | PILImage, *, max_pixels: int) -> str:
    """A picture as ``data:image/jpeg;base64,...``: upright, RGB, shrunk to an area, hardly compressed."""
    picture = load_image(source)
    area = picture.width * picture.height
    if area > max_pixels:
        factor = math.sqrt(max_pixels / area)
        picture = picture.resize((max(1, int(picture.width * factor)), max(1, int(picture.height * factor))))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _is_decoding(error: ValueError) -> bool:
    """Whether the body of an answer was no JSON, or no text at all."""
    return isinstance(error, UnicodeDecodeError) or type(error).__name__ == "JSONDecodeError"


def _stop(limit: str, used: str) -> NoReturn:
    raise ValueError(
        f"openai worker: the {limit} is used up ({used}); finished shards are kept: "
        f"run the same command again to go on, with as much again"
    )
