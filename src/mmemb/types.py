"""Defines the data structures that the packages of mmemb exchange.

The module is cheap to import: it imports torch for type checking only.

Shape legend, used in every docstring of the project:
    B rows of a batch   N queries   M candidates   K rationale candidates per pair
    T tokens            H hidden width            D embedding width            V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as PILImage
    from torch import Tensor

THINK, END_THINK, EMB = "<think>", "</think>", "<emb>"
"""The special tokens that every backbone has.

They mark the decision to reason, the end of the rationale, and the position where the embedding is read.
"""
NO_LIMIT = 2**63 - 1
"""The budget in a `Decision` when the controller sets none: the largest int64, above every budget of an encoder."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture: an absolute path, a ``bundled:`` name or a PIL image. It is decoded only when a backbone needs it."""

    source: str | PILImage


@dataclass(frozen=True, slots=True)
class Video:
    """The frames of a video in order. Each frame is a source as in `Image`."""

    frames: tuple[str | PILImage, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """A document page as a picture. It has its own type because pages need more pixels than an `Image`."""

    source: str | PILImage


Part: TypeAlias = Text | Image | Video | Page


@dataclass(frozen=True, slots=True)
class Item:
    """An input to embed: an instruction and ordered parts.

    Attributes:
        instruction: the task in words. It may be empty.
        parts: the content in reading order, at least one part.
        fields: extra row fields by name, for the templates of the ``metadata`` worker. The fields of a query never
            describe its target beyond what the query itself determines.
    """

    instruction: str
    parts: tuple[Part, ...]
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text parts joined by a space, without the instruction."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and the target that it should find.

    Attributes:
        id: unique within its data set.
        task: name of the task. Batches consist of sub-batches of one task.
        query: the query item.
        positive: the target item.
        positive_id: identity of the target. Pairs with equal ids share a target, so neither is the other's negative.
        hard_negatives: further candidates that are known to be wrong.
        hard_negative_ids: one identity for each hard negative.
        ranked_alone: whether evaluation ranks the query only against its positive and its hard negatives, and not
            against the candidates of other queries.
    """

    id: str
    task: str
    query: Item
    positive: Item
    positive_id: str
    hard_negatives: tuple[Item, ...] = ()
    hard_negative_ids: tuple[str, ...] = ()
    ranked_alone: bool = False


@dataclass(frozen=True, slots=True)
class Rationale:
    """A rationale and where it came from.

    Attributes:
        text: the rationale itself.
        worker: short name of the worker that wrote it.
        model: model id and revision, as in ``name@revision``. Empty for templates.
        seed: sampling seed, or -1 if nothing was sampled.
        tokens: length in the model's own tokens, or 0 if unknown.
        finish_reason: ``stop``, ``length`` or ``template``.
        prompt_hash: digest of the prompt that the model got, or of the template. Empty if unknown.
        corruption: how the ``corrupting`` worker damaged the text. Empty if it did not.
        leaks: kinds of leak from the target that `mmemb.rationales.leaks` found in the text (``verbatim``,
            ``near_duplicate``, ``field``).
    """

    text: str
    worker: str = ""
    model: str = ""
    seed: int = -1
    tokens: int = 0
    finish_reason: str = "stop"
    prompt_hash: str = ""
    corruption: str = ""
    leaks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidates:
    """The rationale candidates of one pair, as a selector sees them.

    Attributes:
        pair_id: the pair.
        rationales: K candidates.
        scores: ``c(q, t | do(r))`` for each candidate: K floats, log-probabilities. NaN means not scored.
        score_none: ``c(q, t | do(none))``, the score without a rationale. NaN means not scored.
        scores_placebo: ``c(q, t | do(another pair's rationale))`` for each candidate: K floats, or empty.
    """

    pair_id: str
    rationales: tuple[Rationale, ...]
    scores: tuple[float, ...] = ()
    score_none: float = float("nan")
    scores_placebo: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Selection:
    """The choice of a selector: the index of a candidate and its weight in the loss.

    If the index is None, only the direct path is trained.
    """

    index: int | None
    weight: float = 1.0


@dataclass
class ModelInputs:
    """The input of a backbone's forward pass, made by `Backbone.prepare`. Rows are left-padded.

    Attributes:
        tensors: keyword arguments of the model: ``input_ids`` [B, T] int64, ``attention_mask`` [B, T] int64, and the
            picture tensors of the model family.
        emb_position: [B] int64, column of ``<emb>``, or -1 for a prompt without it.
        labels: [B, T] int64, the token id at every position that the model itself should write, and -100 elsewhere.
            The model should write the decision, the rationale, ``</think>`` and ``<emb>``, or a response. Labels are
            not shifted: the state at t - 1 predicts the label at t.
    """

    tensors: dict[str, Tensor]
    emb_position: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.tensors["input_ids"].shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ModelInputs:
        """Moves every tensor and returns a new object."""
        return ModelInputs(
            tensors={key: value.to(device, non_blocking=non_blocking) for key, value in self.tensors.items()},
            emb_position=self.emb_position.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )


@dataclass
class PrefillState:
    """What is known about B queries after one prefill. A controller sees nothing else.

    Attributes:
        decision_logits: [B, 2] float, logits of ``<think>`` and ``<emb>`` after the prompt.
        direct: [B, D] float, normalised direct embeddings.
        confidence: [B] float in [0, 1], the largest softmax probability of the direct embedding over the confidence
            bank. None without a bank.
        utility: [B] float, ``s_r - s_d``. Known in evaluation only, otherwise None.
        hit_gain: [B] float in [-1, 1], the change in hit@1 that the row's own rationale brings. None where ``utility``
            is None.
        tokens: [B] int64, length of that rationale, including ``<think>`` and ``</think>``. None where ``utility`` is
            None.
        weight: [B] float, how much each row counts in a fit. None: all rows count the same.
    """

    decision_logits: Tensor
    direct: Tensor
    confidence: Tensor | None = None
    utility: Tensor | None = None
    hit_gain: Tensor | None = None
    tokens: Tensor | None = None
    weight: Tensor | None = None

    @property
    def margin(self) -> Tensor:
        """How much the model prefers ``<think>`` to ``<emb>``: the difference of the decision logits [B], in nats."""
        return self.decision_logits[:, 0].float() - self.decision_logits[:, 1].float()


@dataclass
class Decision:
    """A controller's decision for B queries.

    Attributes:
        think: [B] bool, whether the row reasons.
        probability: [B] float, probability (or degree) of reasoning, for reports.
        budget: [B] int64, maximum number of rationale tokens for each row. `NO_LIMIT` if only the encoder's own budget
            applies, 0 if the row skips reasoning.
    """

    think: Tensor
    probability: Tensor
    budget: Tensor


@dataclass
class Encoded:
    """Embeddings of B items, and the rationales that the model wrote for them.

    Attributes:
        embedding: [B, D] float32, normalised, on the CPU.
        thought: [B] bool, whether the model reasoned about the row.
        probability: [B] float, the controller's probability of reasoning.
        rationale: B texts, empty for rows that skipped reasoning.
        tokens: [B] int64, rationale tokens written, including ``<think>`` and ``</think>``. 0 for direct rows.
        truncated: [B] bool, whether the budget ended the rationale.
    """

    embedding: Tensor
    thought: Tensor
    probability: Tensor
    rationale: list[str]
    tokens: Tensor
    truncated: Tensor


@dataclass(frozen=True)
class EvaluationTask:
    """A retrieval task: queries, and the candidates that they are ranked against.

    Attributes:
        name: name of the task.
        queries: pairs. The ``positive_id`` of each is among ``candidate_ids``.
        candidates: M items, with duplicate ids removed.
        candidate_ids: M identities.
    """

    name: str
    queries: Sequence[Pair]
    candidates: Sequence[Item]
    candidate_ids: Sequence[str]


@dataclass
class QueryRecord:
    """The result of one query on both paths, for the gallery and the curves.

    Attributes:
        task: name of the query's task.
        pair: the query and its positive.
        confidence: confidence of the direct embedding among the task's candidates.
        margin: how much the model prefers ``<think>`` to ``<emb>``: the difference of the decision logits, in nats.
        direct_rank: expected rank of the positive on the direct path.
        direct_hit: expected hit@1 on the direct path.
        direct_top: the first three candidate ids on the direct path.
        reasoned_rank: expected rank of the positive on the reasoned path, after the model's own rationale. This field
            and the next three are None if no controller asked for the reasoned path.
        reasoned_hit: expected hit@1 on the reasoned path.
        reasoned_top: the first three candidate ids on the reasoned path.
        utility: ``s_r - s_d``.
        rationale: the text that the model wrote. Empty if it wrote none.
        tokens: rationale tokens, including ``<think>`` and ``</think>``. 0 if no rationale was written.
    """

    task: str
    pair: Pair
    confidence: float
    direct_rank: float
    direct_hit: float
    direct_top: tuple[str, ...]
    reasoned_rank: float | None = None
    reasoned_hit: float | None = None
    reasoned_top: tuple[str, ...] | None = None
    utility: float | None = None
    rationale: str = ""
    tokens: int = 0
    margin: float = float("nan")


@dataclass
class EvaluationResults:
    """The scores of every mode and the result of each query.

    `mmemb.common.vocabulary` defines the names of modes and scores.

    Attributes:
        modes: maps a mode to its scores. They are means over tasks, where each task counts once. The key ``by_task``
            maps a task to its scores and counts. All values are plain numbers that checkpoints and JSON can hold.
        records: one record per query.
        tasks: the tasks by name.
    """

    modes: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: list[QueryRecord] = field(default_factory=list)
    tasks: dict[str, EvaluationTask] = field(default_factory=dict)


def pictures(item: Item) -> Iterator[str | PILImage]:
    """Yields every picture source of an item in order, including video frames."""
    for part in item.parts:
        if isinstance(part, Image | Page):
            yield part.source
        elif isinstance(part, Video):
            yield from part.frames
