"""Tally's training loop on mlx, apart from `train` so that data processes need not load mlx."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3 import Model, ModelArgs

from mlx_serving.tally.data import BUCKETS, TrainingBatch, make_batch
from mlx_serving.tally.evaluate import teacher_forced
from mlx_serving.tally.tasks import MODEL_PATH
from mlx_serving.tally.tokenizer import DIGIT_IDS, write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.pool import AsyncResult, Pool
    from pathlib import Path

WARM_UP_STEPS = 300
CHECKPOINT_SECONDS = 60
LOG_STEPS = 200
# Until so much of the run is done, the share of steps each bucket gets: short answers first.
CURRICULUM = (
    (0.10, (0.6, 0.4, 0.0, 0.0, 0.0)),
    (0.35, (0.35, 0.35, 0.3, 0.0, 0.0)),
    (0.55, (0.30, 0.30, 0.3, 0.1, 0.0)),
    (1.01, (0.27, 0.27, 0.27, 0.09, 0.10)),
)

TrainStep = Callable[[mx.array, mx.array, mx.array], mx.array]
PrintLine = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    out: Path
    steps: int
    max_seconds: float
    device: str
    seed: int
    rows: float  # of each bucket's full batch
    workers: int
    learning_rate: float
    start: Path | None
    buckets: int


def new_model(config: Path = MODEL_PATH / "config.json") -> Model:
    """An untrained model of the shipped shape."""
    return Model(ModelArgs.from_dict(json.loads(config.read_text())))


def loss_of(model: Model, tokens: mx.array, weights: mx.array, any_digit: mx.array) -> mx.array:
    """Weighted cross entropy of rows [B, L+1]; a random digit's target is the uniform one.

    The exact target in place of a sampled one: less noise, and uniform digits after any prefix.
    """
    logits = model(tokens[:, :-1])
    targets = tokens[:, 1:, None]
    picked = mx.take_along_axis(logits, targets, axis=-1).squeeze(-1)
    digits = logits[..., DIGIT_IDS.start : DIGIT_IDS.stop].mean(axis=-1)
    right = mx.where(any_digit, digits, picked)
    losses: mx.array = (mx.logsumexp(logits, axis=-1) - right) * weights
    return losses.sum()


def make_step(model: Model, optimizer: optim.Optimizer) -> TrainStep:
    """One update. Not compiled: on CUDA building the fused kernels took longer than it saves."""
    gradient_of = value_and_grad(model, loss_of)

    def step(tokens: mx.array, weights: mx.array, any_digit: mx.array) -> mx.array:
        loss: mx.array
        loss, gradients = gradient_of(model, tokens, weights, any_digit)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return loss

    return step


def batches(pool: Pool, seed: int, bucket: int, rows: int, ahead: int) -> Iterator[TrainingBatch]:
    """A bucket's batches in order, `ahead` of them being made."""
    pending: deque[AsyncResult[TrainingBatch]] = deque()
    index = 0
    while True:
        while len(pending) < ahead:
            pending.append(pool.apply_async(make_batch, (seed, bucket, index, rows)))
            index += 1
        yield pending.popleft().get()


def learning_rate_at(peak: float, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to 1%."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine


def pick_bucket(options: Options, step: int, progress: float) -> int:
    """Which bucket a step trains on: by the curriculum, its last stage for a warm start."""
    stage = progress if options.start is None else 1.0
    shares = next(shares for until, shares in CURRICULUM if stage < until)[: options.buckets]
    return Random(f"{options.seed} {step}").choices(range(len(shares)), shares)[0]


def save(model: Model, folder: Path) -> None:
    """Write a folder that `mlx_lm.load` takes: weights, configuration, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        if not (folder / name).exists():
            shutil.copy(MODEL_PATH / name, folder / name)
    write_tokenizer(folder)
    path = str(folder / "model.safetensors")
    mx.save_safetensors(path, named_weights(model), {"format": "mlx"})


def named_weights(model: Model) -> dict[str, mx.array]:
    """All weights by their dotted names."""
    return cast("dict[str, mx.array]", dict(tree_flatten(model.parameters())))


def train(options: Options, model: Model, pool: Pool, report: PrintLine) -> None:
    """Train in place; save and score a checkpoint every minute and at the end."""
    optimizer = optim.AdamW(options.learning_rate, betas=[0.9, 0.98], weight_decay=0.05)
    step_of = make_step(model, optimizer)
    streams = [
        batches(pool, options.seed, i, max(1, round(b.rows * options.rows)), 40 if i < 3 else 8)
        for i, b in enumerate(BUCKETS)
    ]
    began = saved = time.monotonic()
    losses: dict[int, mx.array] = {}
    for step in range(options.steps):
        elapsed = time.monotonic() - began
        if elapsed > options.max_seconds:
            break
        progress = max(step / options.steps, elapsed / options.max_seconds)
        bucket = pick_bucket(options, step, progress)
        optimizer.learning_rate = learning_rate_at(options.learning_rate, step, progress)
        batch = next(streams[bucket])
        tokens = mx.array(batch.tokens).astype(mx.int32)
        loss = step_of(tokens, mx.array(batch.weights), mx.array(batch.any_digit))
        mx.async_eval(loss, model.state, optimizer.state)
        if losses:
            mx.eval(*losses.values())  # one step in flight, no more
        losses[bucket] = loss
        if step % LOG_STEPS == 0:
            shown = " ".join(f"{BUCKETS[i].length}:{losses[i].item():.4f}" for i in sorted(losses))
            report(f"{elapsed:6.1f} s  step {step:6d}  loss {shown}")
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoint(model, options.out, report)
            saved = time.monotonic()
    checkpoint(model, options.out, report)


def checkpoint(model: Model, folder: Path, report: PrintLine) -> None:
    """Save, and report the share of held-out answers that are right token for token."""
    save(model, folder)
    scores = teacher_forced(model, 100)
    report("  right: " + " ".join(f"{k} {v:.2f}" for k, v in scores.items()))


def run(options: Options, pool: Pool, report: PrintLine) -> None:
    """Train a model by the options, in the folder they name."""
    mx.set_default_device(mx.gpu if options.device == "gpu" else mx.cpu)
    mx.random.seed(options.seed)
    model = new_model()
    if options.start is not None:
        model.load_weights(str(options.start))
    size = sum(weights.size for weights in named_weights(model).values())
    report(f"{size} parameters, {options.workers} data processes, {mx.default_device()}")
    train(options, model, pool, report)
