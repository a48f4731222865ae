"""Makes Markdown tables of the kept results of the benchmarks, for `tools.update_docs`.

If a case was measured more than once, its newest row is shown, as in `benchmarks.claims`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bars, harness
from benchmarks import claims as asked

Row = Mapping[str, Any]


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; no two heads are the same."""
    return bars.markdown([dict(zip(heads, line, strict=True)) for line in lines])


def newest(path: Path, key: Callable[[Row], Any]) -> dict[Any, Row]:
    """The newest row of each case, in the order in which the cases first occur."""
    return {key(row): row for row in harness.read(path)}


RIVALS = {
    "mmemb": "mmemb",
    "naive": "naive",
    "gradcache-loss": "gradcache-loss",
    "sentence-transformers-512": "sentence-transformers-512",
    "sentence-transformers-32": "-32",
}
"""Rivals that are columns of `infonce`, with the columns' headings."""


def infonce(path: Path, *, device: str, dtype: str = "float32") -> str:
    """Time over the floor and (in brackets) extra MB, by rival and case, on devices with this text in their name.

    The cases are those for which a peer was measured with the dtype, one direction first.

    Raises:
        ValueError: there is no such case.
    """
    newest = asked.read(path, device=device).newest
    found = {key: row for key, row in newest.items() if (key[0], key[4]) == ("cpu", dtype)}
    cases = {(key[5], key[2] ** 2 * key[3], key[2], key[3]) for key in found if key[1] != "mmemb"}
    if not cases:
        raise ValueError(f"{path} has no peer in {dtype} on {device}")
    rivals = {rival: head for rival, head in RIVALS.items() if any(key[1] == rival for key in found)}
    lines = []
    for symmetric, _, n, width in sorted(cases):
        rows = [found.get(("cpu", rival, n, width, dtype, symmetric)) for rival in rivals]
        cells = ["" if row is None else f"{row['ratio_to_floor']:.2f} ({row['extra_mb']:.0f})" for row in rows]
        lines.append([f"{'symmetric' if symmetric else 'one direction'}, {n} x {width}", *cells])
    return markdown(["case", *rivals.values()], lines)


def infonce_sizes(path: Path, *, device: str) -> str:
    """Our time over the floor and (in brackets) extra MB, by N, D and direction, in float32, on the same devices."""
    found = [
        row
        for (_, rival, _, _, dtype, _), row in asked.read(path, device=device).newest.items()
        if rival == "mmemb" and dtype == "float32" and row["ratio_to_floor"] is not None
    ]
    cells = {
        (row["n"], row["width"], row["symmetric"]): f"{row['ratio_to_floor']:.2f} ({row['extra_mb']:.0f})"
        for row in found
    }
    columns = sorted({(width, symmetric) for _, width, symmetric in cells})
    heads = [f"D = {width}, {'symmetric' if symmetric else 'one direction'}" for width, symmetric in columns]
    lines = [[str(n), *(cells.get((n, *column), "") for column in columns)] for n in sorted({n for n, _, _ in cells})]
    return markdown(["N", *heads], lines)


def claims(path: Path, *, backend: str, device: str = "") -> str:
    """The targets of the loss on a ``CPU`` or a ``GPU``, and the results of devices with this text in their name."""
    results = asked.read(path, device=device)
    judged = [claim.judge(results) for claim in asked.CLAIMS if claim.text.startswith(backend)]
    lines = [[row["claim"], row["asked"], _number(row["measured"]), row["holds"] or ""] for row in judged]
    return markdown(["claim", "asked", "measured", "holds"], lines)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}" if value < 20 else f"{value:.0f}"


def gradcache(path: Path, *, device: str) -> str:
    """Time over the floor and (in brackets) the maximum resident MB, by batch and method, on such devices."""
    rows = (row for row in harness.read(path) if device in row["device"])
    found = {(row["batch"], row["rival"]): row for row in rows}
    ways = list(dict.fromkeys(rival for _, rival in found))

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        if str(row["note"]).startswith("not tried"):
            return "not tried"  # the reason is in the cell above
        return row["note"] or f"{row['ratio_to_floor']:.2f} ({row['peak_mb']:.0f} MB)"

    batches = sorted({batch for batch, _ in found})
    return markdown(["pairs", *ways], ([str(b), *(cell(found.get((b, way))) for way in ways)] for b in batches))


def generate(path: Path) -> str:
    """Samples per second of the newest run, and the ratio to generating one at a time."""
    pool, one = (newest(path, lambda row: row["rival"])[rival] for rival in ("pool", "one_at_a_time"))
    cells = [f"{row['samples_per_wall_second']:.0f}" for row in (pool, one)]
    return markdown(["samples per second", "one at a time", "ratio"], [[*cells, f"{one['wall_ratio_to_pool']:.1f}"]])


