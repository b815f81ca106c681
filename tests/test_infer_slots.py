"""Keys and values in shared slots: rooms grow, owners come, end and go, and nothing is mixed up."""

from random import Random

import torch

from tunesmith.infer.slots import Form, Slots

FORM = Form(heads=2, sizes=[3, 3], dtype=torch.float32, device="cpu")


def write(slots: Slots[str], owner: str, tokens: int, held: int) -> None:
    """Marks that tell the owner, the layer and the place."""
    slots.ensure(owner, tokens, held)
    slab, slot = slots.slab(owner), slots.slot(owner)
    for layer in range(2):
        for place in range(held, tokens):
            slab.keys[layer][slot, :, place] = mark(owner, layer, place)
            slab.values[layer][slot, :, place] = -mark(owner, layer, place)


def mark(owner: str, layer: int, place: int) -> float:
    return float(int(owner) * 10_000 + layer * 1000 + place)


def check(slots: Slots[str], owner: str, tokens: int, as_of: str | None = None) -> None:
    slab, slot = slots.slab(owner), slots.slot(owner)
    for layer in range(2):
        for place in range(tokens):
            expected = mark(as_of or owner, layer, place)
            assert (slab.keys[layer][slot, :, place] == expected).all()
            assert (slab.values[layer][slot, :, place] == -expected).all()


def test_owners_that_grow_end_and_leave_keep_their_own_tokens() -> None:
    dice, slots = Random(3), Slots[str](FORM, longest=300)
    running: dict[str, int] = {}
    kept: dict[str, int] = {}
    for number in range(1, 120):
        running[str(number)] = dice.randint(1, 90)
        write(slots, str(number), running[str(number)], 0)
        grown = dice.choice(list(running))
        more = min(300, running[grown] + dice.randint(1, 80))
        write(slots, grown, more, running[grown])
        running[grown] = more
        if dice.random() < 0.6:
            ended = dice.choice(list(running))
            slots.stop(ended)
            kept[ended] = running.pop(ended)
        if kept and dice.random() < 0.7:
            gone = dice.choice(list(kept))
            slots.free(gone)
            del kept[gone]
        for owner, tokens in (running | kept).items():
            check(slots, owner, tokens)
        for owner in running:
            assert slots.slot(owner) < slots.slab(owner).running
        for owner in kept:
            assert slots.slot(owner) >= slots.slab(owner).running


def test_a_beginning_that_was_taken_outlives_its_source() -> None:
    slots = Slots[str](FORM, longest=300)
    write(slots, "1", 100, 0)
    slots.adopt("2", "1", 80, 200)
    slots.free("1")
    check(slots, "2", 80, as_of="1")


def test_when_all_have_gone_no_memory_is_held() -> None:
    slots = Slots[str](FORM, longest=300)
    for owner in "123":
        write(slots, owner, 70, 0)
    for owner in "123":
        slots.free(owner)
    assert slots.bytes == 0
