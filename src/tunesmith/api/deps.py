"""What a handler may ask for."""

from typing import Annotated

from fastapi import Depends, Request

from tunesmith.hub import Hub


async def get_hub(request: Request) -> Hub:
    """Declared async, or FastAPI would call it on a thread, four times a request."""
    return hub_of(request)


def hub_of(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


HubDep = Annotated[Hub, Depends(get_hub)]
