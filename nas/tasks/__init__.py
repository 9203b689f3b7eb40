"""Tasks: data in three splits, losses and metrics; what a student must learn, and how well it did."""

from nas.tasks import image_folder, readers  # noqa: F401  they enter the built-in sources
from nas.tasks.base import Task, tasks
from nas.tasks.classification import ImageClassification
from nas.tasks.data import Arrays, RawArrays, ReadOptions, read, sources
from nas.tasks.text import TextClassification

__all__ = [
    "Arrays", "ImageClassification", "RawArrays", "ReadOptions", "Task", "TextClassification", "read", "sources",
    "tasks",
]  # fmt: skip
