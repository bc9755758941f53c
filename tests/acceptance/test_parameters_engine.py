"""Parameters of a job through the real engine: the worker's own way from a job to its request."""

from __future__ import annotations

from typing import Any, Final

from mlx_serving.worker.claiming.intake import build_request, plan_output
from mlx_serving.worker.delivery.choice import Committed
from mlx_serving.worker.engine.text.prompts import PromptEncoder
from tests.support.output_support import Row, decode_one, job, planner, tally
from tests.support.worker_fakes import claim_of

DICE: Final = {"content": "dice 30", "role": "user"}
COUNT: Final = {"content": "count from 3 to 12", "role": "user"}


def run(*messages: dict[str, str], **fields: Any) -> Row:
    made = job(**({"messages": list(messages)} if messages else {}), **fields)
    encode = PromptEncoder(tally().tokenizer).encode
    request = build_request(claim_of(), made, Committed(), encode, tally().model_info)
    return decode_one(plan_output(planner().plan, made, request))


def test_messages_pass_the_chat_template_and_a_prompt_does_not() -> None:
    answered = run(COUNT, temperature=0)
    assert answered.text == "3 4 5 6 7 8 9 10 11 12"
    rendered = tally().tokenizer.apply_chat_template(
        [COUNT], add_generation_prompt=True, tokenize=False
    )
    assert run(prompt=rendered, temperature=0).text == answered.text
    assert run(prompt=COUNT["content"], temperature=0, max_tokens=30).text != answered.text


def test_max_tokens_ends_a_choice() -> None:
    row = run(COUNT, temperature=0, max_tokens=3)
    assert (len(row.token_ids), row.finish_reason) == (3, "length")


def test_a_stop_string_ends_a_choice_and_is_not_in_it() -> None:
    row = run(COUNT, temperature=0, stop=["7", " 1"])
    assert (row.text, row.finish_reason) == ("3 4 5 6 ", "stop")


def test_temperature_0_takes_the_likeliest_and_1_does_not() -> None:
    drawn = {tuple(run(DICE, temperature=1, seed=n).token_ids) for n in range(3)}
    greedy = {tuple(run(DICE, temperature=0, seed=n).token_ids) for n in range(3)}
    assert (len(drawn), len(greedy)) == (3, 1)


def test_a_filter_that_leaves_one_token_takes_the_likeliest() -> None:
    likeliest = run(DICE, temperature=0).token_ids
    assert run(DICE, temperature=1, seed=5).token_ids != likeliest
    filters: tuple[dict[str, float], ...] = ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0})
    for only in filters:
        assert run(DICE, temperature=1, seed=5, **only).token_ids == likeliest, only


def test_a_seed_gives_its_tokens_again_and_another_does_not() -> None:
    first, again, other = (run(DICE, temperature=1, seed=n).token_ids for n in (7, 7, 8))
    assert first == again != other
