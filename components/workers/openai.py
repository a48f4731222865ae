"""The worker whose rationales come from an OpenAI-compatible chat endpoint: vLLM, SGLang or a hosted model."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mmemb.common.checks import check_numbers
from mmemb.common.digests import describe, item_digest, item_key, seed_of
from mmemb.interfaces import Worker
from mmemb.types import Item, Rationale

from ._endpoint import Answer, Budget, Endpoint, Refused, all_of, message_content
from ._prompts import REQUEST, asked, thought

if TYPE_CHECKING:
    from openai import AsyncOpenAI


class OpenAIWorker(Worker, name="openai"):
    """Samples rationales from an OpenAI-compatible chat endpoint, with many requests in flight.

    Pictures and video frames are sent as data URLs. Every sample is a separate request with its own seed, so an
    endpoint that respects seeds can reproduce it. Servers with a prefix cache read the prompt once.

    The library `openai` repeats a request after a temporary failure (429, 5xx, timeouts, cut connections). It waits as
    long as the endpoint asks, up to two minutes, or else a growing time. A request that the endpoint refuses for its
    content, such as a picture that is too large, gives no candidate and a warning. So does an answer that does not
    follow the protocol. Every run begins with its full budget.

    The key comes from the environment and is written nowhere. The worker needs the library `openai` (``pip install
    'mmemb[openai]'``).

    Args:
        model: the model's name at the endpoint.
        base_url: address such as ``http://host:8000/v1``; null for the environment's ``OPENAI_BASE_URL`` or OpenAI.
        api_key_variable: the environment variable that holds the key; null for an endpoint that needs no key.
        instruction: the request that follows the item.
        temperature: temperature of the sampling.
        top_p: share of the probability mass that is sampled from.
        max_new_tokens: maximum length of an answer, in tokens, including the reasoning of models that reason first.
        limit_name: the endpoint's name for that limit; OpenAI's newer models accept only `max_completion_tokens`.
        extra_body: further fields of each request, as the endpoint defines them.
        max_pixels: largest picture area; a larger picture is shrunk.
        concurrency: number of requests in flight.
        timeout: maximum time for an answer, in seconds.
        retries: number of times that a request is repeated.
        token_budget: maximum number of prompt and completion tokens in one run of the program; null for no limit. The
            run stops there, but requests in flight may exceed it.
        cost_budget: maximum cost of one run, in the unit of the prices; null for no limit.
        input_price: price of a million prompt tokens.
        output_price: price of a million completion tokens.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_variable: str | None = "OPENAI_API_KEY",
        instruction: str = REQUEST,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 128,
        limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        extra_body: dict[str, Any] | None = None,
        max_pixels: int = 1_048_576,
        concurrency: int = 32,
        timeout: float = 120.0,
        retries: int = 6,
        token_budget: int | None = None,
        cost_budget: float | None = None,
        input_price: float = 0.0,
        output_price: float = 0.0,
    ) -> None:
        check_numbers(
            "workers.openai",
            at_least=0,
            temperature=temperature,
            retries=retries,
            token_budget=token_budget,
            cost_budget=cost_budget,
            input_price=input_price,
            output_price=output_price,
        )
        check_numbers(
            "workers.openai", at_least=1, max_new_tokens=max_new_tokens, max_pixels=max_pixels, concurrency=concurrency
        )
        check_numbers("workers.openai", above=0, timeout=timeout)
        check_numbers("workers.openai", above=0, at_most=1, top_p=top_p)
        given = base_url is not None
        name, address = ("base_url", base_url) if given else ("OPENAI_BASE_URL", os.environ.get("OPENAI_BASE_URL"))
        if address and not address.startswith(("http://", "https://")):
            raise ValueError(
                f"openai worker: {name} is {address!r}; give an address that begins with http:// or https://, "
                f"as in http://{address.rpartition('://')[2]}"
            )
        if cost_budget is not None and not (input_price or output_price):
            raise ValueError("openai worker: cost_budget needs input_price and output_price, both per million tokens")
        self.model = model
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens
        self.max_pixels = max_pixels
        self.concurrency = concurrency
        self.budget = Budget(token_budget, cost_budget, input_price, output_price)
        self._endpoint = Endpoint(
            base_url=base_url, key_variable=api_key_variable, timeout=timeout, retries=retries, budget=self.budget
        )
        self._may_warn = self.budget.limited
        # These last as long as the worker, since a call may hold only one item (shard_size 1). Each change is atomic
        # and none is undone, so neither tasks nor threads can lose a change.
        self._answered = False
        self._refused: set[Hashable] = set()
        self._sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        self._extra = dict(extra_body or {})
        self._request = {"model": model, "temperature": temperature, "top_p": top_p, limit_name: max_new_tokens}

    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        """See `Worker.propose`. A sample's seed depends on its prompt's content and its number. Equal texts are merged.

        Raises:
            ImportError: the client library is not installed.
            ValueError: there is no key, the endpoint refuses key, model or every request, or the budget is used up.
            ConnectionError: the endpoint is still down after all attempts.
        """
        prompts = [asked(item, self.instruction) for item in items]
        keys = [item_key(prompt) for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        digests = {key: item_digest(prompt) for key, prompt in distinct.items()}  # seeds do not depend on the disk
        seeds = {key: [_request_seed(seed, content, number) for number in range(k)] for key, content in digests.items()}
        if not distinct or not k:
            return [[] for _ in items]
        self._compare_with_budget(len(distinct) * k)
        found = self._endpoint.run(lambda client: self._ask_all(client, distinct, seeds))
        rationales = dict(zip(distinct, map(self._rationales, digests.values(), found, seeds.values()), strict=True))
        self._report_refused(distinct, found)
        return [rationales[key] for key in keys]

    @property
    def settings(self) -> dict[str, Any]:
        """Model, prompt and sampling settings, without the endpoint's address, since a server may move."""
        return {
            "worker": self.name,
            "model": self.model,
            "instruction": self.instruction,
            **self._sampling,
            "max_pixels": self.max_pixels,
            "extra_body": self._extra,
        }

    @property
    def report(self) -> str:
        """The number of answers so far, with their tokens and cost."""
        return f"{self.name} ({self.model}): {self.budget}"

    async def _ask_all(
        self, client: AsyncOpenAI, prompts: dict[Hashable, Item], seeds: dict[Hashable, list[int]]
    ) -> list[list[Answer | Refused]]:
        """Asks for k answers per prompt. Prompts are encoded only for the requests in flight."""
        gate = asyncio.Semaphore(self.concurrency)

        async def one(content: Any, seed: int) -> Answer | Refused:
            async with gate:
                try:
                    answer = await self._endpoint.ask(
                        client,
                        messages=[{"role": "user", "content": content}],
                        seed=seed,
                        extra_body=self._extra or None,
                        **self._request,
                    )
                except Refused as refusal:
                    return refusal
            self._answered = True  # set here, since a call that ends with an error may have had answers
            return answer

        async def of_prompt(key: Hashable) -> list[Answer | Refused]:
            content = await asyncio.to_thread(message_content, prompts[key], max_pixels=self.max_pixels)
            jobs = [partial(one, content, each) for each in seeds[key]]
            return await all_of(jobs, at_once=len(jobs))

        return await all_of([partial(of_prompt, key) for key in prompts], at_once=self.concurrency)

    def _rationales(self, prompt: str, answers: Sequence[Answer | Refused], seeds: Sequence[int]) -> list[Rationale]:
        texts: dict[str, Rationale] = {}
        for answer, seed in zip(answers, seeds, strict=True):
            if isinstance(answer, Refused) or answer.finish_reason == "content_filter":
                continue
            if text := thought(answer.text):
                rationale = Rationale(
                    text=text,
                    worker=self.name,
                    model=answer.model or self.model,
                    seed=seed,
                    tokens=answer.tokens,
                    finish_reason="length" if answer.finish_reason == "length" else "stop",
                    prompt_hash=prompt,
                )
                texts.setdefault(text, rationale)
        return list(texts.values())

    def _compare_with_budget(self, requests: int) -> None:
        """Warns before the first request if one call (a shard) may use up the budget and leave nothing on disk."""
        tokens = requests * self.max_new_tokens
        if self._may_warn and (limit := self.budget.excess(tokens)):
            warnings.warn(
                f"openai worker: the {requests:,} requests of one shard may write {tokens:,} tokens, more than the "
                f"{limit} allows. A run that the budget stops keeps only finished shards; "
                f"set a smaller pool.shard_size or raise the budget",
                stacklevel=3,
            )
        self._may_warn = False

    def _report_refused(self, prompts: dict[Hashable, Item], found: Sequence[Sequence[Answer | Refused]]) -> None:
        """Warns once about refused requests.

        Once several items were refused, in any calls, and none was ever answered, this is an error. One refused item
        alone is not an error: a pool must be completed even if its last shard holds only that item.
        """
        refused = [
            (key, answer)
            for key, answers in zip(prompts, found, strict=True)
            for answer in answers
            if isinstance(answer, Refused)
        ]
        if not refused:
            return
        first, refusal = refused[0]
        count = sum(map(len, found))
        share = f"{len(refused)} of {count} requests were refused"
        text = f"openai worker: {share}; the first was for {describe(prompts[first])!r}: {refusal}"
        if not self._answered:  # after the first answer the items, which may be many, are not needed
            self._refused.update(key for key, _ in refused)
            if (items := len(self._refused)) > 1:
                raise ValueError(
                    f"{text}; none of {items} items was answered so far. Check the model's name and its input limits"
                )
        warnings.warn(f"{text}; refused requests give no candidates", stacklevel=3)


def _request_seed(seed: int, prompt: str, number: int) -> int:
    """The seed of one request, with 31 bits, which every endpoint accepts."""
    return seed_of(seed, prompt, number) >> 32
