"""Documents chosen and weighed by their metadata: which are read, how often, what is refused."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError as PydanticError
from sentencepiece import SentencePieceProcessor
from starlette.testclient import TestClient

from api_fixtures import make_workspace, open_door
from task_files import sentencepiece_model
from train_fixtures import Place, run_here, write_rows
from tunesmith.cli import main
from tunesmith.data.measure import measure
from tunesmith.data.reading import Reading
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex
from tunesmith.data.sampling import Chosen, choose, sampled
from tunesmith.errors import JobFailure, ValidationError
from tunesmith.hub.checks import looked_at
from tunesmith.hub.estimate import foretell
from tunesmith.hub.folder import read
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.sampling import Sampling
from tunesmith.spec.train import Pretrain, Run

LANGS = ("ko", "zh", "en")
ROWS = [
    {"text": f"강물 {at} river", "metadata": {"lang": LANGS[at % 3], "year": 2000 + at % 5}}
    for at in range(60)
]
BY_LANG = {"field": "lang", "values": {"ko": 2.0, "zh": 1.5}, "default": 0.25}


def sampling(**told: Any) -> Sampling:
    return Sampling.model_validate(told)


def chosen(path: Path, asked: Sampling) -> Chosen:
    with RowIndex.open(path, Reading(with_metadata=True)) as index:
        return choose(index, asked)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("sampling") / "text.jsonl", ROWS)


def test_a_weight_is_how_often_a_document_is_read_on_average(corpus: Path) -> None:
    found = chosen(corpus, sampling(weights=BY_LANG))
    read = [
        Counter(draw.place(at) for at in range(len(draw)))
        for draw in (found.draw(7, epoch) for epoch in range(200))
    ]
    mean = {
        lang: sum(each[at] for each in read for at in range(60) if at % 3 == number) / 4000
        for number, lang in enumerate(LANGS)
    }
    assert mean["ko"] == 2
    assert mean["zh"] == pytest.approx(1.5, abs=0.05)
    assert mean["en"] == pytest.approx(0.25, abs=0.05)
    assert read[0] != read[1]
    assert list(found.draw(7, 1).ends) == list(found.draw(7, 1).ends)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "text parquet"])
def test_metadata_is_read_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind.split()[-1]}"
    texts = [{**row, "metadata": json.dumps(row["metadata"])} for row in ROWS]
    if kind == "jsonl":
        write_rows(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "metadata"])
            writer.writeheader()
            writer.writerows(texts)
    else:
        pq.write_table(pa.Table.from_pylist(texts if "text" in kind else ROWS), path)
    found = chosen(path, sampling(where={"lang": "ko", "year": [2000, "2001.0", "2001"]}))
    wanted = [at for at in range(60) if at % 3 == 0 and at % 5 < 2]
    assert list(found.places) == wanted
    assert found.left_out == 60 - len(wanted)


@pytest.mark.parametrize(
    ("rows", "asked", "told"),
    [
        (ROWS, {"where": {"lnag": "ko"}}, "none of 60 rows has 'lnag' .* 'lang', 'year'"),
        (ROWS, {"where": {"lang": "ja"}}, "leaves no document.*'lang' is 'ko', 'zh', 'en'"),
        (ROWS, {"weights": {"field": "lang", "values": {"ja": 1}, "default": 0}}, "no document"),
        ([{"text": "a"}], {"where": {"lang": "ko"}}, "rows need one"),
        ([{"text": "a", "metadata": "[1"}], {"where": {"lang": "ko"}}, "rows need one"),
        ([{"text": "a", "metadata": {"lang": {}}}], {"where": {"lang": "ko"}}, "no document"),
    ],
)
def test_what_no_row_has_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], asked: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError, match=told):
        chosen(write_rows(tmp_path / "text.jsonl", rows), sampling(**asked))


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"where": {"lang": []}},
        {"where": {"": ["ko"]}},
        {"where": {"lang": [["ko"]]}},
        {"where": {"lang": "k" * 2000}},
        {"weights": {"field": "lang", "values": {}}},
        {"weights": {"field": "lang", "values": {"ko": -1}}},
        {"weights": {"field": "lang", "values": {"ko": 1e9}}},
        {"weights": {"field": "lang", "values": {"ko": float("nan")}}},
        {"wher": {}},
    ],
)
def test_bounds(asked: dict[str, Any]) -> None:
    with pytest.raises(PydanticError):
        sampling(**asked)


def spec_of(**over: Any) -> Pretrain:
    told = {
        "model": "m",
        "dataset": "d",
        "sequence_length": 32,
        "optim": {"batch_size": 4, "epochs": 3},
        "run": Run(save_steps=3, keep_checkpoints=99, save_seconds=3600),
        "sampling": {"where": {"lang": ["ko", "zh"]}, "weights": BY_LANG},
    }
    return Pretrain.model_validate(told | over)


def test_a_training_reads_them_tells_of_it_and_resumes_bit_for_bit(
    corpus: Path, tmp_path: Path, tiny: Path
) -> None:
    place, spec = Place(tmp_path, tiny, corpus), spec_of(holdout=0.1)
    inputs = Inputs(model=str(tiny), dataset=str(corpus))
    whole = run_here(place.task(spec, inputs=inputs))
    [told] = [one["message"] for one in whole.of("notice") if one["code"] == "sampling"]
    assert told.startswith("sampling leaves out 20 of 60 documents; an epoch reads about 6")
    started = whole.of("started")[0]["detail"]
    assert started["rows"] + started["eval_rows"] == 40
    for at in (1, 3):
        resume = whole.of("checkpointed")[at]
        again = run_here(place.task(spec, inputs=inputs, resume_from=resume["path"]))
        rest = {n: loss for n, loss in whole.losses.items() if n > resume["step"]}
        assert again.losses == rest != {}


def test_the_estimate_counts_what_is_drawn(corpus: Path, tmp_path: Path, tiny: Path) -> None:
    spec = spec_of(optim={"batch_size": 4, "epochs": 1})
    with RowIndex.open(corpus, Reading.of(spec)) as index:
        looked = measure(looked_at(spec, index), Renderer.load(tiny), None)
    told = foretell(spec, read(tiny), looked, (), is_gpu=False)
    done = run_here(Place(tmp_path, tiny, corpus).task(spec)).last["detail"]
    assert (told.steps, told.tokens) == (done["steps"], done["tokens"])


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    place = make_workspace(tmp_path_factory.mktemp("sampled"))
    write_rows(place / "data" / "text.jsonl", ROWS)
    with open_door(place) as door:
        yield door


@pytest.fixture(scope="module")
def tiny(door: TestClient) -> Path:
    return Path(door.app.state.hub.workspace) / "models" / "tiny"  # type: ignore[attr-defined]


def test_a_tasks_file_asks_for_it_and_a_field_that_is_not_there_is_refused(
    door: TestClient,
) -> None:
    text = (
        "task_type: pretrain\nmodel: models/tiny\ndataset: data/text.jsonl\n"
        "sampling:\n  where: {lang: [ko, zh]}\n  weights: {field: lang, values: {ko: 2}}\n"
    )
    headers = {"Content-Type": "application/yaml"}
    answer = door.post("/train/config", content=text, headers=headers)
    assert answer.status_code == 200, answer.text
    told = door.get(f"/jobs/{answer.json()['job_id']}").json()
    assert told["config"]["sampling"]["where"] == {"lang": ["ko", "zh"]}
    assert told["estimate"]["rows"] == 60
    answer = door.post(
        "/train/config", content=text.replace("where: {l", "where: {_l"), headers=headers
    )
    assert answer.status_code == 422
    assert "none of 60 rows has '_lang' in its metadata" in answer.text


def test_a_preview_shows_the_blocks_of_what_is_chosen(door: TestClient) -> None:
    asked = {
        "dataset_path": "data/text.jsonl",
        "model_name": "models/tiny",
        "method": "pretrain",
        "sampling": {"where": {"year": 2001}},
    }
    answer = door.post("/data/preview", json=asked)
    assert answer.status_code == 200, answer.text
    numbers = [int(word) for word in answer.json()["text"].split() if word.isdigit()]
    assert numbers
    assert {number % 5 for number in numbers} == {1}
    assert door.post("/data/preview", json={**asked, "method": "sft"}).status_code == 400


def test_a_preview_with_another_tokenizer_has_its_ids(
    door: TestClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(door.app.state.hub.workspace)  # type: ignore[attr-defined]
    (place / "t.model").write_bytes(sentencepiece_model())
    write_rows(
        place / "data" / "one.jsonl", [{"text": "강물 river", "metadata": {"n": 1}}, ROWS[0]]
    )
    theirs = SentencePieceProcessor(model_file=str(place / "t.model"))
    asked = {
        "dataset_path": "data/one.jsonl",
        "model_name": "models/tiny",
        "method": "pretrain",
        "tokenizer": "t.model",
        "sampling": {"where": {"n": 1}},
    }
    answer = door.post("/data/preview", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["ids"] == [*theirs.encode("강물 river"), theirs.eos_id()]
    assert door.post("/data/preview", json=asked | {"tokenizer": "../x"}).status_code == 400
    line = f"data preview {place}/data/one.jsonl -m {place}/models/tiny --pretrain --json"
    more = f"--tokenizer {place}/t.model --where n=1,2 --workspace {tmp_path}"
    assert main([*line.split(), *more.split()]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == answer.json()["ids"]


def test_without_sampling_rows_are_read_as_they_are(corpus: Path) -> None:
    with RowIndex.open(corpus) as index:
        assert sampled(index, None, 1) is index


def test_weights_that_draw_nothing_are_refused_and_told_of_by_their_epoch(
    corpus: Path, tmp_path: Path, tiny: Path
) -> None:
    asked = {"weights": {"field": "lang", "values": {"ko": 1e-9}, "default": 0}}
    with (
        RowIndex.open(corpus, Reading(with_metadata=True)) as index,
        pytest.raises(ValidationError, match="sampling draws no document in the first epoch"),
    ):
        sampled(index, sampling(**asked), 42)
    inputs = Inputs(model=str(tiny), dataset=str(corpus))
    with pytest.raises(JobFailure, match="sampling draws no text in epoch 1"):
        run_here(Place(tmp_path, tiny, corpus).task(spec_of(sampling=asked), inputs=inputs))
