"""Measures reading a large rationale pool: the opening, look-ups in random order, and the memory of a reader.

    python -m benchmarks.pool [--smoke] [--repeats 5] [--pairs 1000000]

A scored pool of N pairs with five candidates of 20 words each is written to a temporary folder. Each reader is a
separate process, so its peak memory is its own. The floor is a process that imports the same and opens nothing. The
last column divides the time of a look-up by the time to decode and halve a picture of one megapixel in the same
process. A data loader decodes at least one picture per row.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import harness
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.storage import (
    CANDIDATE_SCHEMA,
    Manifest,
    candidates_shard,
    scores_shard,
    write_manifest,
    write_shard,
)

_CANDIDATES = 5
_LOOKUPS = 2000


def write(folder: Path, pairs: int, *, shard_size: int = 256) -> None:
    """Writes a pool whose texts compress as little as real texts."""
    draw = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    manifest = Manifest(data="0", pairs=pairs, generation={}, evaluators={"e": {}}, shard_size=shard_size)
    for start in manifest.starts():
        rows = [pair_id(number) for number in range(start, min(pairs, start + shard_size)) for _ in range(_CANDIDATES)]
        own = {
            "pair_id": rows,
            "side": ["query"] * len(rows),
            "worker": ["model"] * len(rows),
            "model": ["name@main#0123456789ab"] * len(rows),
            "seed": [draw.getrandbits(62) for _ in rows],
            "text": [" ".join(draw.choices(words, k=20)) for _ in rows],
            "tokens": [20] * len(rows),
        }
        columns = {name: own.get(name, pa.nulls(len(rows))) for name in CANDIDATE_SCHEMA.names}
        write_shard(candidates_shard(folder, start), pa.table(columns).cast(CANDIDATE_SCHEMA))
        numbers = [draw.random() for _ in rows]
        scores = {"pair_id": rows, "e.candidate": numbers, "e.none": numbers, "e.placebo": numbers}
        write_shard(scores_shard(folder, "e", start), pa.table(scores))
    write_manifest(folder, manifest)


def pair_id(number: int) -> str:
    """A pair id as long as those of real data sets."""
    return f"some_task/train/{number:09d}"


def read(folder: Path, lookups: int) -> dict[str, float]:
    """Measures one reader: seconds to open, milliseconds per look-up and per picture, and peak memory in MB."""
    started = time.process_time()
    pool = RationalePool.open(folder)
    opened = time.process_time() - started
    order = random.Random(1).sample(range(len(pool)), min(lookups, len(pool)))
    started = time.process_time()
    for number in order:
        pool.candidates(pair_id(number))
    looked = (time.process_time() - started) / len(order)
    return {"open_s": opened, "lookup_ms": 1e3 * looked, "picture_ms": 1e3 * _picture(), "peak_mb": _peak()}


def _picture() -> float:
    """Seconds to decode a JPEG of a megapixel and to halve it."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((1024, 1024), 60).convert("RGB").save(buffer, "JPEG")
    started = time.process_time()
    for _ in range(5):
        Image.open(buffer).convert("RGB").resize((512, 512))
    return (time.process_time() - started) / 5


def _peak() -> float:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) / 1e3


def measure(*, pairs: int, repeats: int, lookups: int) -> list[dict[str, Any]]:
    """Measures one row with medians over processes."""
    with tempfile.TemporaryDirectory(prefix="mmemb-pool-") as name:
        folder = Path(name)
        write(folder, pairs)
        found = []
        for _ in range(repeats):
            reader = _process("print(json.dumps(pool.read(Path(sys.argv[1]), int(sys.argv[2]))))", name, str(lookups))
            floor = _process("print(json.dumps({'peak_mb': pool._peak()}))", name, str(lookups))
            found.append({**reader, "beyond_floor_mb": reader["peak_mb"] - floor["peak_mb"]})
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6

    def median(key: str) -> float:
        return statistics.median(row[key] for row in found)

    return [
        {
            "pairs": pairs,
            "candidates": pairs * _CANDIDATES,
            "disk_mb": size,
            "open_s": median("open_s"),
            "lookup_ms": median("lookup_ms"),
            "beyond_floor_mb": median("beyond_floor_mb"),
            "ratio_to_picture": statistics.median(row["lookup_ms"] / row["picture_ms"] for row in found),
        }
    ]


def _process(code: str, *words: str) -> dict[str, float]:
    script = f"import json, sys\nfrom pathlib import Path\nfrom benchmarks import pool\n{code}"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the row and appends it to ``pool.jsonl``."""
    made = harness.parser(str(__doc__))
    made.add_argument("--pairs", type=int, default=1_000_000, help="pairs in the pool (default: %(default)s)")
    options = made.parse_args(argv)
    pairs, lookups = (300, 20) if options.smoke else (options.pairs, _LOOKUPS)
    rows = measure(pairs=pairs, repeats=options.repeats, lookups=lookups)
    path = harness.append(rows, output=options.output, name="pool", smoke=options.smoke, device="cpu")
    print(harness.table(rows), f"appended to {path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
