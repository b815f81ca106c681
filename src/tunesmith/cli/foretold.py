"""What a job would take, as a person reads it; and told here, without a server."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cli.terminal import JOB_FAILED, CommandError, show, show_json
from tunesmith.cli.text import bytes_text, duration_text

if TYPE_CHECKING:
    from tunesmith.cli.foreground import Foreground
    from tunesmith.data.render import Renderer
    from tunesmith.hub.folder import ModelFolder
    from tunesmith.spec.estimate import Estimate
    from tunesmith.spec.pipe import Probed


def show_estimate(told: dict[str, Any]) -> None:
    """`told` has the fields of `spec.estimate.Estimate`."""
    about = "" if told["is_exact"] else "about "
    by = "as fast as jobs here ran" if told["seconds_from"] == "history" else "a guess"
    share = told["trainable_parameters"] / max(1, told["parameters"])
    lines = {
        "parameters": f"{told['parameters']:,}",
        "trained": f"{told['trainable_parameters']:,} ({share:.1%})",
        "rows": f"{told['rows']:,}, {about}{told['samples']:,} samples an epoch",
        "longest sample": f"{about}{told['longest_sample_tokens']:,} tokens",
        "steps": f"{about}{told['steps']:,}",
        "tokens": f"{about}{told['tokens']:,}, {told['label_tokens']:,} of them learnt",
        "time": f"about {duration_text(told['seconds'])} ({by})",
        "memory": f"up to {bytes_text(told['peak_memory_bytes'])}",
        "a checkpoint": bytes_text(told["checkpoint_bytes"]),
        "disk": bytes_text(told["disk_bytes"]),
    }
    wide = max(map(len, lines))
    for name, text in lines.items():
        show(f"{name:<{wide}}  {text}")


def estimate_here(spec_path: Path, out: Path | None, should_probe: bool, as_json: bool) -> None:
    """Tell what the file's training would take; with a probe, make a step of it."""
    from tunesmith.cli.foreground import Foreground

    training = Foreground.prepare(spec_path, out)
    told = _foretold(training).model_dump(mode="json")
    if not as_json:
        show_estimate(told)
    if should_probe:
        told["probe"] = _probed(training).model_dump(mode="json", exclude={"type"})
    if as_json:
        show_json(told)
    elif should_probe:
        show_probe(told)


def show_probe(told: dict[str, Any]) -> None:
    probed = told["probe"]
    whole = duration_text(told["steps"] * probed["seconds"])
    show(
        f"\na step on the {probed['samples']:,} longest samples ({probed['tokens']:,} tokens): "
        f"{probed['seconds']:.3g} s, {bytes_text(probed['peak_memory_bytes'])}; "
        f"{told['steps']:,} such steps would take {whole}"
    )


def _foretold(training: "Foreground") -> "Estimate":
    from tunesmith.data.measure import measure
    from tunesmith.data.reading import Reading
    from tunesmith.data.rows import RowIndex
    from tunesmith.hub.checks import cut_of, looked_at
    from tunesmith.hub.estimate import foretell
    from tunesmith.hub.folder import read

    spec, folder = training.spec, read(Path(training.inputs.model))
    with RowIndex.open(training.inputs.dataset, Reading.of(spec)) as index:
        renderer = _renderer(training, folder, index.format)
        found = measure(looked_at(spec, index), renderer, cut_of(spec, folder))
    rewarding = [read(Path(one)) for one in training.inputs.reward_models.values()]
    return foretell(spec, folder, found, (), is_gpu=False, rewarding=rewarding)


def _renderer(training: "Foreground", folder: "ModelFolder", format: str) -> "Renderer":
    from tunesmith.data import brought
    from tunesmith.data.render import Renderer

    own = training.inputs.tokenizer
    if own is not None:
        return brought.load(Path(own), own, follows_links=True)
    return Renderer.load(folder.tokenizer_place).with_fallback(format)


def _probed(training: "Foreground") -> "Probed":
    """Raises CommandError where the step could not be made."""
    from tunesmith.cli.foreground import Trainer
    from tunesmith.spec.pipe import Failed, Probed, TrainerTask

    found: Probed | None = None
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        task = TrainerTask(
            job_id="00000000",
            fence=1,
            spec=training.spec,
            inputs=training.packed(Path(folder)),
            attempt_dir=str(Path(folder) / "attempt"),
            is_probe=True,
        )
        with Trainer(task, log) as trainer:
            for event in trainer.events():
                found = event if isinstance(event, Probed) else found
        if found is not None:
            return found
        last = trainer.last
        if isinstance(last, Failed):
            raise CommandError(last.message, last.hint or last.failure_class.hint, JOB_FAILED)
        raise CommandError("the trainer ended before its step was made", code=JOB_FAILED)
