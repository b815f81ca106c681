"""`data check` and `data preview`: a data set seen before it is trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith.cli.columns import ColumnsOption, columns_of
from tunesmith.cli.near import names_in, near_name
from tunesmith.cli.place import JsonOption, KeyOption, ServerOption, WorkspaceOption
from tunesmith.cli.terminal import FAILED, NOT_FOUND, CommandError, show_json, tell

if TYPE_CHECKING:
    from tunesmith.data.reading import Reading
    from tunesmith.data.rows import FileReport
    from tunesmith.data.twins import Twins
    from tuning_sdk import Preview

Overlong = Literal["drop", "truncate", "refuse"]
TrainOn = Literal["completions", "all"]
Answer = Literal["chosen", "rejected"]
PretrainOption = Annotated[
    bool, typer.Option("--pretrain", help="As plain text for pretraining, packed to blocks.")
]
CleanOption = Annotated[
    bool, typer.Option("--clean", help="For pretraining: remove control characters.")
]


def check(
    path: Annotated[Path, typer.Argument(metavar="DATA", help="The file.")],
    validation: Annotated[
        Path | None,
        typer.Option("--eval", metavar="DATA", help="Rows of it that stand in DATA are told."),
    ] = None,
    columns: ColumnsOption = None,
    pretrain: PretrainOption = False,
    clean: CleanOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check the rows of a file, here and without a server. Exit code 1 where there is a fault."""
    from tunesmith.data.rows import check_file

    _refuse_missing(path)
    reading = _reading(columns, pretrain, clean)
    report = check_file(path.resolve(), name=path.name, reading=reading)
    shared = None if validation is None else _shared(path, validation, reading)
    if as_json:
        told = {} if shared is None else {"overlap": shared.model_dump(mode="json")}
        show_json(report.model_dump(mode="json") | told)
    else:
        _tell_report(path.name, report, pretrain)
        if shared:
            _tell_shared(shared)
    is_other = pretrain and report.format not in ("text", None)
    if is_other:
        raise CommandError(f"pretraining reads plain text; these rows are in {report.format}")
    if not report.is_usable:
        raise typer.Exit(FAILED)


