"""The only reader of the environment: TUNESMITH_<FIELD>, for each field below."""

import os
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class Settings(BaseModel):
    """All that an operator can set. Every field is read from TUNESMITH_<NAME>."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workspace: Path = Field(default_factory=Path.cwd)
    """Where requests may read and write; state lives in its `.tunesmith`."""
    database_url: str = ""
    """SQLAlchemy URL; empty means `.tunesmith/db.sqlite`."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    base_url: str = ""
    """Where the command line finds a server; empty: the workspace's own, then 127.0.0.1:8000."""
    api_key: str = ""
    """What the command line sends."""
    allowed_roots: tuple[Path, ...] = ()
    """More folders that paths in requests may lie in; separated by `:`."""
    cors_origins: tuple[str, ...] = ()
    """Separated by commas; `null` for a page opened as a file."""
    cpu_slots: int = Field(0, ge=0, le=4096)
    """CPU jobs at once; 0: one a core."""
    memory_reserve_bytes: int = Field(1 << 30, ge=0)
    """Host memory that no job is given."""
    max_json_bytes: int = Field(1 << 20, ge=1024)
    max_yaml_bytes: int = Field(5 << 20, ge=1024, le=5 << 20)
    """Of a training configuration."""
    max_chat_bytes: int = Field(16 << 20, ge=1024)
    max_upload_bytes: int = Field(20 << 30, ge=1024)
    max_queued_jobs: int = Field(10_000, ge=1)
    """Unfinished jobs of one owner; more is 429."""
    lease_seconds: float = Field(60, gt=0)
    heartbeat_seconds: float = Field(5, gt=0)
    reaper_seconds: float = Field(5, gt=0)
    grace_seconds: float = Field(60, ge=0)
    """From a stop request until the trainer's session is killed."""
    max_streams: int = Field(2000, ge=1, le=1_000_000)
    """Open event streams of one key, in one process; more is 429."""
    stream_send_seconds: float = Field(30, gt=0, le=3600)
    """A reader of an event stream that takes nothing for so long is cut off."""
    drain_seconds: float = Field(4, ge=0, le=3600)
    """At the server's end, for requests in flight; those that last longer are refused then."""
    stall_seconds: float = Field(1800, gt=0)
    """Without a word from a trainer, before its stack is logged and it is killed."""
    max_lapses: int = Field(3, ge=1)
    """Lost leases without a new checkpoint, before a job fails."""
    backoff_seconds: float = Field(0.5, ge=0, le=300)
    """Before a job that was lost once is tried again; doubled each time, up to five minutes."""
    max_log_bytes: int = Field(64 << 20, ge=4096)
    """Of one job's log: the beginning and the end are kept."""
    engine_idle_seconds: float = Field(900, gt=0)
    engine_start_seconds: float = Field(300, gt=0)
    engine_silent_seconds: float = Field(60, gt=0, le=86_400)
    """Without an answer from an engine to anything, before it is stopped as frozen."""
    engine_device: Literal["auto", "cpu"] = "auto"
    """auto: an engine takes a GPU that is free when it starts, and has it until it ends."""
    engine_drain_seconds: float = Field(300, ge=0, le=600)
    """For the requests that an engine is answering when another takes its place."""
    max_engines: int = Field(2, ge=1)
    engine_precision: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto"
    """Of a served model's weights, where nothing else is asked for: `auto` is bf16 on a GPU, int8
    on a CPU that has units for it, else fp32."""
    engine_command: str = Field("", max_length=4096)
    """Starts an engine of another make for each model, in the place of ours: `/opt/vllm/bin/vllm
    serve {model} --served-model-name {name} --host {host} --port {port} --enable-lora`."""
    engine_url: str = Field("", max_length=2048, pattern=r"^(https?://[^\s?#]+)?$")
    """An OpenAI-compatible server that answers for the models which it lists."""
    engine_api_key: SecretStr = SecretStr("")
    """What that server wants to see."""
    model_path: str = Field("", max_length=4096)
    """The model that is served where a request names none (MODEL_PATH)."""
    load_in_8bit: bool = False
    """Of that model's weights (LOAD_IN_8BIT)."""
    load_in_4bit: bool = False
    """(LOAD_IN_4BIT)"""
    api_keys_file: Path | None = None
    """Of an engine that runs by itself: hashes of keys, as `tunesmith keys create --file` adds."""
    runtime_dir: Path | None = None
    """Where several processes of one server agree on a model; empty: a folder of their own."""
    rate_limit: str = Field("", max_length=200)
    """Of generating, for each key, or address without one: `10/minute`, `10/minute;100/hour`."""
    rate_limit_storage: str = Field("async+memory://", max_length=2048)
    """Each process counts by itself, or all together in `async+redis://HOST:PORT`."""
    multiproc_dir: str = Field(
        default_factory=lambda: os.environ.get("PROMETHEUS_MULTIPROC_DIR", ""), max_length=4096
    )
    """Where several processes of one server keep their metrics (PROMETHEUS_MULTIPROC_DIR)."""
    should_fork_trainers: bool = True
    """Keep a process with torch imported to fork trainers and engines from."""
    hub_cache: Path = Field(default_factory=lambda: _hub_cache(os.environ))
    """Where models of the hub lie that this machine has downloaded before (HF_HUB_CACHE)."""
    hub_endpoint: str = Field(
        default_factory=lambda: os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
        pattern=r"^https?://[^\s?#]+$",
        max_length=2048,
        validate_default=True,
    )
    """The hub that is asked for models which nothing here has (HF_ENDPOINT)."""
    should_ask_hub: bool = Field(default_factory=lambda: not _is_offline(os.environ))
    """Off with HF_HUB_OFFLINE=1."""
    hub_token: SecretStr = Field(default_factory=lambda: SecretStr(os.environ.get("HF_TOKEN", "")))
    """For private and gated models (HF_TOKEN): every user of this server may then train on them."""
    hub_download_tries: int = Field(6, ge=1, le=100)
    visible_gpus: str | None = Field(default_factory=lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    """Indexes, separated by commas; None for all."""
    bell: Literal["poll", "celery", "ray"] = "poll"
    """What wakes idle workers beside their own asking."""
    poll_seconds: float = Field(10, gt=0, le=60)
    """Between two questions of an idle worker that a bell wakes; one that asks no more is gone."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """Celery's broker."""
    ray_address: str = ""
    """Of a running Ray cluster; empty starts one on this machine."""
    gang_nodes: int = Field(1, ge=1, le=1024)
    """Nodes that share this worker's one job."""
    gang_endpoint: str = Field("", max_length=300)
    """host:port where they meet."""
    worker_token: SecretStr = SecretStr("")
    """What a worker on another host shows the API."""
    object_store_url: str = Field("", max_length=2048)
    """`s3://bucket/prefix`: where workers on other hosts leave checkpoints and models; empty: they
    send them to the API. Keys, region and endpoint come from the usual AWS_ variables."""
    max_artifact_bytes: int = Field(500 << 30, ge=1024)
    """Of one checkpoint or model that a worker on another host sends."""
    cache_bytes: int = Field(50 << 30, ge=0)
    """Of inputs that a worker on another host keeps for later jobs; the least used go first."""
    ca_bundle: str = Field(
        default_factory=lambda: os.environ.get("SSL_CERT_FILE", ""), max_length=4096
    )
    """What a worker trusts when its API has https (SSL_CERT_FILE); empty: the usual ones."""
    mlflow_url: str = Field("", max_length=2048, pattern=r"^(https?://[^\s?#]+)?$")
    """An MLflow server that every job's metrics are carried to."""
    webhook_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """Networks of the operator's own that webhooks may go to, such as 10.1.0.0/16, separated by
    commas; public addresses are open, and loopback is while no key was made."""
    public_url: str = Field("", max_length=2048)
    """How others reach this server, for links; empty: the address it listens on."""
    checkpoint_days: float = Field(30, ge=0)
    """After a job's end, its checkpoints are kept so long; 0: for ever."""
    reserve_bytes: int = Field(16 << 20, ge=0)
    """Kept free beside the database, so that a full disk can be told of and healed."""
    log_level: str = "INFO"
    log_format: Literal["text", "json"] = "text"
    """json: an object a line."""
    server_log_bytes: int = Field(16 << 20, ge=4096)

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None, **over: Any) -> "Settings":
        """From the environment, then a `.env` of the folder that we are in, with arguments winning
        over both. Raises pydantic.ValidationError."""
        source = _surroundings() if environment is None else environment
        values: dict[str, Any] = {}
        for name in cls.model_fields:
            text = source.get(f"TUNESMITH_{name.upper()}")
            if not text and name in _PLAIN:
                text = source.get(name.upper())
            if text:
                values[name] = _split(name, text)
        values.update({name: value for name, value in over.items() if value is not None})
        return cls.model_validate(values)

    @property
    def home(self) -> Path:
        return self.workspace.resolve() / ".tunesmith"

    @property
    def url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'db.sqlite'}"

    @property
    def precision(self) -> Literal["auto", "fp32", "bf16", "int8", "int4"]:
        """How the weights of `model_path` are kept."""
        return (
            "int8" if self.load_in_8bit else "int4" if self.load_in_4bit else self.engine_precision
        )

    @property
    def slots(self) -> int:
        return self.cpu_slots or os.cpu_count() or 1


_PLAIN = ("model_path", "load_in_8bit", "load_in_4bit")
"""Fields that are also read without the prefix, as the inference contract names them."""


def _surroundings() -> Mapping[str, str]:
    place = Path(".env")
    if not place.is_file():
        return os.environ
    from dotenv import dotenv_values

    told = dotenv_values(place, interpolate=False)
    return {name: value for name, value in told.items() if value is not None} | dict(os.environ)


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """As huggingface_hub finds it."""
    home = environment.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    return Path(environment.get("HF_HUB_CACHE") or f"{home}/hub")


def _is_offline(environment: Mapping[str, str]) -> bool:
    """As huggingface_hub tells it."""
    told = environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or ""
    return told.upper() in {"1", "ON", "YES", "TRUE"}


def _split(name: str, text: str) -> Any:
    if name == "allowed_roots":
        return tuple(Path(part) for part in text.split(os.pathsep) if part)
    if name in ("cors_origins", "webhook_networks"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text
