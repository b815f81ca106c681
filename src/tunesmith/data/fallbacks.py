"""Chat templates of our own, for models that come without one.

Each begins with a note that tells which it is, so that it is known again in an artifact.
"""

_NOTE = "{#- tunesmith:%s -#}"
_ALPACA = """
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '### Response:\\n' + (message['content'] or '') + EOS + '\\n\\n' }}
    {%- elif message['role'] == 'system' %}
        {{- message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'tool' %}
        {{- '### Input:\\n' + message['content'] + '\\n\\n' }}
    {%- else %}
        {{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}"""
_CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
_PLAIN = """
{%- for message in messages %}
    {{- message['role'] | capitalize + ':\\n' + (message['content'] or '') }}
    {{- (EOS if message['role'] == 'assistant' else '') + '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\\n' }}
{%- endif %}"""
_FALLBACKS = {"alpaca": _ALPACA, "chatml": _CHATML, "plain": _PLAIN}


def fallback(kind: str, bos: str, eos: str) -> str:
    """A template for a model that has none: `alpaca`, `chatml` (where its marks are tokens of the
    model), or `plain`, which is made of text and the end token only. The tokens are written into
    it, so that it says the same wherever it is loaded; an empty `bos` adds none.
    """
    start = "{{- " + _quoted(bos) + " }}" if bos else ""
    return _NOTE % kind + start + _FALLBACKS[kind].replace("EOS", _quoted(eos))


def _quoted(token: str) -> str:
    return "'" + token.replace("\\", "\\\\").replace("'", "\\'") + "'"


def source_of(template: str) -> str:
    """`model`, or which of our own templates this one is."""
    for kind in _FALLBACKS:
        if template.startswith(_NOTE % kind):
            return kind
    return "model"
