"""Tests the endpoint worker with a real serving program: `transformers serve` with the bundled model.

The test runs only with ``MMEMB_TEST_SERVE=1``. The program needs fastapi, uvicorn and a torchvision that was built for
this torch. It takes a minute to start on two cores.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmemb.components.backbones.tiny import FOLDER
from mmemb.components.workers.openai import OpenAIWorker
from mmemb.data.bundled import load_pairs
from mmemb.rationales.generate import generate
from mmemb.rationales.pool import RationalePool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not os.environ.get("MMEMB_TEST_SERVE"), reason="set MMEMB_TEST_SERVE=1 to start a real server"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(FOLDER), "--host", "127.0.0.1"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as out:
        program = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu", "--dtype", "float32"], stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            assert program.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        program.terminate()
        program.wait(30)


def test_a_pool_is_made_by_a_real_server(url: str, tmp_path: Path) -> None:
    pairs = [pair for task in ("fact", "name", "flagattr") for pair in load_pairs("train", tasks=[task])[:3]]
    worker = OpenAIWorker(
        str(FOLDER),
        base_url=url,
        api_key_variable=None,
        instruction="describe the picture",
        max_new_tokens=12,
        concurrency=4,
        token_budget=100_000,
    )
    generate(pairs, [worker], 2, pool=tmp_path / "pool", seed=0, progress=False)
    # The model may write an empty text, which is not kept.
    pool = RationalePool.open(tmp_path / "pool", keep_leaks=True)
    assert len(pool) == len(pairs)
    written = [rationale for pair in pairs for rationale in pool.candidates(pair.id).rationales]
    assert len(written) >= len(pairs) // 2
    assert all(0 < rationale.tokens <= 12 for rationale in written)
    assert worker.budget.requests == 2 * len(pairs)
