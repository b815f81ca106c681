"""The broker under attack: emptied, killed, its workers killed too, each message said six times."""

from bells_fixtures import break_broker, open_bells
from prove.proof import Figure, Progress, Result, Setting, at_least
from servers import open_redis


def run(setting: Setting, progress: Progress) -> Result:
    """Jobs that a Celery bell wakes a worker for; the database alone knows of them."""
    kills, flushes = setting.count(5, 20), setting.count(5, 20)
    jobs = setting.count(40, 200)
    progress(0, jobs, "Redis emptied and killed under Celery")
    folder = setting.inner("celery")
    (folder / "house").mkdir()
    with (
        open_redis(folder / "redis") as redis,
        open_bells(folder / "house", redis) as bells,
    ):
        bells.start_celery()
        bells.wait_ready()
        counts = break_broker(bells, jobs, flushes, kills, celery_kills=setting.count(2, 10))
    return _judged(counts, kills, flushes)


def _judged(counts: dict[str, int], kills: int, flushes: int) -> Result:
    # a Celery worker that is killed takes its jobs along: they run once more
    excused = 2 * counts["celery_kills"]
    extra = max(0, counts["extra_attempts"] - excused)
    told = f"of {counts['jobs']} jobs"
    figures = (
        at_least("Redis flushed", counts["flushes"], flushes),
        at_least("Redis kill -9", counts["broker_kills"], kills),
        *(
            Figure(what, "0", f"{counts[name]} {told}", counts[name] == 0)
            for what, name in (
                ("submissions refused while Redis is down", "refused"),
                ("jobs lost", "lost"),
                ("jobs failed", "failed"),
                ("jobs run twice to an end", "doubled_ends"),
            )
        ),
        Figure("attempts that no kill explains", "0", f"{extra} {told}", extra == 0),
    )
    return Result(figures, {"celery": counts})
