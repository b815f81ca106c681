"""`train SPEC.yaml` here and now without a server, `train sft` and `dpo` as jobs of a server."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from tunesmith.cli.columns import ColumnsOption, columns_of
from tunesmith.cli.place import JsonOption, KeyOption, ServerOption, WorkspaceOption, client_for
from tunesmith.cli.sweeps import SweepOption, sweep_of
from tunesmith.cli.terminal import USAGE, CommandError, show, show_json, tell

if TYPE_CHECKING:
    from typer._click import Context

    from tuning_sdk import TuningClient
    from tuning_sdk.models import CreatedJob, Estimate

T = TypeVar("T")
_HERE = "here"


class _SpecOrCommand(TyperGroup):
    """`train sft …` and `train dpo …` are commands; whatever else follows is a spec file."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in {"--help", "-h"}:
            args = [_HERE, *args]
        return super().parse_args(ctx, args)


train = typer.Typer(
    cls=_SpecOrCommand,
    no_args_is_help=True,
    help=(
        "Train from a file, in the foreground: `tunesmith train SPEC.yaml [--out DIR]`. "
        "`tunesmith train here --help` shows its options."
    ),
)


EstimateOnly = Annotated[
    bool, typer.Option("--estimate", help="Tell what it would take, and start nothing.")
]


@train.command(_HERE)
def train_here(
    spec: Annotated[
        Path | None, typer.Argument(metavar="SPEC.yaml", help="What to train: see --example.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where the model goes (outputs/<file's name>)."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget the checkpoints of an earlier try.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as JSON.")] = False,
    estimate: EstimateOnly = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="--estimate by a step on the longest samples, made here."),
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the file's JSON schema.")] = False,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Print the keys of files with a task_type.")
    ] = False,
    example: Annotated[bool, typer.Option("--example", help="Print an example file.")] = False,
) -> None:
    """Train in the foreground, without a server.

    Ctrl-C saves a checkpoint and stops, a second one kills. The same command goes on from there.
    """
    from tunesmith.cli import specfile
    from tunesmith.spec import written

    if schema:
        show_json(written.schema())
    elif tasks:
        from tunesmith.spec.tasks.table import table

        show(table().rstrip())
    elif example:
        show(specfile.EXAMPLE.rstrip())
    elif spec is None:
        raise CommandError(
            "no SPEC.yaml was given", "`tunesmith train --example` prints one", USAGE
        )
    else:
        from tunesmith.cli.foreground import Foreground

        if estimate or probe:
            from tunesmith.cli.foretold import estimate_here

            estimate_here(spec, out, should_probe=probe, as_json=as_json)
            return
        raise typer.Exit(Foreground.prepare(spec, out, fresh).run(as_json))


Model = Annotated[str, typer.Option("-m", "--model", help="A folder, a name, a hub id.")]
Dataset = Annotated[str, typer.Option("-d", "--dataset", help="A file or a name.")]
OutputDir = Annotated[str | None, typer.Option(help="Where the model goes.")]
EvalDataset = Annotated[str | None, typer.Option(help="For validation.")]
Holdout = Annotated[
    float | None, typer.Option(help="Share of the rows kept back for validation, such as 0.05.")
]
BatchSize = Annotated[int | None, typer.Option(help="Default 4.")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", "--lr")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens.")]
UseLora = Annotated[bool | None, typer.Option("--lora/--full", help="Adapters or all.")]
LoraRank = Annotated[int | None, typer.Option(help="The adapters' rank.")]
Rslora = Annotated[
    bool | None, typer.Option("--rslora", help="Scale adapters by alpha / sqrt(rank).")
]
Dora = Annotated[
    bool | None, typer.Option("--dora", help="Train the weights' lengths by themselves.")
]
Seed = Annotated[int | None, typer.Option()]
Upload = Annotated[
    bool, typer.Option("--upload", help="Send the data set's file to the server first.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow the job to its end.")]


