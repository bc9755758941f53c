"""The fast twins of Tally's tokenizer and chat template say what the shipped files say."""

from random import Random
from typing import Any

import pytest

from mlx_serving.tally import tokenizer
from mlx_serving.tally.tasks import MODEL_PATH, TASKS
from mlx_serving.tally.two_turns import in_context

transformers = pytest.importorskip("transformers")

TEXTS = (
    "count from 3 to 12",
    "get_weather {}",
    "a\n\tb  c\r\n",
    "Grüße 🎲 東京 👩‍💻 \U00020000 \x00\x7f",
    "<|im_start|>user\nx<|im_end|>\n<tool_call></tool_call>",
    "countfrom count_ _count 1count2",
    "",
)


@pytest.fixture(scope="module")
def shipped() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_is_the_shipped_tokenizer(shipped: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert shipped.encode(text, add_special_tokens=False) == ids
    assert shipped.decode(ids) == text


@pytest.mark.parametrize("task", TASKS)
def test_render_and_encode_are_the_shipped_chat_template(shipped: Any, task: str) -> None:
    rng = Random(task)
    for _ in range(30):
        example = in_context(rng, TASKS[task].sample(rng))
        text = tokenizer.render(example.messages, example.tools)
        arguments = {"tools": example.tools, "add_generation_prompt": True}
        template = shipped.apply_chat_template(example.messages, tokenize=False, **arguments)
        assert text == template
        assert shipped.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_text_parts_and_developer_turns_read_as_strings_and_system_turns(shipped: Any) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "dice 3"}]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "dice "}, {"type": "text", "text": "3"}],
        },
    ]
    rendered = [
        shipped.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in (plain, parts)
    ]
    assert rendered[0] == rendered[1] == tokenizer.render(plain, None)


def test_an_unknown_role_is_named(shipped: Any) -> None:
    with pytest.raises(Exception, match=r"messages\[0\]\.role: critic"):
        shipped.apply_chat_template([{"role": "critic", "content": "x"}], tokenize=False)


def test_every_id_is_a_token_and_digits_are_one_each(shipped: Any) -> None:
    assert len(shipped) == tokenizer.VOCABULARY_SIZE == len(set(tokenizer.vocabulary()))
    assert [shipped.decode([i]) for i in tokenizer.DIGIT_IDS] == list("0123456789")
    assert shipped.eos_token_id == tokenizer.END_ID


def test_the_shipped_files_are_what_the_script_writes(tmp_path: Any) -> None:
    tokenizer.write_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (MODEL_PATH / file.name).read_bytes()
