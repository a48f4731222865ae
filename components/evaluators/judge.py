"""The evaluator that asks a vision-language model whether query and target match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmemb.common.digests import module_digest
from mmemb.inference.shared_prompts import last_states
from mmemb.interfaces import Backbone, Evaluator, SetupContext
from mmemb.types import Item, Pair, Text

_SLOT = "{rationale}"


class JudgeEvaluator(Evaluator, name="judge"):
    """Scores a pair by the log-odds of yes against no when a vision-language model judges whether it matches.

    Summaries of MMEmb-R1 (arXiv 2604.06156) report such a judge. The model reads the query, the target, the question
    and the beginning of an answer, which contains the rationale if there is one:

        c(q, t | r) = logit(yes | q, t, question, reasoning(r), answer) - logit(no | the same)

    Every arm ends in the same words, so arms differ only in the rationale. Query and target, with their pictures, are
    encoded once for all arms of a pair.

    Args:
        backbone: the judge; null for the model in training (useful only if that model can judge).
        question: question that follows query and target.
        reasoning: text that puts a rationale into the answer; ``{rationale}`` is replaced by it.
        answer: the last words before yes or no.
        yes: the word for yes as it would continue ``answer``, leading blank included; one token of the judge.
        no: the word for no, in the same form.
        batch_size: rows per forward pass.

    Raises:
        ValueError: ``yes`` or ``no`` is not a single token of the judge, or ``reasoning`` has no place for the
            rationale.
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        question: str = "Does the candidate match the query? Answer Yes or No.",
        reasoning: str = "Reasoning: {rationale}\n",
        answer: str = "Answer:",
        yes: str = " Yes",
        no: str = " No",
        batch_size: int = 32,
    ) -> None:
        if reasoning.count(_SLOT) != 1:
            raise ValueError(f"judge evaluator: reasoning is {reasoning!r}; it must contain {_SLOT} exactly once")
        self.backbone = backbone
        self.question = question
        self.reasoning = reasoning
        self.answer = answer
        self.yes = yes
        self.no = no
        self.batch_size = batch_size
        self._is_own = backbone is not None
        self._device: torch.device | None = None  # where a separate judge scores; None: where it is now
        if backbone is not None:
            self._answer_ids(backbone)

    def setup(self, context: SetupContext) -> None:
        """Gives the evaluator the model in training. A separate judge moves to that model's device to score.

        A judge looks at one pair at a time, so it needs no negatives.

        Raises:
            ValueError: ``yes`` or ``no`` is not a single token of the model.
        """
        if context.model is None:
            return
        backbone = context.model.backbone
        if not self._is_own:
            self._answer_ids(backbone)
            self.backbone = backbone
        else:
            self._device = backbone.device

    def score(self, pairs: Sequence[Pair], rationales: Sequence[str | None]) -> list[float]:
        """See `Evaluator.score`.

        Raises:
            ValueError: there is no model yet.
        """
        backbone = self._bound()
        if not pairs:
            return []
        if self._device is not None:
            backbone.to(self._device)
        asked = {id(pair): self._prompt(pair) for pair in pairs}
        before, after = (backbone.tokenize(piece) for piece in self.reasoning.split(_SLOT))
        last = backbone.tokenize(self.answer)
        longest = backbone.max_rationale_tokens
        written = {text: backbone.tokenize(text)[:longest] for text in rationales if text is not None}
        states = last_states(
            backbone,
            [asked[id(pair)] for pair in pairs],
            [last if text is None else [*before, *written[text], *after, *last] for text in rationales],
            batch_size=self.batch_size,
        )
        ids = torch.tensor(self._answer_ids(backbone), device=states.device)
        scores: list[float] = []
        with torch.no_grad():
            for some in states.split(self.batch_size):  # the vocabulary is large, so not all logits at once
                logits = backbone.logits(some)[:, ids].double()
                scores += (logits[:, 0] - logits[:, 1]).tolist()
        return scores

    @property
    def settings(self) -> dict[str, Any]:
        """The judge's identity, a probe of its weights, its limits and its prompt."""
        backbone = self._bound()
        return {
            "judge": backbone.identity,
            "weights": module_digest(backbone),
            "max_rationale_tokens": backbone.max_rationale_tokens,
            **backbone.prompt_settings,
            "question": self.question,
            "reasoning": self.reasoning,
            "answer": self.answer,
            "yes": self.yes,
            "no": self.no,
        }

    def release(self) -> None:
        """Moves a separate judge to the CPU until the next score. It was passed as an object, so it cannot be reloaded.

        A quantised judge stays, because its layers are packed for their device.
        """
        if self._device is not None and not getattr(getattr(self.backbone, "model", None), "is_quantized", False):
            self._bound().to("cpu")

    def _bound(self) -> Backbone:
        if self.backbone is None:
            raise ValueError(
                "judge evaluator: no model yet; pass backbone=, or call setup with the model in training first"
            )
        return self.backbone

    def _answer_ids(self, backbone: Backbone) -> list[int]:
        """Token ids of yes and no."""
        found = []
        for key, word in (("yes", self.yes), ("no", self.no)):
            ids = backbone.tokenize(word)
            if len(ids) != 1:
                pieces = ", ".join(repr(backbone.decode([each])) for each in ids) or "nothing"
                raise ValueError(
                    f"judge evaluator: {key} is {word!r}, which is {len(ids)} tokens of {backbone.identity} "
                    f"({pieces}); expected one token: set yes and no to words that are single tokens of this model"
                )
            found += ids
        if found[0] == found[1]:
            raise ValueError(f"judge evaluator: yes {self.yes!r} and no {self.no!r} are the same token; set two words")
        if not backbone.tokenize(self.answer):
            raise ValueError(f"judge evaluator: answer is {self.answer!r}, which gives no token; give at least a word")
        return found

    def _prompt(self, pair: Pair) -> Item:
        query, target = pair.query, pair.positive
        begin = (Text(f"Query: {query.instruction}\n"), *query.parts)
        middle = (Text(f"\nCandidate: {target.instruction}".rstrip() + "\n"), *target.parts)
        return Item("", (*begin, *middle, Text(f"\n{self.question}")))
