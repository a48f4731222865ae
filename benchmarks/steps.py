"""The methods to make an optimiser step of the bundled tiny model, and the measurement of one method.

`benchmarks.gradcache` runs it in a separate process, so that running out of memory ends only that process:

    python -m benchmarks.steps '{"way": "mmemb", "batch": 64, ...}'      the fields of `Task`; prints JSON

Legend: N pairs of the batch, C rows of a chunk, D embedding width. A chunk of the cached methods is C queries or C
targets, never both, so that the graph of every chunk has the same number of rows.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.peers import TEMPERATURE, full_matrix
from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.poolers.embed_token import EmbedToken
from mmemb.data.pairs import read_pairs
from mmemb.data.sources import Source
from mmemb.interfaces import Model
from mmemb.losses import CachedLoss, ChunkOutput, InfoNCE, cached_step
from mmemb.types import ModelInputs

WAYS = ("mmemb", "mmemb-kept", "plain", "sentence-transformers")
DISTINCT = 256
"""Maximum number of different pairs; a larger batch repeats them, which does not change the cost of a step."""
STATUS = Path("/proc/self/status")
"""File in which Linux reports the memory of a process."""
CHECKED = 2
"""Chunks of the batch on which a method's gradients are compared with those of the plain step."""


@dataclass(frozen=True)
class Task:
    """The task of one process.

    Attributes:
        way: one of `WAYS`.
        batch: pairs per step, a multiple of ``chunk``.
        chunk: rows of one backward pass, all from one side. The plain step takes all rows of both sides at once.
        device: ``cpu`` or ``cuda``.
        repeats: maximum number of repetitions.
        seconds: time for the repetitions; at least one is made.
        budget_mb: memory in 10^6 bytes that the step may take in addition to what the process held before it; None for
            no limit.
    """

    way: str
    batch: int
    chunk: int
    device: str
    repeats: int
    seconds: float
    budget_mb: float | None


