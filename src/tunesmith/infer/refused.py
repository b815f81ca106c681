"""Options that OpenAI's API or other engines know and this one does not serve.

What is not known is passed over, as OpenAI does; what is known is never passed over in silence.
"""

from collections.abc import Mapping
from typing import Any

from tunesmith.errors import BadRequestError

Table = Mapping[str, tuple[Any, ...]]
"""By name: the values, beside null, that ask for nothing."""

_BOTH: Table = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "dry_multiplier": (0, 0.0),
    "early_stopping": (False,),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mirostat": (0,),
    "prompt_logprobs": (),
    "repeat_penalty": (1, 1.0),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "tfs_z": (1, 1.0),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
}
CHAT: Table = {
    **_BOTH,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
}
COMPLETIONS: Table = {
    **_BOTH,
    "add_special_tokens": (True,),
    "suffix": ("",),
    "tools": ([],),
    "top_logprobs": (),
}
EMBEDDINGS: Table = {
    "add_special_tokens": (True,),
    "embed_dtype": ("float32",),
    "input_type": (),
    "messages": ([],),
    "normalize": (True,),
    "truncate_prompt_tokens": (),
}


def refuse(body: Mapping[str, Any], table: Table) -> None:
    """Raise BadRequestError naming the first option that would have to be passed over."""
    for name in body.keys() & table.keys():
        value = body[name]
        neutral = table[name]
        if value is not None and not any(_is_same(value, each) for each in neutral):
            raise BadRequestError(
                f"{name} is not supported by this engine; leave it out",
                error_code="unsupported_parameter",
                param=name,
            )


def _is_same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and bool(value == neutral)
