"""How models write calls of tools: what their chat templates taught them."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from tunesmith.errors import BadRequestError


@dataclass(frozen=True)
class Dialect:
    """A call is a JSON object with a name and arguments, or a name and the arguments' object,
    between marks."""

    name: str
    opening: str = ""
    """Before the calls; where it is empty, an answer that begins with an object is a call."""
    closing: str = ""
    """After a call, or after the last one."""
    arguments: str = "arguments"
    """The key of the arguments."""
    between: str = ""
    """Characters that may stand before and between calls, beside blanks."""
    silent: tuple[str, ...] = ()
    """Marks that may stand before a call and say nothing."""
    name_end: str = ""
    """Where it is given, a call is a name, this, and the arguments' object."""
    id_length: int = 24
    """Letters of a call's id: Mistral's template takes nine alone."""

    def marks(self, tokenizer: Tokenizer) -> dict[int, str]:
        """Its marks that are tokens of their own, which decoding may leave out."""
        texts = {self.opening, self.closing, self.name_end, *self.silent}
        added = tokenizer.get_added_tokens_decoder()
        return {id_: each.content for id_, each in added.items() if each.content in texts}


HERMES = Dialect("hermes", "<tool_call>", "</tool_call>")
MISTRAL = Dialect("mistral", "[TOOL_CALLS]", "]", between="[,", id_length=9)
MISTRAL_NAMED = Dialect("mistral_named", "[TOOL_CALLS]", name_end="[ARGS]", id_length=9)
GRANITE = Dialect("granite", "<|tool_call|>", "]", between="[,")
LLAMA = Dialect("llama", arguments="parameters", between=";", silent=("<|python_tag|>",))


def dialect_of(template: str | None) -> Dialect:
    """By what the template writes. Raises BadRequestError where it tells no calls that are read."""
    source = template or ""
    if "tools" in source:
        if "[TOOL_CALLS]" in source:
            return MISTRAL_NAMED if "[ARGS]" in source else MISTRAL
        if "<|tool_call|>" in source:
            return GRANITE
        if "<tool_call>" in source and "<function=" not in source:
            return HERMES
        if '"parameters"' in source and '"name"' in source:
            return LLAMA
    raise BadRequestError(
        "this model's chat template writes no calls of tools that are known here (Hermes and Qwen, "
        "Llama 3, Mistral, Granite); leave tools out, or ask with tool_choice: none",
        param="tools",
        error_code="unsupported_parameter",
    )
