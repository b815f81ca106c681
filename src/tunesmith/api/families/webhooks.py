"""The OpenAI contract's webhook endpoints, and two routes of ours: what was sent, and once more."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from tunesmith.api.auth import KeyHolder, key_holder
from tunesmith.api.deps import HubDep
from tunesmith.api.strict import StrictRoute
from tunesmith.hub.delivery import MAX_URL_LENGTH
from tunesmith.store import outbox
from tunesmith.store.webhooks import Delivery, Endpoint

router = APIRouter(
    prefix="/v1", tags=["webhooks"], route_class=StrictRoute, dependencies=[Depends(key_holder)]
)

EndpointId = Annotated[str, Path(description="`we_…`", max_length=64)]
DeliveryId = Annotated[str, Path(description="`evt_…`, the `webhook-id` sent", max_length=64)]
After = Annotated[
    str | None, Query(description="the id of the last entry of the page before", max_length=64)
]
Limit = Annotated[int, Query(description="entries of a page", ge=1, le=100)]
EventType = Annotated[str, StringConstraints(min_length=1, max_length=100)]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=64)]
Url = Annotated[str, StringConstraints(min_length=1, max_length=MAX_URL_LENGTH)]
EndpointName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewEndpoint(_Body):
    name: EndpointName = Field(description="for people", examples=["training done"])
    url: Url = Field(description="where messages go", examples=["https://example.com/hook"])
    event_types: EventTypes = Field(
        description="what is told of; GET /v1/webhook_event_types lists them",
        examples=[["fine_tuning.job.succeeded"]],
    )


class EndpointChange(_Body):
    """What is left out stays. A change also takes up sending again, where it had ended."""

    name: EndpointName | None = Field(None, description="for people")
    url: Url | None = Field(None, description="where messages go")
    event_types: EventTypes | None = Field(None, description="the whole new list")


class Rotation(_Body):
    keep_old_secret_active_for_24_hours: bool = Field(
        False, description="sign with both, until receivers know the new one"
    )


class Sample(_Body):
    event_type: EventType = Field(description="of the sample that is sent")


class EndpointObject(BaseModel):
    id: str = Field(description="`we_…`")
    object: Literal["webhook_endpoint"] = Field("webhook_endpoint", description="what this is")
    name: str = Field(description="for people")
    url: str = Field(description="where messages go")
    event_types: list[str] = Field(description="what is told of")
    created_at: int = Field(description="Unix seconds")
    updated_at: int | None = Field(description="of the last change, or of a new secret")
    signing_secret_hint: str = Field(description="the secret's end")
    disabled_at: int | None = Field(description="since when nothing is sent; null: it is")
    disabled_reason: str | None = Field(description="why nothing is sent")

    @classmethod
    def show(cls, found: Endpoint, **more: Any) -> Any:
        return cls(
            id=found.id,
            name=found.name,
            url=found.url,
            event_types=list(found.event_types),
            created_at=int(found.created_at),
            updated_at=_whole(found.updated_at),
            signing_secret_hint=f"whsec_…{found.secret[-4:]}",
            disabled_at=_whole(found.disabled_at),
            disabled_reason=found.disabled_reason,
            **more,
        )


class EndpointWithSecret(EndpointObject):
    signing_secret: str = Field(description="shown here and never again")

    @classmethod
    def show(cls, found: Endpoint, **more: Any) -> Any:
        return super().show(found, signing_secret=found.secret, **more)


class DeletedEndpoint(BaseModel):
    id: str = Field(description="of what was deleted")
    object: Literal["webhook_endpoint.deleted"] = Field(
        "webhook_endpoint.deleted", description="what this is"
    )
    deleted: bool = Field(True, description="true")


class TestResult(BaseModel):
    object: Literal["webhook_endpoint.test"] = Field(
        "webhook_endpoint.test", description="what this is"
    )
    webhook_endpoint_id: str = Field(description="where the sample went")
    event_type: str = Field(description="of the sample")
    status_code: int = Field(description="the receiver's answer, whatever it was")
    success: Literal[True] = Field(True, description="there was an answer")


class DeliveryObject(BaseModel):
    id: str = Field(description="the `webhook-id`: the same at every try")
    object: Literal["webhook_endpoint.delivery"] = Field(
        "webhook_endpoint.delivery", description="what this is"
    )
    event_type: str = Field(description="what it tells of")
    job_id: str = Field(description="`ftjob-…`")
    status: Literal["pending", "delivered", "failed"] = Field(
        description="failed: given up after 24 hours, or as the receiver answered 410"
    )
    status_code: int | None = Field(description="the receiver's last answer")
    error: str | None = Field(description="why the last try counts as not taken")
    tries: int = Field(description="so far")
    created_at: int = Field(description="Unix seconds: when it came to be owed")
    next_try_at: int | None = Field(description="while it is pending")
    done_at: int | None = Field(description="when it was delivered or given up")

    @classmethod
    def show(cls, found: Delivery) -> "DeliveryObject":
        return cls(
            id=found.id,
            event_type=found.event_type,
            job_id=f"ftjob-{found.job_id}",
            status=found.status,
            status_code=found.status_code,
            error=found.error,
            tries=found.tries,
            created_at=int(found.created_at),
            next_try_at=_whole(found.next_try_at),
            done_at=_whole(found.done_at),
        )


class _List(BaseModel):
    object: Literal["list"] = Field("list", description="what this is")


class EndpointList(_List):
    data: list[EndpointObject] = Field(description="newest first")
    has_more: bool = Field(description="whether another page follows")


class DeliveryList(_List):
    data: list[DeliveryObject] = Field(description="newest first")
    has_more: bool = Field(description="whether another page follows")


class EventTypeList(_List):
    data: list[str] = Field(description="the types that this server sends")


@router.get("/webhook_event_types", summary="What endpoints can be told of")
def event_types() -> EventTypeList:
    return EventTypeList(data=list(outbox.TYPES.values()))


@router.post("/webhook_endpoints", summary="Have a URL told of what happens to your jobs")
async def make_endpoint(body: NewEndpoint, hub: HubDep, who: KeyHolder) -> EndpointWithSecret:
    made = await hub.webhooks.make(who, body.name, body.url, body.event_types)
    return EndpointWithSecret.show(made)  # type: ignore[no-any-return]


@router.get("/webhook_endpoints", summary="Your endpoints, newest first")
def list_endpoints(
    hub: HubDep, who: KeyHolder, after: After = None, limit: Limit = 20
) -> EndpointList:
    found, has_more = hub.webhooks.page(who, after, limit)
    return EndpointList(data=[EndpointObject.show(one) for one in found], has_more=has_more)


@router.get("/webhook_endpoints/{endpoint_id}", summary="One endpoint")
def get_endpoint(endpoint_id: EndpointId, hub: HubDep, who: KeyHolder) -> EndpointObject:
    return EndpointObject.show(hub.webhooks.find(who, endpoint_id))  # type: ignore[no-any-return]


@router.post("/webhook_endpoints/{endpoint_id}", summary="Change an endpoint")
async def change_endpoint(
    endpoint_id: EndpointId, body: EndpointChange, hub: HubDep, who: KeyHolder
) -> EndpointObject:
    changed = await hub.webhooks.change(who, endpoint_id, body.name, body.url, body.event_types)
    return EndpointObject.show(changed)  # type: ignore[no-any-return]


@router.delete("/webhook_endpoints/{endpoint_id}", summary="Delete an endpoint")
async def delete_endpoint(endpoint_id: EndpointId, hub: HubDep, who: KeyHolder) -> DeletedEndpoint:
    await hub.webhooks.remove(who, endpoint_id)
    return DeletedEndpoint(id=endpoint_id)


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret", summary="Sign with a new secret")
async def rotate_secret(
    endpoint_id: EndpointId, hub: HubDep, who: KeyHolder, body: Rotation | None = None
) -> EndpointWithSecret:
    should_overlap = body is not None and body.keep_old_secret_active_for_24_hours
    rotated = await hub.webhooks.rotate(who, endpoint_id, should_overlap)
    return EndpointWithSecret.show(rotated)  # type: ignore[no-any-return]


@router.post("/webhook_endpoints/{endpoint_id}/test", summary="Send a sample at once")
async def test_endpoint(
    endpoint_id: EndpointId, body: Sample, hub: HubDep, who: KeyHolder
) -> TestResult:
    status = await hub.webhooks.test(who, endpoint_id, body.event_type)
    return TestResult(
        webhook_endpoint_id=endpoint_id, event_type=body.event_type, status_code=status
    )


@router.get("/webhook_endpoints/{endpoint_id}/deliveries", summary="What was sent, newest first")
def list_deliveries(
    endpoint_id: EndpointId, hub: HubDep, who: KeyHolder, after: After = None, limit: Limit = 20
) -> DeliveryList:
    found, has_more = hub.webhooks.deliveries(who, endpoint_id, after, limit)
    return DeliveryList(data=[DeliveryObject.show(one) for one in found], has_more=has_more)


@router.post(
    "/webhook_endpoints/{endpoint_id}/deliveries/{delivery_id}/redeliver",
    summary="Send a message again, under the same id",
)
async def redeliver(
    endpoint_id: EndpointId, delivery_id: DeliveryId, hub: HubDep, who: KeyHolder
) -> DeliveryObject:
    return DeliveryObject.show(await hub.webhooks.redeliver(who, endpoint_id, delivery_id))


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
