"""Messages and prompts to token ids."""

from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from benchmarks.lib.synthetic import build_tokenizer
from mlx_serving.common.errors import InvalidJob
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.worker.engine.text.prompts import PromptEncoder

TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m.role not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{ raise_exception('unknown role ' + m.role) }}{%- endif -%}"
    "<{{ m.role }}>{{ m.content }}{%- endfor -%}"
    "{%- if tools -%}[{{ tools | length }} tools]{%- endif -%}"
    "{%- if shout -%}!{%- endif -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)


def encoder(template: str | None = TEMPLATE) -> PromptEncoder:
    fast = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), eos_token="<|end|>")  # noqa: S106 - a token of text
    fast.chat_template = template
    return PromptEncoder(TokenizerWrapper(fast))


def text_of(tokens: tuple[int, ...]) -> str:
    return str(build_tokenizer().decode(list(tokens), skip_special_tokens=False))


def job(**fields: Any) -> GenerationJob:
    return GenerationJob.build(model="m", **fields)


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "plain text"}, "plain text"),
        ({"messages": [USER]}, "<user>hi<assistant>"),
        (
            {"messages": [{"role": "system", "content": "be"}, USER]},
            "<system>be<user>hi<assistant>",
        ),
        (
            {"messages": [{"role": "developer", "content": "be"}, USER]},
            "<system>be<user>hi<assistant>",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}
                ]
            },
            "<user>ab<assistant>",
        ),
        (
            {
                "messages": [USER],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            },
            "<user>hi[1 tools]<assistant>",
        ),
        ({"messages": [USER], "chat_template_kwargs": {"shout": True}}, "<user>hi!<assistant>"),
        (
            {"messages": [USER], "chat_template_kwargs": {"add_generation_prompt": False}},
            "<user>hi",
        ),
    ],
    ids=["prompt", "user", "system", "developer", "parts", "tools", "kwargs", "no generation"],
)
def test_what_the_model_reads(fields: dict[str, Any], expected: str) -> None:
    assert text_of(encoder().encode(job(**fields))) == expected


def test_a_template_that_knows_the_developer_keeps_it() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{% endfor %}{# developer #}"
    messages = [{"role": "developer", "content": "be"}]
    assert text_of(encoder(template).encode(job(messages=messages))) == "<developer>"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "messages", "return_dict"])
def test_kwargs_that_are_the_servers_own_are_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidJob, match=f"chat_template_kwargs.{name}: is set by the server"):
        encoder().encode(job(messages=[USER], chat_template_kwargs={name: "x"}))


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(InvalidJob, match="messages: the model has no chat template"):
        encoder(None).encode(job(messages=[USER]))


def test_what_a_template_refuses_is_passed_on() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidJob, match="messages: chat template: roles must alternate"):
        encoder(template).encode(job(messages=[USER]))


def test_a_template_that_breaks_names_the_field_and_not_the_text() -> None:
    template = "{{ messages[0].content + 1 }}"
    with pytest.raises(InvalidJob, match="messages: the chat template raised TypeError") as error:
        encoder(template).encode(job(messages=[{"role": "user", "content": "secret"}]))
    assert "secret" not in str(error.value)


def test_messages_that_render_to_nothing_are_refused() -> None:
    with pytest.raises(InvalidJob, match="messages: gives no token"):
        encoder("{{ '' }}").encode(job(messages=[USER]))
