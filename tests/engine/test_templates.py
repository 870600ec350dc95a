"""Hostile templates: no way out of the sandbox, no end of time, no end of memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from eevp_batch.engine import templates
from eevp_batch.engine.chat_template import ChatTemplate
from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.templates import BoundedEnvironment
from eevp_batch.errors import ModelError, RowError, UsageError
from eevp_batch.spec import PromptSpec

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% set a = '__class__' %}{{ ''[a] }}",
    "{{ self.__init__.__globals__ }}",
]
ENDLESS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    "{{ lipsum(n=1000000000) }}",
]
DOUBLE = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(100) %%}"
    "{%% set ns.x = ns.x %s ns.x %%}{%% endfor %%}"
)
HUGE = [
    "{{ 'a' * 1000000000 }}",
    "{{ [1] * 1000000000 }}",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 ** 9 }}",
    DOUBLE % ("'aa'", "~"),
    DOUBLE % ("'aa'", "+"),
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% for i in range(100000) %}{{ 'a' * 1000000 }}{% endfor %}",
    "{% set x %}{% for i in range(100000) %}{{ 'a' * 1000000 }}{% endfor %}{% endset %}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a' | indent(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'a' * 1000000) }}",
    "{{ ('a' * 1000000).replace('a', 'a' * 1000000) }}",
    "{{ ('a' * 1000000).translate({97: 'a' * 1000000}) }}",
    "{{ range(100000) | map('string') | join('a' * 1000000) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def error_of(template: str, tokenizer: Any, is_chat: bool) -> str:
    """What a row is told by a hostile template, the job's or the tokenizer's."""
    if is_chat:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    prompt = PromptSpec() if is_chat else PromptSpec(template=template, chat=False)
    encoder = PromptEncoder(tokenizer, prompt, None, 1000)
    with pytest.raises(RowError) as caught:
        encoder.encode({"prompt": "hi"})
    return str(caught.value)


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_leaves_the_sandbox(tokenizer: Any, template: str, is_chat: bool) -> None:
    told = error_of(template, tokenizer, is_chat)
    # Where a chat template asks for what is not there, it gets nothing.
    assert "SecurityError" in told or (is_chat and told == "the prompt encodes to no token")


@pytest.mark.parametrize("template", ENDLESS)
def test_an_endless_template_is_an_error_row(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "MAX_CPU_S", 0.05)
    assert "more than 0.05 seconds of CPU time" in error_of(template, tokenizer, is_chat=False)


@pytest.mark.parametrize("template", HUGE)
def test_a_template_that_fills_the_memory_is_an_error_row(tokenizer: Any, template: str) -> None:
    assert "TemplateLimitError" in error_of(template, tokenizer, is_chat=False)


def test_chat_templates_have_the_same_bounds(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "MAX_CPU_S", 0.05)
    assert "CPU time" in error_of(ENDLESS[0], tokenizer, is_chat=True)
    assert "16,777,216 characters" in error_of(HUGE[0], tokenizer, is_chat=True)


def test_what_ordinary_templates_do_is_within_bounds() -> None:
    environment = BoundedEnvironment()
    text = "word " * 200_000  # a prompt of 1 MB
    for template, expected in [
        ("{{ x | replace('word', 'Wort') | trim }}", ("Wort " * 200_000).strip()),
        ("{{ x.split(' ') | join('-') | upper }}", "WORD-" * 200_000),
        ("{{ 'a' ~ 1 ~ none ~ x[:4] }}", "a1Noneword"),
        ("{{ '-' * 20 }}{{ 7 % 2 }}{{ 2 ** 10 }}{{ [1] + [2] }}{{ 'n: %05d' % 3 }}",
         "-" * 20 + "11024[1, 2]n: 00003"),
        ("{{ '{} {:.2f}'.format(1700000000, 0.5) }}", "1700000000 0.50"),
        ("{{ x[:4] | center(8) }}|{{ {'a': 1} | tojson(indent=1) }}", '  word  |{\n "a": 1\n}'),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{% set y %}{{ m(1) }}{% endset %}{{ y ~ y }}",
         "<1><1>"),
    ]:  # fmt: skip
        assert environment.from_string(template).render(x=text) == expected, template


@pytest.mark.parametrize("source", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
                                    "{% for a in b %}" * 30 + "{% endfor %}" * 30])  # fmt: skip
def test_a_template_that_no_compiler_takes_is_refused(tokenizer: Any, source: str) -> None:
    with pytest.raises(UsageError, match=r"prompt\.template: found \w+Error"):
        PromptEncoder(tokenizer, PromptSpec(template=source), None, 1000)
    hostile = copy.copy(tokenizer)
    hostile.chat_template = source
    with pytest.raises(ModelError, match=r"chat template: found \w+Error"):
        ChatTemplate(hostile)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "hi"}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": " ü \n"}],
        [{"role": "user", "content": "hi", "name": None}, {"role": "tool", "content": "1"}],
    ],
)
@pytest.mark.parametrize(
    "template",
    [
        None,
        "{%- for m in messages -%}{% if loop.last %}{{ m | tojson }}{% continue %}{% endif %}\n"
        "  {{ m.content | trim }}{{ eos_token }}\n{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.reasoning_content }}{{ 'name' in m }}"
        "{% endgeneration %}{% endfor %}",
    ],
)
def test_a_chat_is_rendered_as_transformers_does(
    tokenizer: Any, template: str | None, messages: list[dict[str, str]]
) -> None:
    ours = copy.copy(tokenizer)
    ours.chat_template = template or tokenizer.chat_template
    expected = ours.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ChatTemplate(ours).render(messages) == expected