def preview(
    dataset: Annotated[str, typer.Argument(metavar="DATA", help="A file or a name.")],
    model: Annotated[str, typer.Option("-m", "--model", help="A folder or a name.")],
    row: Annotated[int | None, typer.Option(min=1, help="Its number (default 1).")] = None,
    line: Annotated[int | None, typer.Option(min=1, help="A line of the file instead.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens.")] = 1024,
    overlong: Annotated[Overlong, typer.Option(help="For longer rows.")] = "drop",
    train_on: Annotated[TrainOn, typer.Option(help="What is learnt.")] = "completions",
    answer: Annotated[Answer, typer.Option(help="Of a pair.")] = "chosen",
    columns: ColumnsOption = None,
    pretrain: PretrainOption = False,
    clean: CleanOption = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="For pretraining: in place of the model's own.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE,…", help="For pretraining: by a row's metadata."),
    ] = None,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a row as tokens: trained ones bright, the others dim. Asks the server where one runs."""
    fields: dict[str, Any] = {
        "row": row,
        "line": line,
        "max_length": max_length,
        "overlong": overlong,
        "train_on": train_on,
        "answer": answer,
        "columns": columns_of(columns) or {},
        "method": "pretrain" if pretrain else "sft",
        "clean": clean,
        **({"tokenizer": tokenizer} if tokenizer else {}),
        **({"sampling": {"where": _where(where)}} if where else {}),
    }
    found = _asked(dataset, model, fields, server, api_key, workspace)
    if as_json:
        show_json(found.model_dump(mode="json"))
        return
    from tunesmith.cli import painted

    painted.show_preview(found)


def _where(told: list[str]) -> dict[str, list[str]]:
    """Raises CommandError."""
    parted = [one.partition("=") for one in told]
    if not all(name and values for name, _, values in parted):
        raise CommandError("--where: write FIELD=VALUE, or FIELD=VALUE,VALUE", code=2)
    return {name: values.split(",") for name, _, values in parted}


def _asked(
    dataset: str,
    model: str,
    fields: Mapping[str, Any],
    server: str | None,
    api_key: str | None,
    workspace: Path | None,
) -> "Preview":
    from tunesmith.cli.place import opened, operator_place

    place = operator_place(server, api_key, workspace)
    if place is None:
        return _here(dataset, model, fields)
    with opened(place) as client:
        return client.datasets.preview(dataset, model, **fields)


def _here(dataset: str, model: str, fields: Mapping[str, Any]) -> "Preview":
    """Without a server, over files."""
    try:
        from tunesmith.data import brought
        from tunesmith.data.render import Renderer
        from tunesmith.data.scan import open_regular
        from tunesmith.hub.folder import ModelFolder, read
        from tunesmith.hub.preview import File, look
    except ModuleNotFoundError as error:
        raise CommandError(
            f"no server runs here, and {error.name} is not installed",
            "name a server with --server URL, or pip install 'tunesmith[server]'",
        ) from None
    from tuning_sdk import Preview

    def renderer_of(folder: ModelFolder, format: str) -> Renderer:
        if own := fields.get("tokenizer"):
            return brought.load(Path(own), own, follows_links=True)
        return Renderer.load(folder.tokenizer_place).with_fallback(format)

    path, place = Path(dataset), Path(model)
    _refuse_missing(path)
    _refuse_missing(place)
    with open_regular(path.resolve()) as file:
        at = File(file, path.resolve(), path.suffix.lower())
        found = look(at, read(place.resolve(), "--model"), _wanted(fields), renderer_of)
    told = {name: getattr(found, name) for name in ("format", "row", "line", "max_length")}
    return Preview.of({**told, **found.preview.model_dump()})


def _wanted(fields: Mapping[str, Any]) -> Any:
    """By the request's own rules. Raises CommandError."""
    from pydantic import ValidationError

    from tunesmith.api.families.data import PreviewRequest

    try:
        asked = PreviewRequest(dataset_path="data", model_name="model", **fields)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"]).replace("_", "-")
        raise CommandError(f"--{name}: {fault['msg'].lower()}", code=2) from None
    return asked.to_wanted()


def _reading(columns: list[str] | None, is_pretrain: bool, is_clean: bool) -> "Reading":
    from tunesmith.data.reading import Reading

    controls: Literal["removed", "refused"] = "removed" if is_clean else "refused"
    return Reading.by(columns_of(columns), controls if is_pretrain else "kept")


def _tell_report(name: str, report: "FileReport", is_pretrain: bool) -> None:
    from tunesmith.cli.text import bytes_text
    from tunesmith.data.alike import REPEATED

    known = report.format or "no known format"
    tell(f"{name}: {report.num_samples:,} rows, {known}, {bytes_text(report.size)}")
    if report.ignored_fields:
        tell(f"ignored columns: {', '.join(report.ignored_fields)}")
    repeated = report.duplicates.sentence(REPEATED)
    if repeated:
        tell(f"warning: {repeated}")
    for fault in report.faults:
        place = f"{fault.unit} {fault.line}" if fault.line else "the file"
        tell(f"  {place}{', ' + fault.loc if fault.loc else ''}: {fault.msg}")
    if report.fault_count > len(report.faults):
        tell(f"  … and {report.fault_count - len(report.faults):,} more")
    tell(f"{report.fault_count:,} faults" if report.fault_count else "no fault")


def _shared(training: Path, validation: Path, reading: "Reading") -> "Twins":
    from tunesmith.data.alike import overlap

    _refuse_missing(validation)
    return overlap(training.resolve(), validation.resolve(), reading)


def _tell_shared(shared: "Twins") -> None:
    from tunesmith.data.alike import OVERLAPPING

    if shared.count:
        tell(f"warning: {shared.sentence(OVERLAPPING)}")


def _refuse_missing(path: Path) -> None:
    if not path.exists():
        near = near_name(path.name, names_in(path.absolute().parent))
        raise CommandError(f"nothing lies at {str(path)!r}{near}", code=NOT_FOUND)