@train.command("sft")
def train_sft(
    model: Model,
    dataset: Dataset,
    output_dir: OutputDir = None,
    eval_dataset: EvalDataset = None,
    holdout: Holdout = None,
    epochs: Annotated[float | None, typer.Option(help="Default 3.")] = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    max_length: MaxLength = None,
    lora: UseLora = None,
    lora_r: LoraRank = None,
    rslora: Rslora = None,
    dora: Dora = None,
    seed: Seed = None,
    sweep: SweepOption = None,
    columns: ColumnsOption = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of POST /train/sft."),
    ] = None,
    upload: Upload = False,
    wait: Wait = False,
    estimate: EstimateOnly = False,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start supervised fine-tuning on the server."""
    fields = {
        "output_dir": output_dir,
        "eval_dataset_path": eval_dataset,
        "holdout": holdout,
        "num_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "use_lora": lora,
        "lora_r": lora_r,
        "use_rslora": rslora,
        "use_dora": dora,
        "seed": seed,
        "sweep": sweep_of(sweep),
        "columns": columns_of(columns),
        **_assignments(more or []),
    }
    with client_for(server, api_key, workspace) as client:
        ways = Ways(upload, wait, as_json)
        if estimate:
            _estimate(client, client.jobs.estimate_sft, (model, dataset), fields, ways)
        else:
            _start(client, client.jobs.train_sft, (model, dataset), fields, ways)


@train.command("dpo")
def train_dpo(
    model: Model,
    dataset: Dataset,
    output_dir: OutputDir = None,
    eval_dataset: EvalDataset = None,
    holdout: Holdout = None,
    beta: Annotated[float | None, typer.Option(help="Default 0.1.")] = None,
    loss: Annotated[str | None, typer.Option(help="Default sigmoid.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Default 1.")] = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    max_length: MaxLength = None,
    lora: UseLora = None,
    lora_r: LoraRank = None,
    rslora: Rslora = None,
    dora: Dora = None,
    seed: Seed = None,
    sweep: SweepOption = None,
    columns: ColumnsOption = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of POST /train/dpo."),
    ] = None,
    upload: Upload = False,
    wait: Wait = False,
    estimate: EstimateOnly = False,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start preference training (DPO) on the server, on prompt, chosen and rejected."""
    fields = {
        "output_dir": output_dir,
        "eval_dataset_path": eval_dataset,
        "holdout": holdout,
        "beta": beta,
        "loss": loss,
        "num_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "use_lora": lora,
        "lora_r": lora_r,
        "use_rslora": rslora,
        "use_dora": dora,
        "seed": seed,
        "sweep": sweep_of(sweep),
        "columns": columns_of(columns),
        **_assignments(more or []),
    }
    with client_for(server, api_key, workspace) as client:
        ways = Ways(upload, wait, as_json)
        if estimate:
            _estimate(client, client.jobs.estimate_dpo, (model, dataset), fields, ways)
        else:
            _start(client, client.jobs.train_dpo, (model, dataset), fields, ways)


@dataclass(frozen=True)
class Ways:
    upload: bool
    wait: bool
    as_json: bool


def _start(
    client: "TuningClient",
    submit: Callable[..., "CreatedJob"],
    inputs: tuple[str, str],
    fields: dict[str, Any],
    ways: Ways,
) -> None:
    """`inputs`: model and data set. Fields of None are left out."""
    from tunesmith.cli.jobs import started

    created = _asked(client, submit, inputs, fields, ways)
    raise typer.Exit(started(client, created, ways.wait, ways.as_json))


def _estimate(
    client: "TuningClient",
    estimate: Callable[..., "Estimate"],
    inputs: tuple[str, str],
    fields: dict[str, Any],
    ways: Ways,
) -> None:
    from tunesmith.cli.foretold import show_estimate

    told = _asked(client, estimate, inputs, fields, ways).model_dump(mode="json")
    if ways.as_json:
        show_json(told)
    else:
        show_estimate(told)


def _asked(
    client: "TuningClient",
    ask: Callable[..., T],
    inputs: tuple[str, str],
    fields: dict[str, Any],
    ways: Ways,
) -> T:
    model, dataset = inputs
    given = {name: value for name, value in fields.items() if value is not None}
    path = _uploaded(client, dataset, given.get("columns")) if ways.upload else dataset
    return ask(model, path, **given)


def _uploaded(client: "TuningClient", path: str, columns: dict[str, str] | None) -> str:
    from tunesmith.cli.sending import Sending

    with Sending(Path(path).name) as sending:
        stored = client.datasets.upload(path, sending.take, columns=columns)
    tell(f"{stored.dataset_path}: {stored.num_samples} samples, {stored.format}")
    return stored.dataset_path


def _assignments(texts: list[str]) -> dict[str, Any]:
    """`name=value` each, the value read as YAML. Raises CommandError."""
    from tunesmith.spec import yaml_guard

    fields = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise CommandError(f"--set {text!r} has to be FIELD=VALUE", code=USAGE)
        fields[name] = yaml_guard.load(value)
    return fields
