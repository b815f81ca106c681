"""Small data sets made on the spot: text from the interpreter's own documentation, a tokenizer
trained on it, and tasks whose answers can be checked.

All of it is a function of its seed, and needs no network.
"""

import ast
import json
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tunesmith.data import fallbacks, tokens

END, PAD, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END, PAD, TURN, TURN_END)
"""Ids 0 to 3 of a tokenizer trained here."""
_MIN_DOCUMENT = 80
"""Characters: shorter docstrings say too little."""
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}
_SOUNDS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "ch", "sh", "st")
_VOWELS = ("a", "e", "i", "o", "u")
_MAX_QUESTIONS = 500_000
_TAILS = ("", "", "n", "r", "l", "s", "t")

Pair = tuple[str, str]
"""A question and its one right answer."""
Task = Callable[[int, int], list[Pair]]
"""(seed, count) → that many different questions, always the same ones."""


def documentation_text(limit_bytes: int, seed: int = 0) -> list[str]:
    """Documents of up to `limit_bytes` (UTF-8) in all, in an order that the seed decides.

    They are the help topics of the interpreter and the docstrings of the standard library, read
    out of its source files: no module is imported for it.
    """
    found: list[str] = []
    left = limit_bytes
    for text in _documents(Random(seed)):
        size = len(text.encode())
        if size > left:
            break
        found.append(text)
        left -= size
    return found


def _documents(random: Random) -> Iterator[str]:
    from pydoc_data.topics import topics

    sources: list[str | Path] = [*sorted(topics), *_library_files()]
    random.shuffle(sources)
    for source in sources:
        texts = [topics[source]] if isinstance(source, str) else _docstrings(source)
        yield from (text for text in map(str.strip, texts) if len(text) >= _MIN_DOCUMENT)


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)
    )


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [
        f"{getattr(node, 'name', path.stem)}: {text}"
        for node in ast.walk(tree)
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
    ]


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = 4096) -> Tokenizer:
    """A byte-level BPE tokenizer: any text in any script goes there and back.

    Digits stand alone, so that numbers are spelt the same way wherever they are.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, template: str | None = None, max_length: int = 2048
) -> None:
    """Into a model's folder, as transformers loads it. `template` is ChatML unless given;
    `max_length` in tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    source = template or fallbacks.fallback("chatml", "", END)
    (folder / tokens.TEMPLATE_FILE).write_text(source, encoding="utf-8", newline="")


def words(seed: int, count: int, longest: int = 11) -> list[str]:
    """Different made-up words of two or three syllables and at most `longest` letters, all small.

    Of at most six letters there are some 50,000.
    """
    _refuse_over(count)
    random = Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = random.choice((2, 2, 3))
        parts = (random.choice(_SOUNDS) + random.choice(_VOWELS) for _ in range(syllables))
        word = "".join(parts) + random.choice(_TAILS)
        if len(word) <= longest:
            found[word] = None
    return list(found)


def capitals(seed: int, count: int, longest: int = 11) -> list[Pair]:
    return [(f"Write {word} in capitals.", word.upper()) for word in words(seed, count, longest)]


def reversals(seed: int, count: int) -> list[Pair]:
    return [(f"Write {word} backwards.", word[::-1]) for word in words(seed, count)]


def first_letters(seed: int, count: int) -> list[Pair]:
    return [(f"What is the first letter of {word}?", word[0]) for word in words(seed, count)]


def lengths(seed: int, count: int) -> list[Pair]:
    return [(f"How many letters has {word}?", str(len(word))) for word in words(seed, count)]


def sums(seed: int, count: int) -> list[Pair]:
    """Of two numbers below 1000."""
    _refuse_over(count)
    random = Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        left, right = random.randrange(1000), random.randrange(1000)
        found[f"What is {left} + {right}?"] = str(left + right)
    return list(found.items())


def _refuse_over(count: int) -> None:
    if count > _MAX_QUESTIONS:
        raise ValueError(f"at most {_MAX_QUESTIONS} different ones can be made, not {count}")


TASKS: dict[str, Task] = {
    "capitals": capitals,
    "reversals": reversals,
    "first_letters": first_letters,
    "lengths": lengths,
    "sums": sums,
}


def split(task: Task, seed: int, train: int, held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Two parts of a task's questions that share none."""
    pairs = task(seed, train + held_out)
    return pairs[:train], pairs[train:]


def statements(seed: int, count: int, longest: int = 11) -> list[str]:
    """Lines for pretraining in which `capitals` can be seen, without its wording."""
    return [
        f"{word} in capitals is {word.upper()}, {word.upper()} in small letters is {word}"
        for word in words(seed, count, longest)
    ]


def write_chat(path: Path, pairs: Sequence[Pair]) -> None:
    """As OpenAI chat JSONL, a conversation a line."""
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_text(path: Path, documents: Sequence[str]) -> None:
    """As JSONL of plain documents, for pretraining."""
    with path.open("w", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
