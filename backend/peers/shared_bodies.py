"""Answers of a scheduler as JSON: what many are told alike is encoded once. No I/O."""

import msgspec

from backend.peers.wire import Answer, MemberChange

KEPT = 256
"""Lists of members, some for each scope that thousands join at the moment."""
SHARED_MIN = 16
"""Members; fewer are encoded faster than looked up."""


class SharedBodies:
    """Keeps the encoded lists of members; `Membership` gives the same object to many."""

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()
        self._kept: dict[int, tuple[MemberChange, msgspec.Raw]] = {}

    def encode(self, answer: Answer) -> bytes:
        """The body of an answer."""
        if len(answer.members.joined) < SHARED_MIN:
            return self._encoder.encode(answer)
        fields = msgspec.structs.asdict(answer)
        fields["members"] = self._encoded(answer.members)
        return self._encoder.encode(fields)

    def _encoded(self, members: MemberChange) -> msgspec.Raw:
        kept = self._kept.get(id(members))
        if kept is None:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            kept = self._kept[id(members)] = members, msgspec.Raw(self._encoder.encode(members))
        return kept[1]
