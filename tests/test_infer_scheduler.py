"""The scheduler: who runs next, in plain Python."""

import subprocess
import sys
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import RateLimitError
from tunesmith.infer.scheduler import Adopt, Chunk, Drop, Keep, Limits, Scheduler
from tunesmith.infer.sequence import Sequence
from tunesmith.spec.chat import Sampling


def sequence(prompt: int, generate: int = 4) -> Sequence:
    return Sequence(list(range(prompt)), Sampling(max_tokens=generate), emit=lambda _: None)


def run(scheduler: Scheduler) -> list[Chunk]:
    """A step without a model: every complete sequence gets the token 7."""
    chunks = scheduler.plan()
    for chunk in chunks:
        chunk.sequence.computed = chunk.end
    scheduler.read(chunks)
    for chunk in chunks:
        if chunk.end == chunk.sequence.length:
            chunk.sequence.generated.append(7)
            if len(chunk.sequence.generated) == chunk.sequence.sampling.max_tokens:
                scheduler.finish(chunk.sequence)
    return chunks


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, tunesmith.infer.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_eight_sequences_each_get_a_token_in_every_step() -> None:
    scheduler = Scheduler(Limits())
    eight = [sequence(5, 6) for _ in range(8)]
    scheduler.add(eight)
    for count in range(1, 6):
        run(scheduler)
        assert [len(each.generated) for each in eight] == [count] * 8


def test_a_long_prompt_is_read_in_chunks_while_the_others_go_on() -> None:
    scheduler = Scheduler(Limits(step_tokens=64, mixed_tokens=16))
    short, long = sequence(4, 30), sequence(200, 2)
    scheduler.add([short])
    run(scheduler)
    scheduler.add([long])
    for step in range(1, 13):
        chunks = run(scheduler)
        assert len(short.generated) == step + 1
        assert [c.end - c.start for c in chunks if c.sequence is long] == [16]
    run(scheduler)
    assert len(long.generated) == 1


def test_a_prompt_alone_is_read_in_large_chunks() -> None:
    scheduler = Scheduler(Limits(step_tokens=64, mixed_tokens=16))
    scheduler.add([sequence(100)])
    assert [(c.start, c.end) for c in run(scheduler)] == [(0, 64)]
    assert [(c.start, c.end) for c in run(scheduler)] == [(64, 100)]


def test_several_prompts_share_the_budget_of_a_step_in_order() -> None:
    scheduler = Scheduler(Limits(step_tokens=30))
    first, second, third = sequence(20), sequence(20), sequence(20)
    scheduler.add([first, second, third])
    chunks = scheduler.plan()
    assert [(c.sequence, c.start, c.end) for c in chunks] == [(first, 0, 20), (second, 0, 10)]


def test_a_full_line_refuses_a_request_as_a_whole() -> None:
    scheduler = Scheduler(Limits(waiting=3))
    scheduler.add([sequence(1), sequence(1)])
    with pytest.raises(RateLimitError) as caught:
        scheduler.add([sequence(1), sequence(1)])
    assert len(scheduler.waiting) == 2
    assert caught.value.retry_after == 1


def test_a_cancelled_sequence_gives_its_place_to_the_next_within_a_step() -> None:
    scheduler = Scheduler(Limits(running=1))
    gone, later = sequence(3, 100), sequence(3)
    scheduler.add([gone, later])
    run(scheduler)
    gone.is_cancelled = True
    assert [c.sequence for c in run(scheduler)] == [later]
    assert scheduler.moves() == [Drop(gone)]


def test_a_sequence_cancelled_in_the_line_never_runs() -> None:
    scheduler = Scheduler(Limits())
    gone, kept = sequence(3), sequence(3)
    scheduler.add([gone, kept])
    gone.is_cancelled = True
    assert [c.sequence for c in scheduler.plan()] == [kept]


def test_nobody_is_admitted_without_room_for_the_whole_prompt() -> None:
    scheduler = Scheduler(Limits(block_tokens=10, blocks=3))
    first, second = sequence(15, 2), sequence(15)
    scheduler.add([first, second])
    assert [c.sequence for c in run(scheduler)] == [first]
    assert [c.sequence for c in run(scheduler)] == [first]
    assert [c.sequence for c in run(scheduler)] == [second]


def test_when_room_runs_out_the_youngest_goes_back_and_is_read_again() -> None:
    scheduler = Scheduler(Limits(block_tokens=4, blocks=4))
    old, young = sequence(7, 6), sequence(7, 6)
    scheduler.add([old, young])
    for _ in range(3):
        run(scheduler)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young]
    assert scheduler.moves() == [Drop(young)]
    while not scheduler.is_idle:
        run(scheduler)
    assert old.generated == young.generated == [7] * 6


