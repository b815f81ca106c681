"""Tiny real tokenizers, and chat templates in the shapes of the popular families."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tunesmith.spec.chat import Message

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 8,
    "user assistant system User: Assistant: ### Instruction: ### Response: " * 8,
    "안녕하세요, 세계! 你好,世界。 😀 def f(x):\n    return x + 1\n" * 8,
]
MARKS = (
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<bos>",
    "<eos>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|User|>",
    "<|Assistant|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<tool_call>",
    "</tool_call>",
)


@cache
def byte_level_json(bos: str = "", swallows: bool = False) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken(mark, rstrip=swallows, special=True) for mark in MARKS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer.to_str()


@cache
def sentence_piece_json() -> str:
    """As older Llama models have it: a space before the text, unknown characters as bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*MARKS[:3], *bytes_], show_progress=False
    )
    trained.train_from_iterator([TEXTS[0], TEXTS[1]], trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(list(MARKS[:3]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer.to_str()


@cache
def metaspace_json() -> str:
    """As newer ones: the space only before the first word of the text."""
    whole = json.loads(sentence_piece_json())
    whole["normalizer"] = None
    whole["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    return json.dumps(whole)


@dataclass(frozen=True)
class Family:
    name: str
    template: str
    tokenizer: str = field(default_factory=byte_level_json)
    specials: Mapping[str, str] = field(default_factory=dict)
    has_system: bool = True
    is_split: bool = True
    """The ids are those of `apply_chat_template`, since the pieces meet where it splits too."""
    is_stable: bool = True

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.tokenizer, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.specials}
        if self.template:
            config["chat_template"] = self.template
        text = json.dumps(config, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        return folder


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set ns = namespace(n=0) %}{{ bos_token }}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ (m.content | trim) "
    "~ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}"
    "{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and first %}{{ '<<SYS>>\n' + first + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content }}"
    "{{ '[/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant speak here') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + m['content'] + eos_token }}\n{% elif m['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + m['content'] + eos_token }}\n{% else %}\n"
    "{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + '\n\n' }}"
    "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
DEEPSEEK = (
    "{%- if not add_generation_prompt is defined -%}{%- set add_generation_prompt = false -%}"
    "{%- endif -%}{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{{ '<|User|>' + m.content }}{%- elif m.role == 'assistant' -%}"
    "{{ '<|Assistant|>' + m.content + eos_token }}{%- else -%}{{ m.content }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|Assistant|>' }}{%- endif -%}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{% set who = {'user': '<|USER_TOKEN|>', "
    "'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}[m.role] %}"
    "{{ '<|START_OF_TURN_TOKEN|>' + who + m.content | trim + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
QWEN_TOOLS = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n"
    "    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}\n"
    "    {{- '# Tools' }}\n    {%- for tool in tools %}\n        {{- '\\n' }}\n"
    "        {{- tool | tojson }}\n    {%- endfor %}\n    {{- '<|im_end|>\\n' }}\n"
    "{%- elif messages[0].role == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for m in messages %}\n"
    "    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}\n"
    "        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n"
    "    {%- elif m.role == 'assistant' %}\n        {{- '<|im_start|>assistant\\n' }}\n"
    "        {%- if m.content %}{{- m.content }}{%- endif %}\n"
    "        {%- for call in m.tool_calls or [] %}\n"
    "            {%- set call = call.function if call.function is defined else call %}\n"
    '            {{- \'<tool_call>\\n{"name": "\' ~ call.name ~ \'", "arguments": \' }}\n'
    "            {{- call.arguments | tojson }}\n            {{- '}\\n</tool_call>' }}\n"
    "        {%- endfor %}\n        {{- '<|im_end|>\\n' }}\n"
    "    {%- elif m.role == 'tool' %}\n"
    "        {{- '<|im_start|>tool\\n' + m.content + '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LEADING_BOS = "{{ bos_token }}" + CHATML
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LATE_END = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}"
    "{% if not loop.last %}{{ eos_token }}{% endif %}{% else %}{{ '<|user|>' + m.content }}"
    "{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)

_S = {"bos_token": "<s>", "eos_token": "</s>"}
_ML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_L3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>"}
_PIECE = sentence_piece_json()
FAMILIES = (
    Family("chatml", CHATML, specials=_ML),
    Family("llama-3", LLAMA_3, byte_level_json("<|begin_of_text|>"), _L3),
    Family("llama-2", LLAMA_2, _PIECE, _S, is_split=False),
    Family("llama-2-first", LLAMA_2, metaspace_json(), _S, is_split=False),
    Family("mistral", MISTRAL, byte_level_json("<s>"), _S, has_system=False),
    Family("gemma", GEMMA, byte_level_json("<bos>"), _GEMMA, has_system=False),
    Family("phi-3", PHI_3, byte_level_json(swallows=True), {"eos_token": "<|endoftext|>"}),
    Family("zephyr", ZEPHYR, specials=_S),
    Family("vicuna", VICUNA, _PIECE, _S, is_split=False),
    Family("alpaca", ALPACA, specials={"eos_token": "<|endoftext|>"}, is_split=False),
    Family("deepseek", DEEPSEEK, specials=_S),
    Family("command-r", COMMAND_R, byte_level_json("<bos>"), _GEMMA),
    Family("qwen-tools", QWEN_TOOLS, specials=_ML),
    Family("marked", MARKED, specials=_ML),
    Family("leading-bos", LEADING_BOS, byte_level_json("<s>"), _ML | {"bos_token": "<s>"}),
    Family("late-end", LATE_END, specials=_S, is_split=False),
)
PLAIN = Family("plain", "", specials={"eos_token": "<|endoftext|>"})
BY_NAME = {family.name: family for family in FAMILIES}


def says(role: str, content: str | None = None, **more: object) -> Message:
    return Message.model_validate({"role": role, "content": content, **more})


def conversations(has_system: bool) -> list[tuple[Message, ...]]:
    one = (says("user", "안녕하세요?"), says("assistant", "你好,世界 😀"))
    more = (
        *one,
        says("user", "The quick brown fox"),
        says("assistant", "jumps over\n\n  the lazy dog."),
        says("user", "def f(x):"),
        says("assistant", "return x + 1"),
    )
    system = (says("system", "Be brief — 짧게."), *more)
    return [one, more, system] if has_system else [one, more]
