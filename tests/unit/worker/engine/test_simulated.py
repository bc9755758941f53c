"""The engine's own rules (text, stops, resume, limits) over a runner that only counts."""

import subprocess
import sys

import pytest

from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.worker.engine.interface import (
    InferenceEngine,
    Request,
    RequestChoice,
    SamplingParams,
)
from mlx_serving.worker.engine.simulated import (
    SimulatedEngine,
    SimulatedOptions,
    SimulatedPromptEncoder,
)
from tests.support.engine_support import Collected, drive

PARAMS = SamplingParams()
FREE = SimulatedOptions(tokens_per_second=0, prefill_tokens_per_second=0)


def request(
    max_tokens: int, stop: tuple[str, ...] = (), committed: tuple[int, ...] = ()
) -> Request:
    return Request("a", (5, 6, 7), PARAMS, max_tokens, stop, (RequestChoice(0, committed),))


def run(request_: Request, options: SimulatedOptions = FREE) -> Collected:
    return drive(SimulatedEngine(options), [request_])["a"]


def test_it_counts_up_to_max_tokens() -> None:
    row = run(request(4))
    assert (row.token_ids, row.text, row.finish_reason) == ([1, 2, 3, 4], "1 2 3 4", "length")


def test_it_answers_to_the_engines_protocol() -> None:
    engine: InferenceEngine = SimulatedEngine(FREE)
    assert engine.model_info.name == "simulated"
    assert engine.fits(request(4))


def test_a_stop_string_ends_the_text_before_it_and_names_every_token() -> None:
    row = run(request(40, stop=("4 5", "9")))
    assert (row.text, row.finish_reason) == ("1 2 3 ", "stop")
    assert row.token_ids == [1, 2, 3, 4, 5]


def test_no_part_of_a_stop_string_leaks_before_it_is_sure() -> None:
    engine = SimulatedEngine(FREE)
    engine.add(request(6, stop=(" 4 6",)))
    texts = [output.text for _ in range(6) for output in engine.step()]
    assert texts == ["1", " 2", " 3", "", " 4 5", " 6"]


def test_what_is_held_back_at_the_end_is_released() -> None:
    row = run(request(4, stop=("4 99",)))
    assert (row.text, row.finish_reason) == ("1 2 3 4", "length")


def test_a_resumed_row_emits_only_what_is_new() -> None:
    row = run(request(6, committed=(1, 2, 3)))
    assert (row.token_ids, row.text, row.finish_reason) == ([4, 5, 6], " 4 5 6", "length")


def test_a_resumed_row_knows_what_the_stop_string_has_seen() -> None:
    row = run(request(9, stop=("3 4",), committed=(1, 2, 3)))
    assert (row.token_ids, row.text, row.finish_reason) == ([4], "", "stop")


@pytest.mark.parametrize(
    ("resumed", "reason"),
    [
        (request(3, committed=(1, 2, 3)), "length"),
        (request(9, committed=(1, 2, 0)), "stop"),
        (request(9, stop=("2",), committed=(1, 2)), "stop"),
    ],
    ids=["max_tokens", "end of sequence", "stop string"],
)
def test_what_had_ended_already_gives_one_empty_output(resumed: Request, reason: str) -> None:
    row = run(resumed)
    assert (row.token_ids, row.text, row.finish_reason, row.outputs) == ([], "", reason, 1)


def test_what_had_ended_already_can_be_aborted() -> None:
    engine = SimulatedEngine(FREE)
    engine.add(request(3, committed=(1, 2, 3)))
    busy = engine.has_work
    engine.abort("a")
    assert (busy, engine.has_work) == (True, False)
    assert engine.step() == []


def test_outputs_name_the_prompts_length() -> None:
    engine = SimulatedEngine(FREE)
    engine.add(request(1))
    assert [output.prompt_tokens for output in engine.step()] == [3]


def test_tokens_come_at_the_set_rate() -> None:
    slept: list[float] = []
    options = SimulatedOptions(
        tokens_per_second=50, prefill_tokens_per_second=1000, first_chunk_tokens=512
    )
    engine = SimulatedEngine(options, sleep=slept.append)
    engine.add(request(3))
    engine.add(Request("b", (1,) * 41, PARAMS, 2))
    while engine.has_work:
        engine.step()
    # One shared prefill, padded to 40 tokens; then a step for each token, whatever the batch.
    assert slept == [pytest.approx(0.08), *[pytest.approx(0.02)] * 3]


def test_zero_cost_jobs_end_in_the_step_after_they_came() -> None:
    engine = SimulatedEngine(SimulatedOptions.zero_cost())
    for index in range(500):
        engine.add(Request(str(index), (1, 2), PARAMS, 100))
    outputs = engine.step()
    assert {output.finish_reason for output in outputs} == {"stop"}
    assert len(outputs) == 500
    assert not engine.has_work


def test_prompts_are_as_long_as_their_words() -> None:
    encoder = SimulatedPromptEncoder()
    job = GenerationJob.build(model="m", messages=[{"role": "user", "content": "one two three"}])
    assert encoder.encode(job) == (1, 2, 3)
    assert encoder.encode(GenerationJob.build(model="m", prompt="one two")) == (1, 2)


def test_it_needs_no_mlx() -> None:
    code = "import sys, mlx_serving.worker.engine.simulated; assert 'mlx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
