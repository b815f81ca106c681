"""Rows that say the same, in one file or in two: told of, or refused."""

from contextlib import suppress
from pathlib import Path

from tunesmith.data import scan, twins
from tunesmith.data.reader import Reader
from tunesmith.data.reading import Reading
from tunesmith.data.row import Format, RowFault
from tunesmith.data.twins import Prints, Twins
from tunesmith.errors import ValidationError

REPEATED = "with the words of an earlier row"
OVERLAPPING = "of the validation set in the training set as well"
_REMEDIES = {
    "duplicates": "remove them, or leave duplicates: refuse out",
    "overlap": "remove them from one of the two, or leave overlap: refuse out",
}


def overlap(training: Path, validation: Path, reading: Reading = Reading()) -> Twins:
    """Rows of the second file that stand in the first, whatever formats the two are in.

    In constant memory; rows with a fault are passed over. Raises NotFoundError, BadRequestError.
    """
    with Prints(training.parent) as trained, Prints(validation.parent) as validated:
        _take(training, reading, trained)
        _take(validation, reading, validated)
        return twins.shared(trained, validated)


def warnings(duplicates: Twins, overlapping: Twins) -> tuple[str, ...]:
    """A sentence for each kind that there is."""
    told = duplicates.sentence(REPEATED), overlapping.sentence(OVERLAPPING)
    return tuple(sentence for sentence in told if sentence)


def refusal(option: str, found: Twins) -> str:
    """Of rows that are not to be there; `option` is `duplicates` or `overlap`."""
    what = REPEATED if option == "duplicates" else OVERLAPPING
    return f"{found.sentence(what)}; {_REMEDIES[option]}"


def refuse(option: str, found: Twins, field: str) -> None:
    """Raises ValidationError that names the first lines, where there are any."""
    if found.count:
        message = f"{field}: {refusal(option, found)}"
        raise ValidationError(message, param=field, details=_details(option, found, field))


def _details(option: str, found: Twins, field: str) -> list[dict[str, object]]:
    return [
        {
            "loc": [field, "line", one.line],
            "msg": f"says what line {one.first} says; {_REMEDIES[option]}",
            "type": "data",
        }
        for one in found.first
    ]


def _take(path: Path, reading: Reading, prints: Prints) -> None:
    with scan.open_regular(path) as file, suppress(RowFault):
        reader = Reader.of(file, path.suffix.lower(), reading)
        format: Format | None = "text" if reader.layout == "documents" else None
        for span in reader.spans(file):
            with suppress(RowFault):
                format = format or reader.detected(span)
                prints.add(reader.row(span, format))
