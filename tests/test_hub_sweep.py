"""What a start clears away, and what it leaves because another server may be about to name it."""

import os
import time
from pathlib import Path

from store_fixtures import Ledger
from tunesmith.hub import Hub
from tunesmith.hub.sweep import OLD_SECONDS, sweep
from tunesmith.settings import Settings


def test_beside_other_servers_only_old_data_is_swept(ledger: Ledger, tmp_path: Path) -> None:
    settings = Settings(workspace=tmp_path)
    settings.home.mkdir(exist_ok=True)
    hub = Hub(settings, ledger.store)
    folder = settings.home / "data"
    folder.mkdir()
    young, old = folder / f"{'a' * 64}.jsonl", folder / f"{'b' * 64}.jsonl"
    for path in (young, old):
        path.write_text("줄")
    long_ago = time.time() - OLD_SECONDS - 10
    os.utime(old, (long_ago, long_ago))
    sweep(hub)
    left = {path.name for path in folder.iterdir()}
    assert left == (set() if ledger.store.is_alone else {young.name})
