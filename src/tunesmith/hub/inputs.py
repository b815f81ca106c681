"""What an attempt on another host fetches: its model, its data, a checkpoint to go on from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.tokens import FILES, MORE_TEMPLATES
from tunesmith.errors import BadRequestError, NotFoundError
from tunesmith.hub.folder import ModelFolder, read
from tunesmith.manifest import MANIFEST
from tunesmith.spec.records import Job, Source
from tunesmith.spec.transfer import (
    MAX_FILES,
    InputListing,
    RemoteFile,
    RemoteFolder,
    RemoteModel,
    check_name,
)

if TYPE_CHECKING:
    from tunesmith.hub import Hub

Named = tuple[str, Path]
"""A file's name in its folder, and where it is."""


def listing(hub: "Hub", job: Job) -> InputListing:
    """Reads every byte, the first time. Raises BadRequestError, NotFoundError where one is gone."""
    model = _model(hub, job.model)
    resume = None if job.resume_from is None else Path(job.resume_from)
    return InputListing(
        model=model.model,
        base=model.base,
        dataset=_data(hub, job.dataset),
        eval_dataset=None if job.eval_dataset is None else _data(hub, job.eval_dataset),
        reward_models={one.name: _model(hub, one) for one in job.reward_models},
        tokenizer=None if job.tokenizer is None else _data(hub, job.tokenizer),
        resume_from=None if resume is None else _folder(hub, str(resume), tree(resume)),
    )


def find(hub: "Hub", job: Job, sha256: str) -> Path:
    """One of the files of the listing, by its bytes. Raises NotFoundError."""
    for source in (job.dataset, job.eval_dataset, job.tokenizer):
        if source is not None and source.sha256 == sha256:
            return Path(source.path)
    for path in _all(job):
        try:
            if hub.digests.of(path) == sha256:
                return path
        except OSError:
            continue
    raise NotFoundError("this attempt has no such file; ask for its inputs again")


def _all(job: Job) -> Iterator[Path]:
    models = [read(Path(source.path)) for source in (job.model, *job.reward_models)]
    for folder in dict.fromkeys(place for one in models for place in (one.path, one.base)):
        yield from (path for _, path in model_files(folder))
    if job.resume_from is not None:
        yield from (path for _, path in tree(Path(job.resume_from)))


def base_name(model: ModelFolder) -> str:
    """As the adapter spells it, so that what is made from it spells it the same."""
    spelled = json.loads((model.path / "adapter_config.json").read_bytes())
    return str(spelled["base_model_name_or_path"])


def model_files(folder: Path) -> list[Named]:
    """What a trainer reads of a model: configurations, weights, tokenizer, templates.

    Links out of the folder were judged at submit for all but the tokenizer's old files, so those
    count only where they are files themselves.
    """
    judged = read(folder).files
    found = {path.name: path for path in judged if path.parent == folder}
    for name in FILES:
        path = folder / name
        if name not in found and path.is_file() and not path.is_symlink():
            found[name] = path
    templates = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    more = [(f"{MORE_TEMPLATES}/{path.name}", path) for path in templates]
    return [*sorted(found.items()), *((name, path) for name, path in more if not path.is_symlink())]


def tree(folder: Path) -> list[Named]:
    """A sealed folder: all its files, its manifest too."""
    if not (folder / MANIFEST).is_file():
        raise NotFoundError(f"{folder.name}: no checkpoint lies there any more")
    return [
        (path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    ]


def _model(hub: "Hub", source: Source) -> RemoteModel:
    model = read(Path(source.path))
    base = None
    if model.is_adapter:
        base = _folder(hub, base_name(model), model_files(model.base))
    return RemoteModel(model=_folder(hub, source.path, model_files(model.path)), base=base)


def _data(hub: "Hub", source: Source) -> RemoteFile:
    return _file(hub, (Path(source.path).name, Path(source.path)))


def _folder(hub: "Hub", name: str, files: list[Named]) -> RemoteFolder:
    if len(files) > MAX_FILES:
        raise BadRequestError(f"{Path(name).name}: over {MAX_FILES} files")
    return RemoteFolder(name=name, files=tuple(_file(hub, named) for named in files))


def _file(hub: "Hub", named: Named) -> RemoteFile:
    name, path = named
    try:
        check_name(name)
        digest = hub.digests.of(path)
        return RemoteFile(name=name, size=path.stat().st_size, sha256=digest)
    except ValueError as error:
        raise BadRequestError(f"a file that cannot be sent: {error}") from None
    except OSError as error:
        raise NotFoundError(f"{path.name} is not there any more ({error.strerror})") from None
