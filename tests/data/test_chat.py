"""Chat templates of strangers: what they may take, and that honest ones give what transformers gives."""

import time

import pytest
from words import tokenizer

from actsparse.data import chat
from actsparse.data.prompts import Prompt
from actsparse.errors import DataError

MESSAGES = ({"role": "system", "content": "w1 é"}, {"role": "user", "content": "w2"})
PROMPT = Prompt(source="a.jsonl:1", messages=MESSAGES)
HONEST = (
    "{{ bos_token }}{% for m in messages %}{% if loop.first %}[{% endif %}{{ m.role }}: {{ m.content | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}{{ messages | tojson }}"
)


def templated(template: str):
    made = tokenizer(bos=True)
    made.chat_template = template
    return made


def test_an_honest_template_gives_what_transformers_gives() -> None:
    made = templated(HONEST)
    expected = made.apply_chat_template([dict(one) for one in MESSAGES], add_generation_prompt=True, tokenize=False)
    assert "assistant:" in str(expected)
    assert chat.as_text([PROMPT, PROMPT], made) == [expected, expected]


LOOP = "{% for a in range(100000) %}"
HOSTILE = {
    "endless loops": LOOP * 4 + "{% set x = a %}" + "{% endfor %}" * 4,
    "a text without end": "{% set n = namespace(x='a') %}" + LOOP + "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "a giant": "{{ 'a' * 10**10 }}",
    "a giant number": "{% set x = 9 ** (9 ** 9) %}",
    "a wide field": "{{ '%10000000000d' | format(1) }}",
    "a list": "{{ ([1] * 10**10) | length }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_too_much_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 2)
    began = time.monotonic()
    with pytest.raises(DataError, match="the model's chat template passes the limits of") as error:
        chat.as_text([PROMPT], templated(HOSTILE[name]))
    assert error.value.hint
    assert time.monotonic() - began < 60


REFUSED = {
    "a long text": ("{{ 'a' * 2 * 10**6 }}", "2,000,000 characters"),
    "a range": ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
    "an escape": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "no template": ("{% for", "unexpected 'end of template'"),
    "its own words": ("{{ raise_exception('roles must\nalternate') }}", "roles must"),
    "a fault": ("{{ 1 / 0 }}", "division by zero"),
    "depth": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_fails_is_named_with_its_prompt(name: str) -> None:
    template, said = REFUSED[name]
    with pytest.raises(DataError, match=r"a\.jsonl:1: the model's chat template refuses these messages") as error:
        chat.as_text([PROMPT], templated(template))
    assert said in error.value.what
