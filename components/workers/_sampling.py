"""Sampling for workers with a local model: seeds by content, one prefill per item, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmemb.common.checks import check_numbers
from mmemb.common.digests import item_digest, item_key, module_digest, seed_of
from mmemb.inference.adaptive import sample
from mmemb.inference.encoder import evaluating
from mmemb.interfaces import Backbone
from mmemb.types import Item, Rationale


def sample_rationales(
    backbone: Backbone,
    prompts: Sequence[Item],
    k: int,
    *,
    worker: str,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    think: bool,
) -> list[list[Rationale]]:
    """Samples at most k rationales for each prompt; a sample's seed depends on its prompt's content and its number.

    Batches are cut from all samples in order of length. Equal texts of one prompt are merged (the first stays) and
    empty ones are dropped, so fewer than k may be left.

    Args:
        backbone: the model; its training mode is restored.
        prompts: B prompts. Equal prompts are asked once and share their rationales.
        k: number of samples per prompt.
        worker: short name, for the provenance.
        seed: seed from which every sample's seed is derived.
        temperature: temperature of the sampling.
        max_new_tokens: maximum length of a rationale, in tokens.
        batch_size: number of sequences that are decoded at once.
        think: whether the model must write between ``<think>`` and ``</think>``.
    """
    keys = [item_key(prompt) for prompt in prompts]
    distinct = dict(zip(keys, prompts, strict=True))
    digests = [item_digest(prompt) for prompt in distinct.values()]  # the place on disk changes no sample
    seeds = [seed_of(seed, content, number) for content in digests for number in range(k)]
    with evaluating(backbone):
        samples = sample(
            backbone,
            [prompt for prompt in distinct.values() for _ in range(k)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seeds,
            batch_size=batch_size,
            think=think,
        )
    written: list[dict[str, Rationale]] = [{} for _ in distinct]
    for row, (drawn, row_seed) in enumerate(zip(samples, seeds, strict=True)):
        if drawn.text:
            rationale = Rationale(
                text=drawn.text,
                worker=worker,
                model=backbone.identity,
                seed=row_seed,
                tokens=drawn.tokens,
                finish_reason=drawn.finish_reason,
                prompt_hash=digests[row // k],
            )
            written[row // k].setdefault(drawn.text, rationale)
    found = dict(zip(distinct, written, strict=True))
    return [list(found[key].values()) for key in keys]


def model_settings(backbone: Backbone) -> dict[str, Any]:
    """The model's identity, a probe of its weights, and the limits on what it sees of an item."""
    return {"model": backbone.identity, "weights": module_digest(backbone), **backbone.prompt_settings}


def check_sampling(worker: str, *, temperature: float, max_new_tokens: int, batch_size: int) -> None:
    """Checks that the settings are within their ranges.

    Raises:
        ValueError: a setting is outside its range.
    """
    check_numbers(f"workers.{worker}", above=0, temperature=temperature)  # at 0 all samples would be equal
    check_numbers(f"workers.{worker}", at_least=1, max_new_tokens=max_new_tokens, batch_size=batch_size)
