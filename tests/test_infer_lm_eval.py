"""The public lm-eval harness, as it is installed, over both kinds of completion."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

import infer_fixtures as made
from tunesmith.data.render import Renderer

pytestmark = pytest.mark.slow

TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "say": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "never said"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
SCRIPT = """
import json, sys, lm_eval
from lm_eval.tasks import TaskManager
url, folder, model = sys.argv[1:]
tasks = TaskManager(include_path=folder, include_defaults=False)
def run(kind, route, names, **more):
    told = f"model=tiny,num_concurrent=4,max_retries=1,base_url={url}/v1/{route}"
    found = lm_eval.simple_evaluate(kind, model_args=told + more.pop("args", ""), tasks=names,
                                    task_manager=tasks, bootstrap_iters=0, **more)
    return {name: [each["resps"] for each in found["samples"][name]] for name in names}
print(json.dumps({
    "completions": run("local-completions", "completions", ["choose", "say"],
                       args=f",tokenizer={model}"),
    "chat": run("local-chat-completions", "chat/completions", ["say"], apply_chat_template=True),
}))
"""
ROWS = [
    {"question": f"the fox number {n}", "choices": ["jumps", "sleeps again"], "answer": n % 2}
    for n in range(5)
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness was answered, by route and task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    model = made.model_folder(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    for name, task in TASKS.items():
        data = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        data += f"dataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        (folder / f"{name}.yaml").write_text(data + task)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment = {**made.ENVIRONMENT, **offline, "OPENAI_API_KEY": made.KEY}
    log = folder / "engine.log"
    with made.engine_process(
        f"--model={model}", "--model-name=tiny", "--precision=fp32", log=log
    ) as engine:
        command = [sys.executable, "-c", SCRIPT, engine.url, str(folder), str(model)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found | {"model": model}


def test_the_likelihoods_it_is_told_are_the_models(told: dict[str, Any]) -> None:
    tokenizer, net = made.tokenizer(), made.network("llama").requires_grad_(False)
    for row, answers in zip(ROWS, told["completions"]["choose"], strict=True):
        for choice, [[likelihood, is_greedy]] in zip(row["choices"], answers, strict=True):
            question = tokenizer.encode(row["question"]).ids
            whole = tokenizer.encode(row["question"] + " " + choice).ids
            logprobs = net(torch.tensor([whole])).logits[0].log_softmax(-1)
            said = range(len(question), len(whole))
            expected = sum(float(logprobs[at - 1, whole[at]]) for at in said)
            assert likelihood == pytest.approx(expected, abs=1e-2)
            assert is_greedy == all(int(logprobs[at - 1].argmax()) == whole[at] for at in said)


def test_what_it_lets_the_model_say_is_said(told: dict[str, Any]) -> None:
    renderer = Renderer.load(told["model"])
    texts = told["completions"]["say"]
    assert len(texts) == len(told["chat"]["say"]) == len(ROWS)
    net = made.network("llama")
    for row, [[text]] in zip(ROWS, texts, strict=True):
        ids = torch.tensor([renderer.encode_text(row["question"])])
        out = net.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert text == renderer.decode(out[0, ids.shape[1] :].tolist()).split("\n")[0]