def test_giving_up_returns_everything_and_frees_all_room() -> None:
    scheduler = Scheduler(Limits(running=1, blocks=9))
    both = [sequence(5), sequence(5)]
    scheduler.add(both)
    run(scheduler)
    assert scheduler.clear() == both
    assert scheduler.is_idle
    assert scheduler.free_blocks == 9


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=15),
    blocks=st.integers(15, 40),
    mixed=st.integers(1, 9),
    cancels=st.sets(st.integers(0, 14)),
)
def test_whatever_arrives_room_is_never_overrun_and_everybody_ends(
    shapes: list[tuple[int, int]], blocks: int, mixed: int, cancels: set[int]
) -> None:
    limits = Limits(running=5, step_tokens=16, mixed_tokens=mixed, block_tokens=4, blocks=blocks)
    scheduler = Scheduler(limits)
    everyone = [sequence(prompt, count) for prompt, count in shapes]
    for step, each in enumerate(everyone):
        scheduler.add([each])
        each.is_cancelled = step in cancels and step % 2 == 0
        check(scheduler, run(scheduler))
    for number in range(5000):
        if scheduler.is_idle:
            break
        if number in cancels:
            everyone[number % len(everyone)].is_cancelled = True
        check(scheduler, run(scheduler))
    assert scheduler.is_idle
    assert scheduler.free_blocks == blocks
    for each in everyone:
        assert each.is_cancelled or len(each.generated) == each.sampling.max_tokens


def check(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    assert chunks or scheduler.is_idle
    assert scheduler.free_blocks >= 0
    held = sum(each.blocks for each in scheduler.running)
    assert held + scheduler.free_blocks == scheduler.limits.blocks
    assert len({id(c.sequence) for c in chunks}) == len(chunks)
    for each in scheduler.running:
        assert each.computed <= each.blocks * scheduler.limits.block_tokens


def prompted(ids: list[int], tokens: int = 1, adapter: int | None = None) -> Sequence:
    made = sequence(len(ids), tokens)
    made.prompt, made.adapter = ids, adapter
    return made


def test_a_prompt_begins_with_what_another_has_of_the_same_beginning() -> None:
    scheduler = Scheduler(Limits())
    shared = list(range(200))
    first = prompted([*shared, 1, 2, 3])
    scheduler.add([first])
    run(scheduler)
    assert scheduler.moves() == [Keep(first)]
    second, other = prompted([*shared, 9, 9], 5), prompted(shared, adapter=4)
    scheduler.add([second, other])
    chunks = scheduler.plan()
    assert scheduler.moves() == [Adopt(second, first, 200)]
    assert [(each.start, each.end) for each in chunks] == [(200, 202), (0, 200)]
    assert second.reused == 200


def test_the_very_same_prompt_leaves_one_token_to_compute() -> None:
    scheduler = Scheduler(Limits())
    first, again = prompted(list(range(128)), 9), prompted(list(range(128)))
    scheduler.add([first])
    run(scheduler)
    scheduler.add([again])
    assert [c.end - c.start for c in scheduler.plan() if c.sequence is again] == [1]
    assert scheduler.moves() == [Adopt(again, first, 127)]


def test_what_is_kept_makes_way_for_whoever_wants_the_room() -> None:
    scheduler = Scheduler(Limits(block_tokens=64, blocks=4))
    ended = [prompted([n] * 70) for n in (1, 2)]
    for each in ended:
        scheduler.add([each])
        run(scheduler)
    scheduler.moves()
    large = prompted([3] * 100, 2)
    scheduler.add([large])
    run(scheduler)
    assert scheduler.moves() == [Drop(ended[0])]
    assert scheduler.free_blocks == 0


def test_whoever_reads_its_prompt_takes_nothing_from_others() -> None:
    scheduler = Scheduler(Limits())
    first, reading = prompted(list(range(128))), prompted(list(range(128)))
    reading.reader = Nobody()
    scheduler.add([first])
    run(scheduler)
    scheduler.add([reading])
    assert [c.start for c in scheduler.plan()] == [0]


class Nobody:
    kind: Literal["logits", "hidden"] = "logits"

    def read(self, start: int, rows: object) -> None:
        pass


def test_rooms_that_double_are_counted_as_they_are() -> None:
    limits = Limits(block_tokens=64, longest=300, has_doubling_rooms=True)
    assert [limits.blocks_of(tokens) for tokens in (1, 64, 65, 129, 257)] == [1, 1, 2, 4, 5]


def test_many_prompts_are_read_faster_than_one() -> None:
    scheduler = Scheduler(Limits(step_tokens=256, mixed_tokens=32))
    scheduler.add([sequence(10, 50)])
    run(scheduler)
    scheduler.add([sequence(1000) for _ in range(3)])
    assert sum(c.end - c.start for c in scheduler.plan()) == 1 + 256 * 3 // 4
