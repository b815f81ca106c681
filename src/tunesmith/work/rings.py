"""Rings over Celery: one message to every host, that says nothing but "ask now".

They go by a fanout exchange: each Celery worker hears each ring, and what nobody hears is gone. So
no backlog can pile up, and a broker that is emptied or started anew has nothing to lose.
"""

from celery import Celery
from kombu import Exchange
from kombu.common import Broadcast

RING = "tunesmith.ring"
QUEUE = "tunesmith.bell"
EXPIRES_SECONDS = 60
"""For a hearer that was frozen; more than the clocks of two hosts may differ by."""
_EXCHANGE = Exchange(QUEUE, type="fanout", durable=False, auto_delete=False)
_SETTINGS = {
    "accept_content": ["json"],
    "task_serializer": "json",
    "result_backend": None,
    "task_ignore_result": True,
    "task_acks_late": False,
    "task_default_queue": QUEUE,
    "task_create_missing_queues": False,
    "worker_prefetch_multiplier": 1,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_connection_timeout": 2.0,
}
_SENDER = {"socket_timeout": 2.0, "socket_connect_timeout": 1.0, "max_retries": 0}
"""A broker that is away fails a ring at once; it is not waited for."""
_HEARER = {"socket_timeout": 30.0, "socket_connect_timeout": 5.0}


def hearer(redis_url: str) -> Celery:
    """The application of a Celery worker."""
    return _application(redis_url, _HEARER)


class Ringer:
    """The other end. Not for several threads at once."""

    def __init__(self, redis_url: str) -> None:
        self._app = _application(redis_url, _SENDER)

    def ring(self) -> None:
        """Raises what Celery, kombu or redis-py raise where the broker can't be reached."""
        self._app.send_task(
            RING,
            exchange=_EXCHANGE.name,
            exchange_type="fanout",
            routing_key="",
            declare=[_EXCHANGE],
            expires=EXPIRES_SECONDS,
            ignore_result=True,
            retry=False,
        )


def _application(redis_url: str, transport: dict[str, float]) -> Celery:
    app = Celery("tunesmith", broker=redis_url, set_as_current=False)
    app.conf.update(_SETTINGS)
    app.conf.task_queues = (Broadcast(QUEUE, exchange=_EXCHANGE),)
    app.conf.broker_transport_options = transport
    return app
