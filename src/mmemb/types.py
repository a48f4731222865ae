"""What flows between the rooms. Light: torch is imported for type checking only.

Shape legend, used in every docstring of the project:
    B rows of a batch   N queries   M candidates   K rationale candidates a pair
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
"""The special tokens every backbone owns: the decision to reason, the end of the rationale, the position embedded."""
NO_LIMIT = 2**63 - 1
"""A `Decision`'s budget where the controller sets none: the largest int64, above every budget of an encoder."""


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture, decoded only when a backbone asks for it: an absolute path, a ``bundled:`` name or a PIL image."""

    source: str | PILImage


@dataclass(frozen=True, slots=True)
class Video:
    """Frames of a video in order, each a source as in `Image`."""

    frames: tuple[str | PILImage, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """A document page as a picture (kept apart from `Image`: pages want more pixels)."""

    source: str | PILImage


Part: TypeAlias = Text | Image | Video | Page


@dataclass(frozen=True, slots=True)
class Item:
    """What is embedded: an instruction and ordered parts.

    Attributes:
        instruction: the task in words; may be empty.
        parts: the content, in reading order; at least one.
        fields: extra row fields by name, for the ``metadata`` worker's templates. A query's fields never describe its
            target beyond what the query itself determines.
    """

    instruction: str
    parts: tuple[Part, ...]
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text parts joined by a space (no instruction)."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Pair:
    """A query with what it should find.

    Attributes:
        id: unique in its data set.
        task: task name; batches are made of sub-batches of one task.
        query: the query item.
        positive: the target item.
        positive_id: identity of the target: pairs with equal ids share a target, so neither is the other's negative.
        hard_negatives: further candidates known to be wrong.
        hard_negative_ids: one identity a hard negative.
        ranked_alone: evaluation ranks the query against its positive and its hard negatives only, not against the
            candidates of other queries.
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
    """A rationale with its provenance.

    Attributes:
        text: what was thought.
        worker: short name of the worker that wrote it.
        model: model id and revision, as in ``name@revision``; empty for templates.
        seed: sampling seed; -1 where nothing was sampled.
        tokens: length in the model's own tokens; 0 if unknown.
        finish_reason: ``stop``, ``length`` or ``template``.
        prompt_hash: digest of what the model was asked, or of the template; empty if unknown.
        corruption: how the ``corrupting`` worker damaged it; empty where it did not.
        leaks: what `mmemb.rationales.leaks` found of the target in it (``verbatim``, ``near_duplicate``, ``field``).
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
        scores: c(q, t | do(r)) a candidate, K floats (log-probabilities); nan where not scored.
        score_none: c(q, t | do(none)); nan where not scored.
        scores_placebo: c(q, t | do(another pair's rationale)) a candidate, K floats, or empty.
    """

    pair_id: str
    rationales: tuple[Rationale, ...]
    scores: tuple[float, ...] = ()
    score_none: float = float("nan")
    scores_placebo: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Selection:
    """A selector's choice: the candidate's index (None: train the direct path alone) and its loss weight."""

    index: int | None
    weight: float = 1.0


@dataclass
class ModelInputs:
    """What a backbone's forward takes, made by `Backbone.prepare`. Rows are left-padded.

    Attributes:
        tensors: keyword arguments of the model: ``input_ids`` [B, T] int64, ``attention_mask`` [B, T] int64, and the
            family's picture tensors.
        emb_position: [B] int64, column of ``<emb>``; -1 for a prompt without one.
        labels: [B, T] int64, the token id at every position the model itself should write (decision, rationale,
            ``</think>``, ``<emb>``; or a response), -100 elsewhere. Not shifted: t follows from the state at t - 1.
    """

    tensors: dict[str, Tensor]
    emb_position: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.tensors["input_ids"].shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ModelInputs:
        """Moves every tensor; returns a new object."""
        return ModelInputs(
            tensors={key: value.to(device, non_blocking=non_blocking) for key, value in self.tensors.items()},
            emb_position=self.emb_position.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )


