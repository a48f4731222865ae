"""The bundled data set: emoji and flags by two vendors, facts on countries, scenes drawn from a seed; eight tasks.

Five further styles of many emoji are shown in training only.

Light: no torch, and no picture is decoded before `open_picture` is asked for it.
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
