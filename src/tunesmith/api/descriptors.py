"""Open files: as many as the system allows, and some kept back from connections."""

import contextlib
import resource

MOST = 65_536
KEPT = 256
"""For databases, uploads, logs and children; half where there are fewer than twice as many."""
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: 50\r\n\r\n"
    b'{"detail":"too many connections; ask again later"}'
)


def room_for_connections() -> int:
    """How many may be open at once. Takes the limit as high as this process may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    limit = most if soft == resource.RLIM_INFINITY else soft
    return limit - min(KEPT, limit // 2)