class Bench:
    """The model with random weights, its optimiser, and prepared batches of the bundled training pairs."""

    def __init__(self, task: Task) -> None:
        torch.manual_seed(0)
        self.chunk, self.device = task.chunk, task.device
        self.backbone = TinyBackbone(weights="random").to(task.device)
        self.pooler = EmbedToken()
        Model.assemble(self.backbone, self.pooler)
        self.loss = InfoNCE(temperature=TEMPERATURE, learnable=False).to(task.device)
        self.parameters = [*self.backbone.parameters(), *self.pooler.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        pairs = read_pairs(Source(path="bundled:train"))
        count = max(task.chunk, min(task.batch, DISTINCT))
        self.pairs = [pairs[row] for row in random.Random(0).sample(range(len(pairs)), count)]
        starts = range(0, count - count % task.chunk, task.chunk)
        self._queries = [self._prepare("query", start, task.chunk) for start in starts]
        self._targets = [self._prepare("positive", start, task.chunk) for start in starts]

    def encode(self, inputs: ModelInputs) -> Tensor:
        """Embeddings [rows, D]."""
        hidden = self.backbone(inputs)
        return self.pooler(hidden, inputs.tensors["attention_mask"], inputs.emb_position)

    def query(self, number: int) -> Tensor:
        """Query embeddings [C, D] of a chunk."""
        return self.encode(self._queries[number % len(self._queries)])

    def target(self, number: int) -> Tensor:
        """Target embeddings [C, D] of a chunk."""
        return self.encode(self._targets[number % len(self._targets)])

    def backward(self, way: str, batch: int) -> Callable[[], None]:
        """Makes a function that computes the parameters' gradients over ``batch`` pairs with a method.

        The inputs are prepared beforehand.
        """
        chunks = range(batch // self.chunk)
        if way == "floor":
            return lambda: self._floor(chunks)
        if way in ("mmemb", "mmemb-kept"):
            return lambda: self._cached(chunks, kept_graphs=2 * len(chunks) if way == "mmemb-kept" else 1)
        if way == "plain":
            query, target = self._prepare("query", 0, batch), self._prepare("positive", 0, batch)
            return lambda: full_matrix(self.encode(query), self.encode(target)).backward()
        return self._cached_multiple_negatives(batch)

    def step(self, way: str, batch: int) -> Callable[[], None]:
        """Makes a function like that of `backward` that also makes the optimiser's step."""
        backward = self.backward(way, batch)

        def run() -> None:
            backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return run

    def gradient(self, way: str, batch: int) -> Tensor:
        """The gradients of all parameters as one vector."""
        self.optimizer.zero_grad()
        self.backward(way, batch)()
        found = [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in self.parameters]
        self.optimizer.zero_grad()
        return torch.cat([x.flatten() for x in found])

    def _prepare(self, side: str, start: int, count: int) -> ModelInputs:
        rows = [self.pairs[row % len(self.pairs)] for row in range(start, start + count)]
        return self.backbone.prepare([getattr(pair, side) for pair in rows]).to(self.device)

    def _floor(self, chunks: range) -> None:
        """Runs every chunk forward and backward once with its own loss; no method that sees all pairs does less."""
        for number in chunks:
            full_matrix(self.query(number), self.target(number)).backward()

    def _cached(self, chunks: range, kept_graphs: int) -> None:
        sides = {"query": self.query, "target": self.target}

        def forward(chunk: tuple[str, int], final: bool) -> ChunkOutput:
            side, number = chunk
            return ChunkOutput({side: sides[side](number)})

        def all_rows(embeddings: dict[str, Tensor]) -> CachedLoss:
            result = self.loss.with_grads(embeddings["query"], embeddings["target"])
            return CachedLoss(result.loss, {"query": result.query_grad, "target": result.candidate_grad})

        cached_step([(side, number) for side in sides for number in chunks], forward, all_rows, kept_graphs=kept_graphs)

    def _cached_multiple_negatives(self, batch: int) -> Callable[[], None]:
        """Uses the loss of sentence-transformers with the same model: its cache, its loss, its second pass.

        Its mini-batches are cut from a column of row numbers, with which the model finds its prepared chunk.
        """
        losses: Any = importlib.import_module("sentence_transformers.sentence_transformer.losses")
        loss = losses.CachedMultipleNegativesRankingLoss(
            _ByRowNumber(self, batch), scale=1 / TEMPERATURE, mini_batch_size=self.chunk
        )
        rows = torch.arange(2 * batch, device=self.device)[:, None]
        return lambda: loss([{"input_ids": rows[:batch]}, {"input_ids": rows[batch:]}], None).backward()


class _ByRowNumber(nn.Sequential):
    """Looks like a model to sentence-transformers: rows 0 ... N - 1 are queries, N ... 2 N - 1 their targets."""

    def __init__(self, bench: Bench, batch: int) -> None:
        super().__init__(nn.Identity())
        self._embed = lambda row: (bench.query if row < batch else bench.target)(row % batch // bench.chunk)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings of one mini-batch of row numbers [C, 1]."""
        return {"sentence_embedding": self._embed(int(features["input_ids"][0, 0]))}


def measure(task: Task) -> dict[str, Any]:
    """Measures error, peak memory and times of a method; returns a note instead if it runs out of memory."""
    bench = Bench(task)
    few = min(task.batch, CHECKED * task.chunk)
    plain, found = bench.gradient("plain", few), bench.gradient(task.way, few)
    step, floor = bench.step(task.way, task.batch), bench.step("floor", task.batch)
    bench.step("floor", few)()  # makes the optimiser's state before memory is measured
    too_large = f"does not fit in {task.budget_mb:.0f} MB" if task.budget_mb else "out of memory"
    try:
        peak, first = _bounded(step, task)
    except (RuntimeError, MemoryError) as failure:  # torch.OutOfMemoryError is a RuntimeError
        if "memory" not in str(failure).lower() and not isinstance(failure, MemoryError):
            raise
        return {"note": too_large}
    if task.budget_mb is not None and peak > task.budget_mb:  # the process still holds memory that was freed before
        return {"note": too_large}
    repeats = max(1, min(task.repeats, int(task.seconds / (2 * harness.busy_seconds(first, device=task.device)))))
    times = harness.paired({"floor": floor, "way": step}, repeats=repeats, device=task.device, warm_up=False)
    return {
        "seconds": statistics.median(times["way"]),
        "floor_seconds": statistics.median(times["floor"]),
        "ratio_to_floor": harness.median_ratio(times["way"], times["floor"]),
        "peak_mb": peak,
        "error": float((found - plain).norm() / plain.norm()),
        "repeats": repeats,
    }


def _bounded(step: Callable[[], None], task: Task) -> tuple[float, float]:
    """Runs a step within the budget; returns the peak memory that it adds, in 10^6 bytes, and its seconds.

    On a CPU this is the process's resident memory, or that of its tensors if the system does not report it. On a GPU it
    is the memory of its tensors.
    """
    if task.device == "cpu" and STATUS.exists():
        return _bounded_resident(step, task.budget_mb)
    if task.device != "cpu" and task.budget_mb is not None:
        allowed = torch.cuda.memory_reserved() + task.budget_mb * 1e6
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / torch.cuda.mem_get_info()[1]))
    seconds: list[float] = []
    try:
        peak = harness.peak_megabytes(
            lambda: seconds.append(harness.timed(step, device=task.device)), device=task.device
        )
    finally:
        if task.device != "cpu":
            torch.cuda.set_per_process_memory_fraction(1.0)
    return peak, seconds[0]


def _bounded_resident(step: Callable[[], None], budget_mb: float | None) -> tuple[float, float]:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # returns freed memory to the system, so that the step cannot use it again
        trim(0)
    before = _status("VmRSS")
    with nullcontext() if budget_mb is None else _limited(_status("VmData") + budget_mb):
        STATUS.with_name("clear_refs").write_text("5", encoding="ascii")  # resets the peak
        seconds = harness.timed(step, device="cpu")
    return _status("VmHWM") - before, seconds


@contextmanager
def _limited(megabytes: float) -> Iterator[None]:
    """Limits the data of the process to this many 10^6 bytes while the context lasts."""
    import resource  # not available on every system

    least, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(megabytes * 1e6), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (least, most))


def _status(name: str) -> float:
    """Reads a line of the process's status, in 10^6 bytes."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1.024e-3


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))
