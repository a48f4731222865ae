"""Makes the rationale pool of the bundled data: generates, trains the scoring embedder, scores and packs.

    python tools/build_pool.py

The shipped `tiny` model writes four candidates per query at temperature 1, and the `metadata` templates write one. The
`retrieval` evaluator scores them under an embedder trained for this (recipes/evaluator.yaml, the joint phase on
randomly chosen candidates). Every stage resumes where it was. Takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmemb.__main__ import main as mmemb
from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.evaluators.retrieval import RetrievalEvaluator
from mmemb.components.workers.metadata import MetadataWorker
from mmemb.components.workers.model import ModelWorker
from mmemb.data.bundled import load_pairs
from mmemb.rationales.generate import generate
from mmemb.rationales.score import score

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "mmemb" / "data" / "bundled" / "pool.parquet"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/pool"), help="working folder (default: %(default)s)")
    parser.add_argument(
        "--candidates", type=int, default=4, help="samples of the model per query (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=250, help="training steps of the scoring embedder (default: %(default)s)"
    )
    arguments = parser.parse_args()
    pairs = load_pairs("train")
    workers = [ModelWorker(TinyBackbone()), MetadataWorker()]
    generate(pairs, workers, arguments.candidates, pool=arguments.folder, seed=0)

    embedder = arguments.folder / "embedder"
    checkpoint = embedder / "checkpoints" / "last.ckpt"
    done = embedder / "done"  # a checkpoint may come from a run that was stopped
    if not done.is_file():
        logger = "lightning.pytorch.loggers.TensorBoardLogger"
        last = ["--ckpt_path", str(checkpoint)] if checkpoint.is_file() else []
        code = mmemb(
            ["fit", "--config", str(ROOT / "recipes/r1.yaml"), "--config", str(ROOT / "recipes/evaluator.yaml")]
            + ["--model.pool.path", str(arguments.folder), "--trainer.max_steps", str(arguments.steps)]
            + ["--trainer.logger", logger, "--trainer.logger.save_dir", str(embedder.parent)]
            + ["--trainer.logger.name", embedder.name, "--trainer.logger.version", "", *last]
        )
        if code:
            raise SystemExit(code)
        done.touch()
    pool = score(pairs, RetrievalEvaluator(str(checkpoint), batch_size=128), arguments.folder)
    print(f"{pool.export(TARGET)}: {TARGET.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
