"""The training contract's uploads: POST /upload/dataset, from the wire to the disk."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from tunesmith.api.auth import Caller, caller
from tunesmith.api.deps import HubDep
from tunesmith.api.multipart import FilePart, pieces
from tunesmith.api.strict import StrictRoute
from tunesmith.data.reading import Reading
from tunesmith.hub import Hub
from tunesmith.spec.train import Columns

_COLUMNS: TypeAdapter[dict[str, str]] = TypeAdapter(Columns)
_WRITE_BYTES = 1 << 20
_FRAME_BYTES = 1 << 20
"""What a multipart body may hold beside its file."""
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "maxLength": 1 << 40,
                            "description": "a .json array, or .jsonl, .csv, .tsv, .parquet, .txt",
                        }
                    },
                }
            }
        },
    }
}


class UploadRoute(StrictRoute):
    def body_limit(self, hub: Hub) -> int:
        return hub.settings.max_upload_bytes + _FRAME_BYTES


router = APIRouter(tags=["training"], route_class=UploadRoute, dependencies=[Depends(caller)])


class Uploaded(BaseModel):
    dataset_path: str = Field(description="give this to /train/sft", examples=["data/my.json"])
    filename: str = Field(description="as it was sent")
    size: int = Field(description="bytes")
    num_samples: int = Field(description="rows")
    format: str = Field(description="openai, alpaca, prompt_completion, sharegpt or text")


@router.post(
    "/upload/dataset", summary="Upload a data set, checked as it comes in", openapi_extra=_BODY
)
async def upload_dataset(
    request: Request,
    hub: HubDep,
    who: Caller,
    columns: Annotated[
        str,
        Query(
            max_length=16_384,
            description="as `columns` of /train/sft, in JSON: by what the file is checked",
            examples=['{"instruction": "question", "output": "answer"}'],
        ),
    ] = "",
) -> Uploaded:
    reading = Reading.by(_columns(columns))
    part = FilePart(request.headers.get("content-type", ""), "file")
    with hub.blobs.receive(hub.settings.max_upload_bytes) as incoming:
        async for piece in pieces(request, part, _WRITE_BYTES):
            await asyncio.to_thread(incoming.write, piece)
        filename = part.end()
        found = await asyncio.to_thread(hub.keep_upload, filename, incoming, who, reading)
    return Uploaded(
        dataset_path=found.name,
        filename=filename,
        size=found.size,
        num_samples=found.num_samples,
        format=found.format,
    )


def _columns(text: str) -> dict[str, str]:
    """Raises RequestValidationError."""
    try:
        return _COLUMNS.validate_json(text or "{}", strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        raise RequestValidationError(
            [{**fault, "loc": ("query", "columns", *fault["loc"])} for fault in faults]
        ) from None
