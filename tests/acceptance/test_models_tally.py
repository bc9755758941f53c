"""Two real models in one process: Tally, and a copy of it under another alias."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import pytest

from mlx_serving import Client
from mlx_serving.common.settings import TALLY_PATH, load_settings
from mlx_serving.worker.engine.engine_set import EngineSet
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.model_files import weight_bytes
from mlx_serving.worker.models.loaded_models import LoadedModels
from mlx_serving.worker.models.loading import EngineSpec, finish, load, plan_memory
from mlx_serving.worker.models.model_budget import ModelBudget
from tests.support.helpers import wait_until
from tests.support.worker_process import WorkerProcess, quick_settings

if TYPE_CHECKING:
    from mlx_serving.common.redis.local import LocalRedis

SIZE = weight_bytes(TALLY_PATH)
SPEC = EngineSpec("mlx")
COUNT = [{"role": "user", "content": "count from 3 to 12"}]
ANSWER = "3 4 5 6 7 8 9 10 11 12"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "copy"
    shutil.copytree(TALLY_PATH, folder)
    return folder


@pytest.fixture
def loaded_models(copy: Path) -> LoadedModels:
    paths = {"tally": str(TALLY_PATH), "copy": str(copy)}
    settings = load_settings(batch__max_rows=4)
    return LoadedModels(
        ("tally", "copy"), EngineSet(), lambda m: load(SPEC, settings, paths[m], 1 << 26),
        lambda m: weight_bytes(Path(paths[m])),
    )  # fmt: skip


def request(name: str, model: str, tokens: int) -> Request:
    return Request(name, (5, 6, 7), SamplingParams(seed=1), tokens, model=model)


def test_a_model_s_memory_is_free_once_another_took_its_place(loaded_models: LoadedModels) -> None:
    loaded_models.load_first(ModelBudget({"tally": SIZE, "copy": SIZE}, SIZE))
    memory = []
    for model in ("copy", "tally", "copy", "tally"):
        victims = loaded_models.victims(model)
        finish(loaded_models.bring_up(model, victims or ()))  # type: ignore[arg-type]
        assert loaded_models.resident() == (model,)
        gc.collect()
        memory.append(mx.get_active_memory())
    assert memory[-1] < memory[0] + SIZE // 2


def test_rows_decode_while_another_model_is_loaded(loaded_models: LoadedModels) -> None:
    """The longest stall is a slice of the load, not the load."""
    engines = loaded_models.load_first(ModelBudget({"tally": SIZE}, 2 * SIZE))
    engines.add(request("a", "tally", 400))
    while not engines.running:
        engines.step()
    loaded_models.budget = ModelBudget({"tally": SIZE, "copy": SIZE}, 2 * SIZE)
    decoded, slices = 0, 0
    for _ in loaded_models.bring_up("copy", loaded_models.victims("copy") or ()):
        decoded += sum(len(output.token_ids) for output in engines.step())
        slices += 1
    assert loaded_models.resident() == ("tally", "copy")
    assert slices > 8
    assert decoded > slices // 2
    engines.add(request("b", "copy", 10))
    ended: list[str] = []
    while len(ended) < 2:
        ended += [o.request_id for o in engines.step() if o.finish_reason]
    assert set(ended) == {"a", "b"}


def test_the_kv_budget_is_shared_by_as_many_as_can_be_in_memory(copy: Path) -> None:
    paths = {"tally": str(TALLY_PATH), "copy": str(copy), "gone": "/nowhere"}
    given = load_settings(cache__budget_bytes=6000, worker__model_budget_bytes=SIZE * 2)
    budget, share = plan_memory(SPEC, given, paths)
    assert (budget.sizes, share) == ({"tally": SIZE, "copy": SIZE, "gone": 0}, 2000)
    alone, share = plan_memory(SPEC, load_settings(), {"tally": str(TALLY_PATH)})
    assert (alone.budget_bytes, share) == (None, None)
    several, share = plan_memory(SPEC, load_settings(), paths)
    assert several.budget_bytes is not None
    assert several.budget_bytes > 1 << 28
    assert share is not None
    assert share > 1 << 26


@pytest.mark.may_leak(reason="a worker that is killed at the end leaves its name in RQ's sets")
def test_a_worker_answers_for_both_and_leaves_the_one_that_is_missing(
    settled_redis: LocalRedis, copy: Path
) -> None:
    others = {"copy": str(copy), "missing": str(copy.parent / "missing")}
    with (
        Client(settings=quick_settings(settled_redis.url)) as client,
        WorkerProcess(
            settled_redis.url, "w", None, others=others, worker__model_budget_bytes=SIZE * 3 // 2
        ) as worker,
    ):
        left = client.submit(model="missing", messages=COUNT, max_tokens=64)
        for model in ("copy", "tally"):
            handle = client.submit(model=model, messages=COUNT, max_tokens=64, temperature=0)
            assert handle.result(timeout=60).text.strip() == ANSWER
        log = worker.whole_log()
        assert client.status(left.id).state.value == "queued"
        wait_until(lambda: "model_load_failed" in worker.whole_log(), what=log)
        left.cancel()
