"""The operator's routes, for the command line beside a running server: names and keys."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Response
from pydantic import Field

from tunesmith.api.auth import operator
from tunesmith.api.deps import HubDep
from tunesmith.api.strict import StrictRoute
from tunesmith.spec.scopes import SCOPES, Scope
from tunesmith.spec.strict import Name, Strict

router = APIRouter(
    prefix="/internal/v1",
    tags=["operator"],
    route_class=StrictRoute,
    include_in_schema=False,
    dependencies=[Depends(operator)],
)
Kind = Annotated[Literal["models", "data"], Path()]


class Registration(Strict):
    name: Name
    path: Name


class NewKey(Strict):
    owner: str = Field(min_length=1, max_length=200)
    label: str = Field("", max_length=200)
    is_worker: bool = False
    scopes: tuple[Scope, ...] | None = Field(None, min_length=1, max_length=len(SCOPES))


@router.post("/keys", status_code=201)
def make_key(body: NewKey, hub: HubDep) -> dict[str, Any]:
    return hub.make_key(body.owner, body.label, body.is_worker, body.scopes)


@router.get("/keys")
def list_keys(hub: HubDep) -> list[dict[str, Any]]:
    return hub.list_keys()


@router.delete("/keys/{key_id}", status_code=204)
def revoke_key(key_id: str, hub: HubDep) -> Response:
    hub.revoke_key(key_id)
    return Response(status_code=204)


@router.get("/places/{name:path}")
def place_of(name: str, hub: HubDep) -> dict[str, str]:
    """Where a model lies on this machine."""
    return {"path": str(hub.place_of(name))}


@router.post("/{kind}", status_code=201)
def register(kind: Kind, body: Registration, hub: HubDep) -> dict[str, Any]:
    add = hub.register_model if kind == "models" else hub.register_data
    return add(body.name, body.path)


@router.get("/{kind}")
def names(kind: Kind, hub: HubDep) -> list[dict[str, Any]]:
    return hub.names(kind)


@router.delete("/{kind}/{name:path}", status_code=204)
def forget(kind: Kind, name: str, hub: HubDep) -> Response:
    hub.forget(kind, name)
    return Response(status_code=204)
