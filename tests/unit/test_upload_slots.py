"""Who is served, and who is sent to somebody else."""

import random
from dataclasses import replace

from backend.peers.served import Admit, BlobRequest, Busy, Redirect
from backend.peers.upload_slots import GIVEN_S, QUEUE_LONG, UploadSlots
from backend.priority import FetchClass

BLOB, MIB = "a" * 64, 1 << 20


def request(number: int) -> BlobRequest:
    url = f"http://10.0.0.{number}:1"
    return BlobRequest("decoded", BLOB, "", None, False, FetchClass.PREFETCH, f"10.0.0.{number}", "", url)


class Rig:
    def __init__(self, slots: int = 64) -> None:
        self.now, self.waiting = 0.0, 0
        self.slots = UploadSlots(
            lambda _: 64 * MIB, lambda: self.now, lambda: self.waiting, slots, random.Random(1)
        )

    def give(self, number: int, sent_bytes: int = MIB) -> None:
        asked = request(number)
        assert self.slots.admit(asked, 0, MIB) == Admit()
        self.slots.done(asked, 0, MIB, sent_bytes)


def test_a_long_queue_sends_others_to_who_was_given_it() -> None:
    rig = Rig()
    rig.give(1)
    assert rig.slots.given(request(2), 0) == 1
    assert rig.slots.admit(request(2), 0, MIB) == Admit()
    rig.waiting = QUEUE_LONG
    assert rig.slots.admit(request(3), 0, MIB) == Redirect("http://10.0.0.1:1")
    assert rig.slots.admit(request(1), 0, MIB) == Admit()  # not to itself
    assert rig.slots.admit(request(3), MIB, 2 * MIB) == Admit()  # nobody has that
    rig.now = GIVEN_S
    assert rig.slots.admit(request(3), 0, MIB) == Admit()


def test_who_got_a_part_only_is_not_named() -> None:
    rig = Rig()
    rig.give(1, sent_bytes=MIB - 1)
    rig.waiting = QUEUE_LONG
    assert rig.slots.admit(request(3), 0, MIB) == Admit()


def test_encoded_ranges_are_told_apart_by_where_they_begin() -> None:
    """They are smaller than what they decode to, so that many of them are in what would be one piece."""
    rig = Rig()
    first, second = (replace(request(number), kind="encoded") for number in (1, 2))
    assert rig.slots.admit(first, 0, 1000) == Admit()
    rig.slots.done(first, 0, 1000, 1000)
    rig.waiting = QUEUE_LONG
    assert rig.slots.admit(second, 1000, 2000) == Admit()  # nobody has that
    assert rig.slots.admit(second, 0, 1000) == Redirect("http://10.0.0.1:1")
    client = replace(second, peer_url="")  # of registries: it would take a redirection to heart
    assert rig.slots.admit(client, 0, 1000) == Admit()


def test_full_is_busy_for_a_moment() -> None:
    rig = Rig(slots=1)
    assert rig.slots.admit(request(1), 0, MIB) == Admit()
    answer = rig.slots.admit(request(2), 0, MIB)
    assert isinstance(answer, Busy)
    assert 0 < answer.retry_after_s < 1
    rig.slots.done(request(1), 0, MIB, MIB)
    assert rig.slots.admit(request(2), 0, MIB) == Admit()
