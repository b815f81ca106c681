"""Sealed folders to the API, or to where it says: in pieces, gone on with after any break."""

import asyncio
import base64
import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from tunesmith.errors import BadRequestError, ConflictError, FencedError, NotFoundError
from tunesmith.manifest import MANIFEST
from tunesmith.spec.strict import Sha256, Strict
from tunesmith.spec.transfer import (
    DIGEST_HEADER,
    Committed,
    Offer,
    Piece,
    UploadPlan,
    checked_manifest,
    pieces,
)
from tunesmith.work.wire import Nothing, Unreachable, Wire, told_as_unreachable

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 3600.0
"""Without a piece that was taken, before a folder is given up."""
COMMIT_SECONDS = 600.0
"""For one try: the API reads every byte of the folder before it answers."""
TRIES = 3
"""For what the API finds wrong with bytes that came."""


class Parcel(Strict):
    """A sealed folder of this host that the API should have."""

    kind: Literal["checkpoint", "artifact"]
    step: int = Field(ge=0)
    folder: str
    manifest_sha256: Sha256


class Unsendable(Exception):
    """It can't be sent, now or later; the message says why."""


@dataclass(frozen=True)
class Sender:
    wire: Wire
    path: str
    """Of the attempt's routes."""
    token: str
    patience_seconds: float = PATIENCE_SECONDS

    async def send(self, parcel: Parcel) -> str:
        """Where the API has it now. What is there already is not sent again.

        Raises FencedError, Unsendable, and TuningAPIError where the API will not have it.
        """
        folder, offer = Path(parcel.folder), await asyncio.to_thread(_offer, parcel)
        cut = {piece.index: piece for piece in pieces(checked_manifest(offer.manifest, 1 << 62))}
        heard, faults, least = time.monotonic(), 0, len(cut) + 1
        while True:
            plan = await self.wire.patiently(lambda: self._plan(offer))
            if len(plan.missing) < least:
                heard, least = time.monotonic(), len(plan.missing)
            try:
                if not plan.missing:
                    return (await self.wire.patiently(lambda: self._commit(parcel))).path
                await self._send_some(plan, folder, cut, parcel)
            except FencedError:
                raise
            except (ConflictError, NotFoundError):
                pass  # the API has less than it seemed: see what is missing now
            except BadRequestError as fault:
                faults += 1
                if faults >= TRIES:
                    raise Unsendable(fault.message) from None
            except Unreachable as trouble:
                if time.monotonic() - heard > self.patience_seconds:
                    raise Unsendable(str(trouble)) from None
                await asyncio.sleep(1)

    async def _plan(self, offer: Offer) -> UploadPlan:
        return await self.wire.ask(f"{self.path}/uploads", offer, UploadPlan, self.token)

    async def _commit(self, parcel: Parcel) -> Committed:
        path = f"{self.path}/uploads/{parcel.manifest_sha256}/commit"
        return await self.wire.send("POST", path, b"", Committed, self.token, COMMIT_SECONDS)

    async def _send_some(
        self, plan: UploadPlan, folder: Path, cut: dict[int, Piece], parcel: Parcel
    ) -> None:
        if not plan.is_elsewhere:
            for index in plan.missing:
                body = await asyncio.to_thread(_read, folder, cut[index])
                path = f"{self.path}/uploads/{parcel.manifest_sha256}/{index}"
                await self.wire.patiently(lambda path=path, body=body: self._put(path, body))  # type: ignore[misc]
            return
        for one in plan.urls:
            body = await asyncio.to_thread(_read, folder, cut[one.index])
            await self._put_elsewhere(one.url, body)

    async def _put(self, path: str, body: bytes) -> Nothing:
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = {DIGEST_HEADER: f"sha-256=:{digest}:", "Content-Type": "application/octet-stream"}
        return await self.wire.send("PUT", path, body, Nothing, self.token, headers=headers)

    async def _put_elsewhere(self, url: str, body: bytes) -> None:
        """The store itself compares the digest, in the form that all of them know."""
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        with told_as_unreachable():
            reply = await self.wire.strangers.put(
                url, content=body, headers={"Content-MD5": digest}
            )
            if reply.status_code >= 300:
                raise Unreachable(f"HTTP {reply.status_code} from {reply.url.host}")


def _offer(parcel: Parcel) -> Offer:
    try:
        body = (Path(parcel.folder) / MANIFEST).read_bytes()
    except OSError as error:
        raise Unsendable(f"{Path(parcel.folder).name}: {error.strerror}") from None
    if hashlib.sha256(body).hexdigest() != parcel.manifest_sha256:
        raise Unsendable(f"{Path(parcel.folder).name}: its manifest is another one by now")
    try:
        checked_manifest(body.decode(), 1 << 62)
    except ValueError as error:
        raise Unsendable(f"{Path(parcel.folder).name}: {error}") from None
    return Offer(kind=parcel.kind, step=parcel.step, manifest=body.decode())


def _read(folder: Path, piece: Piece) -> bytes:
    try:
        descriptor = os.open(folder / piece.path, os.O_RDONLY)
    except OSError as error:
        raise Unsendable(f"{piece.path}: {error.strerror}") from None
    try:
        body = os.pread(descriptor, piece.size, piece.offset)
    finally:
        os.close(descriptor)
    if len(body) < piece.size:
        raise Unsendable(f"{piece.path} is shorter than its manifest says")
    return body
