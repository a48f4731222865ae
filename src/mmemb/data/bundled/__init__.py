"""The bundled data set with its eight tasks.

It has emoji and flags drawn by two vendors, facts about countries, and scenes drawn from a seed. Training also shows
many of the emoji in five further styles.

Importing it is cheap: it does not import torch, and only `open_picture` decodes a picture.
"""

from mmemb.data.bundled.entities import SPLITS
from mmemb.data.bundled.pairs import evaluation_tasks, load_pairs
from mmemb.data.bundled.pictures import PREFIX, open_picture
from mmemb.data.bundled.pretraining import PretrainingSamples, all_texts, is_right, probe_samples
from mmemb.data.bundled.tasks import DESCRIBE, TASKS, TaskSpec

__all__ = [
    "DESCRIBE",
    "PREFIX",
    "SPLITS",
    "TASKS",
    "PretrainingSamples",
    "TaskSpec",
    "all_texts",
    "evaluation_tasks",
    "is_right",
    "load_pairs",
    "open_picture",
    "probe_samples",
]
