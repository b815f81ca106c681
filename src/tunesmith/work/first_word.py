"""Before a worker starts for an API elsewhere: is it one, does it know us, is it of our version."""

import asyncio
from pathlib import Path

from tunesmith import VERSION
from tunesmith.errors import AuthenticationError, NotFoundError, PermissionError, TuningAPIError
from tunesmith.spec.hands import House
from tunesmith.work.wire import Unreachable, Wire

SECONDS = 10.0


class Refused(Exception):
    """Waiting would not help; `advice` says what would."""

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(message)
        self.advice = advice


def first_word(server: str, token: str, ca_bundle: str = "") -> str:
    """Why the API does not answer now; empty where all is well. Raises Refused."""
    if not server.startswith(("http://", "https://")):
        raise Refused(f"{server!r} is no address", "write it as http://HOST:PORT or https://HOST")
    try:
        found = asyncio.run(_ask(server, token, ca_bundle))
    except Unreachable as error:
        return str(error)
    except (AuthenticationError, PermissionError) as error:
        raise Refused(
            f"{server} refuses this key: {error.message}",
            "make one where the API is: tunesmith keys create --worker",
        ) from None
    except NotFoundError:
        raise Refused(f"{server} is an API without workers, or of an earlier version", "") from None
    except TuningAPIError as error:
        raise Refused(f"{server} refuses: {error.message}", "") from None
    except OSError as error:
        raise Refused(f"the certificates {ca_bundle!r} can't be read: {error}", "") from None
    if found.version != VERSION:
        raise Refused(
            f"{server} has version {found.version}, this worker {VERSION}",
            f"install the same: pip install 'tunesmith[all]=={found.version}'",
        )
    return ""


async def _ask(server: str, token: str, ca_bundle: str) -> House:
    wire = Wire(Path(), server, token, ca_bundle)
    try:
        return await wire.ask("/house", None, House, seconds=SECONDS)
    finally:
        await wire.close()
