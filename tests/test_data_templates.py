import threading

import pytest

from tunesmith.data import fallbacks, templates
from tunesmith.data.sandbox import TemplateError
from tunesmith.data.templates import Template

HOSTILE = {
    "a long loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a range without end": "{% for i in range(10**9) %}x{% endfor %}",
    "a string multiplied": "{{ 'x' * 10**9 }}",
    "a string multiplied while it is compiled": "{% set a = 'x' * 1000000000 %}",
    "a list multiplied": "{{ [0] * 10**9 }}",
    "a string doubled": "{% set n = namespace(s='x') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a string doubled by plus": "{% set n = namespace(s='x') %}{% for i in range(60) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "a string doubled in a block": "{% set n = namespace(s='x') %}{% for i in range(60) %}"
    "{% set t %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = t %}{% endfor %}",
    "a string doubled by replace": "{% set n = namespace(s='xx') %}{% for i in range(60) %}"
    "{% set n.s = n.s.replace('x', n.s) %}{% endfor %}",
    "the replace filter": "{% set n = namespace(s='xx') %}{% for i in range(60) %}"
    "{% set n.s = n.s | replace('x', n.s) %}{% endfor %}",
    "join": "{% set s = 'xy' * 1000 %}{{ s | join(s) | join(s) }}",
    "the method join": "{% set s = 'xy' * 1000 %}{{ s.join(s).join(s) }}",
    "nested lists": "{% set n = namespace(l=[1]) %}{% for i in range(60) %}"
    "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "nested dicts": "{% set n = namespace(l={}) %}{% for i in range(60) %}"
    "{% set n.l = {'a': n.l, 'b': n.l} %}{% endfor %}{{ n.l | tojson }}",
    "dicts by a call": "{% set n = namespace(l=dict()) %}{% for i in range(60) %}"
    "{% set n.l = dict(a=n.l, b=n.l) %}{% endfor %}{{ n.l | tojson }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a product": "{% set n = namespace(i=3) %}{% for i in range(60) %}{% set n.i = n.i * n.i %}"
    "{% endfor %}{{ n.i }}",
    "a wide field": "{{ '%1000000000d' % 1 }}",
    "a wide field by a filter": "{{ '%1000000000d' | format(1) }}",
    "a wide field from an argument": "{{ '%*d' % (1000000000, 1) }}",
    "a wide field by a method": "{{ '{:1000000000}'.format(1) }}",
    "a wide field by a nested one": "{{ '{:{}}'.format(1, 1000000000) }}",
    "join of what has no length": "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "a field shown many times": "{{ ('{0}' * 9999).format('x' * 99999) }}",
    "an indented json": "{{ [[1, 2], [3]] | tojson(indent=100000) }}",
    "centred": "{{ 'x' | center(1000000000) }}",
    "justified": "{{ 'x'.ljust(1000000000) }}",
    "indented": "{{ ('x\n' * 9999) | indent(100000) }}",
    "tabs": "{{ ('\t' * 999).expandtabs(100000000) }}",
    "a deep call": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "calls that branch": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "much output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "attributes by filter": "{{ '' | attr('__class__') }}{{ ('' | attr('__class__')).mro() }}",
    "a namespace's own": "{% set n = namespace(__class__=1) %}",
    "an include": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}",
    "a parent": "{% extends 'x' %}",
    "a change of the messages": "{{ messages.append(1) }}",
    "a change of a message": "{{ messages[0].update(role='x') }}",
    "a method of the environment": "{{ self._TemplateReference__context.environment.tick() }}",
    "a format that looks inside": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "no jinja": "{% for %}",
    "open brackets": "{{ " + "(" * 5000,
    "too long": " " * (templates.MAX_TEMPLATE + 1),
    "an unknown name": "{{ nothing.at.all }}",
    "a division": "{{ 1 / 0 }}",
}


def rendered(source, messages=({"role": "user", "content": "x"},)):
    return Template(source).render(list(messages), None, False, {}).text


def outcome(source):
    try:
        return rendered(source)
    except TemplateError as error:
        return error.message


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_a_sentence(name):
    told = outcome(HOSTILE[name])
    assert "the chat template" in told or len(told) < 100
    assert len(told) < 700
    assert "<class" not in told


def test_a_loop_over_many_messages_is_within_the_budget():
    messages = [{"role": "user", "content": "안녕 " * 50}] * 1024
    source = "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}"
    assert rendered(source, messages) == "안녕 " * 50 * 1024


def test_a_long_message_is_within_the_budget():
    text = "漢字 😀 " * 200_000
    source = "{{ ('<' ~ messages[0].content.strip() + '>') | trim | replace('<', '[') }}"
    assert rendered(source, [{"content": text}]) == f"[{text.strip()}>"


def test_json_keeps_its_characters():
    assert rendered("{{ messages | tojson }}", [{"a": "한<글>'"}]) == '[{"a": "한<글>\'"}]'
    assert rendered("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}").startswith("{\n")


def test_loops_can_be_left_and_skipped():
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
    source += "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert rendered(source) == "02"


def test_a_filter_over_messages_works_as_usual():
    source = (
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
    )
    assert rendered(source) == "['x']"


def test_generation_marks_are_character_ranges():
    source = "한{% generation %}글😀{% endgeneration %}!"
    drawn = Template(source).render([], None, False, {})
    assert drawn.text == "한글😀!"
    assert drawn.marks == ((1, 3),)


def test_two_threads_have_a_budget_each():
    template = Template("{% for i in range(50000) %}{% endfor %}{{ messages[0].content }}")
    found = []

    def draw(number):
        found.append(template.render([{"content": str(number)}], None, False, {}).text)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [str(number) for number in range(8)]


@pytest.mark.parametrize("end", ["</s>", "'", "\\", "it's \\n"])
@pytest.mark.parametrize("kind", ["alpaca", "plain"])
def test_our_own_templates_hold_the_end_token_as_it_is(kind, end):
    source = fallbacks.fallback(kind, "", end)
    assert fallbacks.source_of(source) == kind
    assert end in rendered(source, [{"role": "assistant", "content": "x"}])
