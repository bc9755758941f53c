"""Tally: a tiny language model whose every answer a test can compute.

`tasks` says what it was trained on and checks answers; `model/` holds the shipped weights.
"""

from mlx_serving.tally.tasks import MODEL_PATH, TASKS, Example, Task, check

__all__ = ["MODEL_PATH", "TASKS", "Example", "Task", "check"]
