"""Which samples a step gets, at what learning rate, and what is left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from train_fixtures import make_model, write_rows
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex
from tunesmith.spec.train import Optim
from tunesmith.train.batches import Feed, Sample, Shuffle, split
from tunesmith.train.omissions import MAX_LINES, Omissions
from tunesmith.train.pretrain import BlockSource
from tunesmith.train.schedule import learning_rate


class Numbers:
    """A source of one-token samples 0 … count-1, some of which are left out."""

    def __init__(self, count, without=()):
        self.count, self.without = count, set(without)
        self.at = self.seen = self.dropped = 0

    def open(self, epoch, position=None):
        self.at = 0
        if position:
            self.at, self.seen, self.dropped = position["at"], position["seen"], position["gone"]

    def position(self):
        return {"at": self.at, "seen": self.seen, "gone": self.dropped}

    def pull(self):
        while self.at < self.count:
            self.at += 1
            self.seen += 1
            if self.at - 1 not in self.without:
                return Sample([self.at - 1], [True], 1)
            self.dropped += 1
        return None

    def expected(self):
        return max(1.0, self.count * (1 - self.dropped / max(1, self.seen)))

    def nothing_usable(self):
        return ValueError("nothing")


def numbers(samples):
    return [sample.ids[0] for sample in samples]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 700), st.integers(0, 2**31 - 1), st.integers(0, 9))
def test_a_shuffle_is_a_permutation(count, seed, epoch):
    assert sorted(Shuffle(count, seed, epoch)) == list(range(count))


def test_a_shuffle_depends_on_seed_and_epoch_only():
    orders = [list(Shuffle(100, seed, epoch)) for seed, epoch in [(1, 0), (1, 1), (2, 0), (1, 0)]]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_shuffle_stays_the_same_from_release_to_release():
    assert list(Shuffle(10, 42, 0)) == [8, 0, 3, 5, 2, 6, 4, 7, 1, 9]


def test_a_shuffle_moves_places_evenly():
    firsts = [Shuffle(8, seed, 0)[0] for seed in range(4000)]
    assert all(400 < firsts.count(index) < 600 for index in range(8))


def test_a_step_never_reaches_over_the_end_of_an_epoch():
    feed = Feed(Numbers(5), 2)
    assert [numbers(feed.take()) for _ in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert feed.epoch == 1
    assert feed.epoch_samples == 5
    assert feed.steps_an_epoch == 3


def test_the_end_of_an_epoch_is_known_with_its_last_step_even_where_its_last_rows_are_unusable():
    feed = Feed(Numbers(6, without=[4, 5]), 2)
    feed.take()
    assert not feed.is_between_epochs
    feed.take()
    assert feed.is_between_epochs
    assert (feed.epoch, feed.epoch_samples, feed.progress) == (1, 4, 1.0)


def test_what_an_epoch_will_hold_is_foretold_from_what_was_left_out_so_far():
    feed = Feed(Numbers(100, without=range(0, 100, 2)), 5)
    feed.take()
    assert feed.epoch_samples is None
    assert 9 <= feed.steps_an_epoch <= 11


def test_a_feed_goes_on_from_any_step_with_the_same_samples():
    whole = Feed(Numbers(11, without=[3, 10]), 2)
    expected, states = [], []
    for _ in range(12):
        states.append(whole.state())
        expected.append(numbers(whole.take()))
    for start in range(12):
        resumed = Feed(Numbers(11, without=[3, 10]), 2)
        resumed.seek(states[start])
        assert [numbers(resumed.take()) for _ in range(12 - start)] == expected[start:]


def test_an_epoch_without_a_usable_sample_is_refused():
    with pytest.raises(ValueError, match="nothing"):
        Feed(Numbers(3, without=range(3)), 2).take()


def test_passes_hold_the_shortest_first_and_keep_to_the_budget():
    samples = [Sample([0] * size, [True] * size, size) for size in (9, 2, 30, 3, 4, 1)]
    passes = [[len(sample.ids) for sample in part] for part in split(samples, 10)]
    assert passes == [[1, 2, 3, 4], [9], [30]]


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_learning_rates_are_those_of_transformers(scheduler):
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(name, adam, num_warmup_steps=3, num_training_steps=10)
    optim = Optim(learning_rate=0.3, scheduler=scheduler, warmup_ratio=0.21)
    for step in range(11):
        assert learning_rate(optim, step, 10) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        adam.step()
        theirs.step()


def test_warmup_steps_win_over_a_ratio():
    optim = Optim(learning_rate=1, warmup_ratio=0.9, warmup_steps=2, scheduler="constant")
    assert [learning_rate(optim, step, 10) for step in range(4)] == [0, 0.5, 1, 1]


def test_omissions_count_all_and_name_the_first_lines():
    omissions = Omissions()
    for line in range(1, 31):
        omissions.add("overlong", line)
    omissions.add("masked", 7)
    text = omissions.sentence()
    assert "30 rows longer than max_length (lines 1, 2" in text
    assert "20, …" in text
    assert "1 row without a token to learn from (line 7)" in text
    again = Omissions.restore(omissions.state())
    assert again.sentence() == text
    assert len(again.lines["overlong"]) == MAX_LINES
    assert again.dropped == 31


def test_a_step_of_packed_documents_knows_the_lines_that_it_was_made_of(tmp_path):
    texts = [chr(97 + i) * (3 + 5 * (i % 4)) for i in range(20)]
    path = write_rows(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    renderer = Renderer.load(make_model(tmp_path / "model"))
    with RowIndex.open(path) as rows:
        feed = Feed(BlockSource(rows, renderer, 16, 7), 3)
        for _ in range(2 * feed.steps_an_epoch):
            before = feed.state()
            ids = [id for sample in feed.take() for id in sample.ids]
            letters = set(renderer.decode(ids)) & set("".join(texts))
            told = {texts[line - 1][0] for line in feed.lines(before)}
            assert letters <= told
            assert len(told - letters) <= 1  # one of which the end token alone is left
        assert feed.epoch >= 1