def precision(path: Path) -> str:
    """Relative errors of the gradients of embeddings and temperature, by dtype, mean cosine and rival."""
    found = newest(path, lambda row: (row["dtype"], row["cosine"], row["rival"]))
    rivals = list(dict.fromkeys(rival for _, _, rival in found))
    lines = []
    for dtype, cosine in dict.fromkeys((dtype, cosine) for dtype, cosine, _ in found):
        rows = [found[dtype, cosine, rival] for rival in rivals]
        errors = [f"{_power(row['embedding_error'])}, {_power(row['temperature_error'])}" for row in rows]
        lines.append([f"{dtype}, {cosine:g}", *errors])
    return markdown(["dtype, mean cosine", *(f"`{rival}`" for rival in rivals)], lines)


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{value:.0f}" if value >= 1 else f"{mantissa}e{int(exponent)}"


def phases(path: Path) -> str:
    """Time and memory of a step of each phase, divided by those of the joint phase."""
    run = harness.read(path)[-1]["run"]
    rows = [row for row in harness.read(path) if row.get("run") == run]
    return markdown(
        ["step", "time", "memory"],
        ([row["phase"], f"{row['ratio_to_joint']:.2f}", f"{row['peak_to_joint']:.2f}"] for row in rows),
    )


def inference(path: Path) -> str:
    """The time of each rival divided by ours, and ours by the floor's, by the share of queries that reason."""
    found = newest(path, lambda row: (row["reason"], row["rival"]))
    rivals = {
        "row_read": "row by row, states read",
        "row_reencode": "row by row, encoded again",
        "batch_reencode": "batches, encoded again",
        "batch_sorted": "the same, sorted by length",
    }
    lines = []
    for reason, share in (("always", "all"), ("half", "half")):
        times = [f"{found[reason, rival]['ratio_to_mmemb']:.1f}" for rival in rivals]
        lines.append([share, *times, f"{found[reason, 'mmemb']['ratio_to_floor']:.2f}"])
    return markdown(["queries that reason", *rivals.values(), "ours / floor"], lines)


def score(path: Path) -> str:
    """Rows per second with the prompt encoded once, divided by those with one pass per arm, by evaluator and task."""
    found = newest(path, lambda row: (row["evaluator"], row["task"]))
    tasks = list(dict.fromkeys(task for _, task in found))
    evaluators = list(dict.fromkeys(evaluator for evaluator, _ in found))
    lines = []
    for name in evaluators:
        rows = [found[name, task] for task in tasks]
        arms = sorted({round(row["arms a pair"]) for row in rows})
        cells = [f"{row['wall ratio']:.1f}" for row in rows]
        lines.append([f"`{name}`", str(rows[0]["pairs"]), f"{arms[0]} to {arms[-1]}", *cells])
    return markdown(["evaluator", "pairs", "arms per pair", *(f"`{task}`" for task in tasks)], lines)


_KEPT = {
    "keeps_good": "true kept",
    "rejects_corrupted": "damaged rejected",
    "rejects_empty_talk": "empty talk",
    "rejects_wrong_entity": "another item's",
    "rejects_shuffled": "shuffled",
    "precision": "true among those chosen",
    "recall": "chosen for",
}


def selection(path: Path) -> str:
    """Shares that `counterfactual` keeps and rejects by the scores of each evaluator, over all tasks and by task."""
    results = json.loads(path.read_text(encoding="utf-8"))
    margins, tasks = results["settings"]["margins"], results["settings"]["tasks"]
    rows = {
        (row["evaluator"], row["task"]): row
        for row in results["selection"]
        if row["selector"] == "counterfactual" and row["task"] in ("all", *tasks)
    }
    lines = []
    for name in sorted(margins, key=lambda name: rows[name, "all"]["rejects_corrupted"]):
        for task in ("all", *tasks):
            cells = [f"{rows[name, task][key]:.3f}" for key in _KEPT]
            first = f"`{name}`, {margins[name]:g}" if task == "all" else ""
            lines.append([first, "all" if task == "all" else f"`{task}`", *cells])
    return markdown(["evaluator, margin", "task", *_KEPT.values()], lines)


def selectors(path: Path) -> str:
    """hit@1 on the test split after training with each selector, by row and task."""
    results = json.loads(path.read_text(encoding="utf-8"))
    tasks = results["settings"]["tasks"]
    lines = [
        [
            row["selector"] if row["selector"] == "none" else f"`{row['selector']}`",
            f"`{row['row']}`",
            *(row[task].replace("±", " ± ") for task in (*tasks, "all")),
        ]
        for row in results["hit@1"]
    ]
    return markdown(["selector", "row", *(f"`{task}`" for task in tasks), "mean"], lines)