@dataclass
class PrefillState:
    """What one prefill knows of B queries: all that a controller may look at.

    Attributes:
        decision_logits: [B, 2] float, logits of ``<think>`` and ``<emb>`` after the prompt.
        direct: [B, D] float, normalised direct embeddings.
        confidence: [B] float in [0, 1], largest softmax probability of the direct embedding over the reference bank;
            None without a bank.
        utility: [B] float, s_r - s_d where known (evaluation only); None otherwise.
        hit_gain: [B] float in [-1, 1], what the row's own rationale adds to its hit@1; known as ``utility`` is.
        tokens: [B] int64, length of that rationale, brackets included; known as ``utility`` is.
        weight: [B] float, how much each row counts in a fit; None: all alike.
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
        """How much the model leans to ``<think>``: the difference of the decision logits [B], in nats."""
        return self.decision_logits[:, 0].float() - self.decision_logits[:, 1].float()


@dataclass
class Decision:
    """A controller's answer for B queries.

    Attributes:
        think: [B] bool.
        probability: [B] float, probability (or degree) of thinking; for reports.
        budget: [B] int64, most rationale tokens a row may write, `NO_LIMIT` where the encoder's own budget is all that
            holds; 0 where it does not think.
    """

    think: Tensor
    probability: Tensor
    budget: Tensor


@dataclass
class Encoded:
    """Embeddings of B items with what was thought on the way.

    Attributes:
        embedding: [B, D] float32, normalised, on the CPU.
        thought: [B] bool.
        probability: [B] float, the controller's probability of thinking.
        rationale: B texts, empty where the row did not think.
        tokens: [B] int64, rationale tokens written (0 for direct rows; ``<think>`` and ``</think>`` count).
        truncated: [B] bool, the budget ended the rationale.
    """

    embedding: Tensor
    thought: Tensor
    probability: Tensor
    rationale: list[str]
    tokens: Tensor
    truncated: Tensor


@dataclass(frozen=True)
class EvaluationTask:
    """A retrieval task: queries, and the candidates they are ranked against.

    Attributes:
        name: task name.
        queries: pairs; ``positive_id`` of each is among ``candidate_ids``.
        candidates: M items, deduplicated by id.
        candidate_ids: M identities.
    """

    name: str
    queries: Sequence[Pair]
    candidates: Sequence[Item]
    candidate_ids: Sequence[str]


@dataclass
class QueryRecord:
    """The outcome of one query on both paths, for the gallery and the curves.

    Attributes:
        task: name of the query's task.
        pair: the query and its positive.
        confidence: confidence of the direct embedding among the task's candidates.
        margin: how much the model prefers ``<think>`` to ``<emb>``: difference of the decision logits, in nats.
        direct_rank: expected rank of the positive on the direct path.
        direct_hit: expected hit@1 on the direct path.
        direct_top: the first three candidate ids on the direct path.
        reasoned_rank: expected rank on the reasoned path, after the model's own rationale. This field and the next
            three are None if no controller asked for the reasoned path.
        reasoned_hit: expected hit@1 on the reasoned path.
        reasoned_top: the first three candidate ids on the reasoned path.
        utility: s_r - s_d.
        rationale: text that the model wrote; empty if it wrote none.
        tokens: rationale tokens, ``<think>`` and ``</think>`` included; 0 if none was written.
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
    """The scores of every row, and the outcome of each query. `mmemb.common.vocabulary` names rows and scores.

    Attributes:
        modes: row -> its scores: means over tasks, where each task counts once, and ``by_task``: task -> scores and
            counts. All values are plain numbers, so that checkpoints and JSON can hold them.
        records: one per query.
        tasks: the tasks by name.
    """

    modes: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: list[QueryRecord] = field(default_factory=list)
    tasks: dict[str, EvaluationTask] = field(default_factory=dict)


def pictures(item: Item) -> Iterator[str | PILImage]:
    """Every picture source of an item in order, video frames included."""
    for part in item.parts:
        if isinstance(part, Image | Page):
            yield part.source
        elif isinstance(part, Video):
            yield from part.frames
