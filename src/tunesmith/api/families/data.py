"""A data set seen before it is trained on: POST /data/preview."""

import asyncio
from dataclasses import replace
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.api.auth import Caller, caller
from tunesmith.api.deps import HubDep
from tunesmith.api.strict import StrictRoute
from tunesmith.data.fit import Cut
from tunesmith.data.preview import MAX_SHOWN, Fate
from tunesmith.data.reading import Reading
from tunesmith.errors import BadRequestError
from tunesmith.hub.preview import Shown, Wanted
from tunesmith.spec.sampling import Sampling
from tunesmith.spec.strict import Name
from tunesmith.spec.train import MAX_LENGTH_LIMIT, Columns

router = APIRouter(tags=["training"], route_class=StrictRoute, dependencies=[Depends(caller)])

Number = Annotated[int | None, Field(ge=1, le=1 << 40)]


class PreviewRequest(BaseModel):
    """Which row, and how it would be trained on; the fields of POST /train/sft. Unknown fields are
    refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    dataset_path: Name = Field(description="as in /train/sft", examples=["data/my_dataset.json"])
    model_name: Name = Field(description="whose tokenizer and template; it has to be here already")
    method: Literal["sft", "pretrain"] = Field(
        "sft", description="pretrain shows a block of packed documents, and `row` is its number"
    )
    row: Number = Field(None, description="its number, from 1 (the default)")
    line: Number = Field(None, description="instead of `row`: a line of the file that it stands in")
    max_length: int = Field(1024, ge=8, le=MAX_LENGTH_LIMIT, description="tokens of a sample")
    overlong: Literal["drop", "truncate", "refuse"] = Field(
        "drop", description="what becomes of a longer sample"
    )
    train_on: Literal["completions", "all"] = Field(
        "completions", description="learn the answers only, or every token"
    )
    answer: Literal["chosen", "rejected"] = Field(
        "chosen", description="of a pair, the one that is shown; its completion is learnt"
    )
    columns: Columns = Field({}, description="field → column, mapped by hand")
    clean: bool = Field(False, description="pretrain: remove control characters")
    seed: int = Field(42, ge=0, le=2**31 - 1, description="pretrain: of the order of documents")
    sampling: Sampling | None = Field(
        None, description="pretrain: which documents, and how often, by their metadata"
    )
    tokenizer: Name | None = Field(
        None, description="pretrain: in place of the model's own, as in a configuration"
    )
    limit: int = Field(4096, ge=0, le=MAX_SHOWN, description="how many tokens are shown one by one")

    def to_wanted(self) -> Wanted:
        if self.row is not None and self.line is not None:
            raise BadRequestError("row and line exclude each other; give one", param="row")
        is_pretrain = self.method == "pretrain"
        if is_pretrain and self.line is not None:
            raise BadRequestError("line: a packed block stands in no line; give row", param="line")
        for name in ("sampling", "tokenizer"):
            if getattr(self, name) is not None and not is_pretrain:
                raise BadRequestError(f"{name}: it is for pretrain", param=name)
        controls: Literal["removed", "refused"] = "removed" if self.clean else "refused"
        return Wanted(
            cut=Cut(self.max_length, self.overlong, self.train_on),
            reading=replace(
                Reading.by(self.columns, controls if is_pretrain else "kept"),
                with_metadata=self.sampling is not None,
            ),
            method=self.method,
            row=(self.row or 1) if self.line is None else None,
            line=self.line or 1,
            answer=self.answer,
            seed=self.seed,
            sampling=self.sampling,
            tokenizer=self.tokenizer,
            limit=self.limit,
        )


class TokenView(BaseModel):
    id: int = Field(description="in the tokenizer's vocabulary")
    text: str = Field(description="what it reads by itself; parts of a character as \\xed\\x95")
    is_bytes: bool = Field(description="whether it is a part of a character")
    weight: int = Field(description="1: learnt; 0: seen only")


class PreviewView(BaseModel):
    """A row as it is trained on."""

    dataset_path: str = Field(description="as it was asked for")
    format: str = Field(description="openai, alpaca, prompt_completion, preference, …")
    row: int = Field(description="the number of the row, or of the block")
    line: int = Field(description="where it begins; a number of the row too where rows are counted")
    max_length: int = Field(description="the one that holds: the model's context where shorter")
    fate: Fate = Field(
        description="trained whole, truncated, dropped (too long), masked (nothing to learn), or "
        "refused (no job would run on it)"
    )
    why: str = Field(description="why not all of it is trained on; empty where all is")
    length: int = Field(description="tokens before anything is cut off")
    trained_tokens: int = Field(description="tokens that are learnt")
    ids: list[int] = Field(description="token ids, exactly those that are trained on")
    weights: list[int] = Field(description="of each id, 1 where it is learnt")
    tokens: list[TokenView] = Field(description="each id by itself, the first `limit` of them")
    text: str = Field(description="what the template makes of the row")
    template: str | None = Field(
        description="model: the model's own; alpaca, chatml, plain: one of ours; null: none needed"
    )


@router.post(
    "/data/preview",
    summary="Any row as tokens with their loss weights",
    response_model=PreviewView,
)
async def preview(request: PreviewRequest, hub: HubDep, who: Caller) -> Response:
    found = await hub.previews.show(
        request.model_name, request.dataset_path, request.to_wanted(), who
    )
    body = await asyncio.to_thread(_written, request, found)
    return Response(body, media_type="application/json")


def _written(request: PreviewRequest, found: Shown) -> str:
    """A million ids take a while to write, and others wait for the loop."""
    view = PreviewView(
        dataset_path=request.dataset_path,
        format=found.format,
        row=found.row,
        line=found.line,
        max_length=found.max_length,
        **found.preview.model_dump(),
    )
    return view.model_dump_json()
