"""An MLflow tracking server, by the few REST calls that a run needs: its package is not used."""

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2

TIMEOUT_SECONDS = 20.0
MAX_METRICS = 1000
"""In one call, as the server has it; of params and tags 100."""
MAX_PARAMS = 100
MAX_VALUE_LENGTH = 500
"""Of a param or a tag: what older servers keep too."""
MAX_KEY_LENGTH = 250
JOB_TAG = "tunesmith.job_id"
_ODD = re.compile(r"[^\w.\- /:]")

Metric = dict[str, Any]
Pairs = list[dict[str, str]]


class Away(Exception):
    """The server can't be reached, or is in no state to answer: all must wait."""


class Rejected(Exception):
    """The server answered that this can't be done."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message[:300]}")
        self.is_missing = code == "RESOURCE_DOES_NOT_EXIST"
        self.is_there_already = code == "RESOURCE_ALREADY_EXISTS"


class Tracking:
    """One a server. Every call raises Away or Rejected."""

    def __init__(self, url: str) -> None:
        self.url = without_password(url)
        parts = urlsplit(url)
        auth = (parts.username, parts.password or "") if parts.username else None
        self._client = httpx2.AsyncClient(
            base_url=f"{self.url}/api/2.0/mlflow/",
            auth=auth,
            timeout=TIMEOUT_SECONDS,
            trust_env=False,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def experiment(self, name: str) -> str:
        """The id of the experiment of that name, made where it is missing."""
        try:
            return await self._find_experiment(name)
        except Rejected as refusal:
            if not refusal.is_missing:
                raise
        try:
            made = await self._call("experiments/create", {"name": name})
            return str(made["experiment_id"])
        except Rejected as refusal:
            if not refusal.is_there_already:
                raise
            return await self._find_experiment(name)

    async def _find_experiment(self, name: str) -> str:
        found = await self._call("experiments/get-by-name", {"experiment_name": name}, "GET")
        return str(found["experiment"]["experiment_id"])

    async def find_run(self, experiment_id: str, job_id: str) -> str | None:
        """The oldest run that carries the job's id."""
        found = await self._call(
            "runs/search",
            {
                "experiment_ids": [experiment_id],
                "filter": f"tags.`{JOB_TAG}` = '{job_id}'",
                "order_by": ["attributes.start_time ASC"],
                "max_results": 1,
            },
        )
        runs = found.get("runs") or []
        return str(runs[0]["info"]["run_id"]) if runs else None

    async def create_run(
        self, experiment_id: str, name: str, user: str, start_ms: int, tags: Pairs
    ) -> str:
        asked = {
            "experiment_id": experiment_id,
            "run_name": cut(name),
            "user_id": cut(user),
            "start_time": start_ms,
            "tags": tags,
        }
        made = await self._call("runs/create", asked)
        return str(made["run"]["info"]["run_id"])

    async def log(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Sequence[dict[str, str]] = (),
        tags: Sequence[dict[str, str]] = (),
    ) -> None:
        """In as many calls as it takes. Sent again, points that are there stay as they are."""
        for start in range(0, max(len(params), len(tags)), MAX_PARAMS):
            part = slice(start, start + MAX_PARAMS)
            body = {"run_id": run_id, "params": params[part], "tags": tags[part]}
            await self._call("runs/log-batch", body)
        for start in range(0, len(metrics), MAX_METRICS):
            body = {"run_id": run_id, "metrics": metrics[start : start + MAX_METRICS]}
            await self._call("runs/log-batch", body)

    async def update(self, run_id: str, status: str, end_ms: int | None) -> None:
        body: dict[str, Any] = {"run_id": run_id, "status": status}
        if end_ms is not None:
            body["end_time"] = end_ms
        await self._call("runs/update", body)

    async def delete_run(self, run_id: str) -> None:
        await self._call("runs/delete", {"run_id": run_id})

    async def _call(self, path: str, body: dict[str, Any], method: str = "POST") -> Any:
        asked: dict[str, Any] = {"params": body} if method == "GET" else {"json": body}
        try:
            response = await self._client.request(method, path, **asked)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise Away(f"{self.url} does not answer ({type(error).__name__})") from None
        try:
            found = response.json()
        except ValueError:
            found = None
        if response.is_success and isinstance(found, dict):
            return found
        code = found.get("error_code") if isinstance(found, dict) else None
        if response.status_code in (400, 404, 409) and isinstance(code, str):
            raise Rejected(code, str(found.get("message", "")))
        raise Away(f"{self.url} answered {response.status_code}, which no MLflow server should")


def pairs(values: dict[str, Any]) -> Pairs:
    """As MLflow takes params and tags; what is None is left out."""
    return [
        {"key": key_for(name), "value": cut(str(value))}
        for name, value in values.items()
        if value is not None
    ]


def key_for(name: str) -> str:
    """A name that MLflow takes: no odd letters, and nothing that looks like a path upwards."""
    plain = _ODD.sub("_", name)[:MAX_KEY_LENGTH]
    is_path = any(part in ("", ".", "..") for part in plain.split("/"))
    return plain.replace("/", "_").replace("..", "_") or "_" if is_path else plain


def cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 1] + "…"


def without_password(url: str) -> str:
    parts = urlsplit(url)
    netloc = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), "", ""))


def run_page(url: str, experiment_id: str, run_id: str) -> str:
    return f"{without_password(url)}/#/experiments/{experiment_id}/runs/{run_id}"
