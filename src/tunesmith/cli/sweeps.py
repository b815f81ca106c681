"""`--sweep SETTING=VALUE,VALUE`: several configurations as one job, and what came of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.terminal import USAGE, CommandError, tell
from tunesmith.spec.sweep import TABLE, SweepTable

SweepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="SETTING=VALUE,…",
        help="Train each combination, as one job: --sweep learning_rate=1e-4,2e-4.",
    ),
]


def sweep_of(texts: list[str] | None) -> dict[str, Any] | None:
    """None where nothing is swept. Raises CommandError."""
    from tunesmith.spec import yaml_guard

    grid: dict[str, Any] = {}
    for text in texts or ():
        name, equals, values = text.partition("=")
        if not equals or not values or not name.isidentifier():
            raise CommandError(f"--sweep {text!r} has to be SETTING=VALUE,VALUE", code=USAGE)
        if name in grid:
            raise CommandError(f"--sweep gives {name} twice", code=USAGE)
        grid[name] = [yaml_guard.load(value) for value in values.split(",")]
    return {"grid": grid} if grid else None


def tell_table(artifact: Path) -> None:
    """A line for each configuration, where there were several."""
    place = artifact / TABLE
    if not place.is_file():
        return
    table = SweepTable.model_validate_json(place.read_bytes())
    width = max(len(one.name) for one in table.trials)
    for one in table.trials:
        found = [f"{one.name:{width}}", f"{one.steps} steps"]
        found += [f"loss {one.loss:.4f}"] if one.loss is not None else []
        found += [f"eval_loss {one.eval_loss:.4f}"] if one.eval_loss is not None else []
        found += ["best"] if one.name == table.best else []
        found += ["failed"] if one.status == "failed" else []
        settings = " ".join(f"{name}={value}" for name, value in one.settings.items())
        tell(f"  {'  '.join(found)}  {settings}")
