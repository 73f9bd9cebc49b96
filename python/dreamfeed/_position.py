"""Where readers stand: what a checkpoint keeps, and what the next iteration starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: Where a stream starts: the next image to be made, the oldest, a sequence, or a cursor.
Start = Literal["latest", "earliest"] | int | bytes

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Place:
    """A reader's place in the log."""

    #: What a request starts from.
    start: Start
    #: All images of this reader's before it were taken; None where nobody knows how far a cursor or "earliest" is.
    sequence: int | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Which batch of which iteration a batch is."""

    #: The name of the stream in the process that trains.
    stream: str
    #: How often that stream had been moved by hand as this iteration began; None where the worker loaded its own state.
    moves: int | None
    #: (number, of how many) of the DataLoader's worker that read it; None = no worker.
    worker: tuple[int, int] | None
    #: Counts the batches of one worker.
    number: int
    #: Where its reader began this iteration.
    begun: Place
    #: The reader's place before it, and after it.
    before: Place
    after: Place


class Positions:
    """The place of every reader of one rank: after what the trainer was handed, or after what it says it trained on."""

    def __init__(self, readers: int | None = None) -> None:
        #: How many readers there are over all ranks; None = nobody has read yet.
        self.readers = readers
        self._handed: dict[int, Place] = {}
        # Where the readers that were handed a batch began the present iteration.
        self._begun: dict[int, Place] = {}
        # From the first `record` on.
        self._recorded: dict[int, Place] | None = None

    @property
    def places(self) -> dict[int, Place]:
        return self._handed if self._recorded is None else self._recorded

    @property
    def is_recorded(self) -> bool:
        """Whether the trainer says what it trained on."""
        return self._recorded is not None

    def put(self, shard: tuple[int, int], place: Place) -> None:
        """A worker's own reader stands here, whatever was recorded by the trainer."""
        if self.readers != shard[1]:
            self._handed, self.readers = {}, shard[1]
        else:
            self._handed = dict(self.places)
        self._recorded = None
        self._handed[shard[0]] = place

    def hand(self, shard: tuple[int, int], origin: Origin) -> None:
        """The trainer was handed this batch."""
        index, count = shard
        if self.readers != count:
            self._handed, self._begun, self._recorded, self.readers = {}, {}, None, count
        if index in self._begun and origin.before == origin.begun:
            self._begun.clear()  # a new iteration
        self._begun.setdefault(index, origin.begun)
        for sibling in _siblings(shard, origin):
            self._handed.setdefault(sibling, origin.begun)  # it has not moved from where all began
        self._handed[index] = origin.after

    def record(self, shard: tuple[int, int], origin: Origin) -> None:
        """The trainer trained on this batch.

        Raises:
            ValueError: it does not follow what was recorded before it.
        """
        index, count = shard
        recorded = self._recorded
        if recorded is None or self.readers != count:
            recorded = {**self._handed, **self._begun} if self.readers == count else {}
        held = recorded.get(index, origin.begun)
        if self.readers not in (None, count):
            held, _ = self._regroup(count)
        if held.start != origin.before.start:
            raise ValueError(
                f"the batch from sequence {origin.before.sequence} on does not follow the position of its reader, "
                f"{_told(held)}: record every batch that was trained on once, in the order in which they came, "
                "and load a position before iter(loader)"
            )
        for sibling in _siblings(shard, origin):
            recorded.setdefault(sibling, origin.begun)
        recorded[index] = origin.after
        self._recorded, self.readers = recorded, count

    def begin(self, shard: tuple[int, int], workers: int, start: Start) -> tuple[Place, str | None]:
        """Where a reader begins, `start` where it never read; and what the user should hear of it.

        Raises:
            ValueError: this position does not tell.
        """
        index, count = shard
        places = self.places
        if self.readers is None:
            return Place(start, start if isinstance(start, int) else None), None
        if self.readers != count:
            return self._regroup(count)
        if index in places:
            return places[index], None
        if any(reader // workers == index // workers for reader in places):
            return Place(start), None  # another worker of this rank has moved, and this one had not
        raise ValueError(
            f"the loaded position is that of readers {sorted(places)} of {count}, and this is reader "
            f"{index}: let every rank load its own state, or dreamfeed.merge_states(...) of the states of all"
        )

    def _regroup(self, count: int) -> tuple[Place, str | None]:
        """The lowest place, for another number of readers."""
        places, readers = self.places, self.readers or 0
        known = {reader: place.sequence for reader, place in places.items() if place.sequence is not None}
        there = f"the position is that of {readers} readers (ranks times DataLoader workers), and now there are {count}"
        if len(places) < readers:
            raise ValueError(
                f"{there}: load dreamfeed.merge_states(...) of the states of all ranks, use as many again, or "
                "stream.seek() to a sequence"
            )
        if len(known) < readers:
            raise ValueError(f"{there}: use as many again, or stream.seek() to a sequence")
        lowest = min(known.values())
        twice = sum(
            len(range(lowest + (reader - lowest) % readers, sequence, readers))
            for reader, sequence in known.items()
        )
        message = f"{there}: all of them start from the lowest, sequence {lowest}, so that {twice} images come twice"
        return Place(lowest, lowest), message if twice else None

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain strings and numbers."""
        positions = {str(reader): _written(place) for reader, place in sorted(self.places.items())}
        return {"dreamfeed_stream": _FORMAT, "readers": self.readers, "positions": positions}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Positions":
        """The positions of a :meth:`state`.

        Raises:
            ValueError: it is none.
        """
        if state.get("dreamfeed_stream") != _FORMAT:
            raise ValueError(
                f"no state that this version of DreamStream wrote; its keys are {sorted(map(str, state))}"
            )
        positions = cls(state["readers"])
        positions._handed = {int(reader): _read(place) for reader, place in state["positions"].items()}
        return positions


def merged(states: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    """One state of the states of several ranks."""
    readers = {state["readers"] for state in states if state["readers"] is not None}
    if len(readers) > 1:
        raise ValueError(f"states of {sorted(readers)} readers cannot be merged: they are of different runs")
    positions = {reader: place for state in states for reader, place in state["positions"].items()}
    return {"dreamfeed_stream": _FORMAT, "readers": next(iter(readers), None), "positions": positions}


def _siblings(shard: tuple[int, int], origin: Origin) -> range:
    """The readers of the same rank."""
    number, workers = origin.worker or (0, 1)
    first = shard[0] - number
    return range(first, first + workers)


def _told(place: Place) -> str:
    return f"sequence {place.sequence}" if place.sequence is not None else f"{place.start!r}"


def _written(place: Place) -> dict[str, Any]:
    written: dict[str, Any] = {} if place.sequence is None else {"sequence": place.sequence}
    if isinstance(place.start, bytes):
        return {"cursor": place.start.hex()} | written
    return written if isinstance(place.start, int) else {"start": place.start} | written


def _read(written: Mapping[str, Any]) -> Place:
    sequence = written.get("sequence")
    if "cursor" in written:
        return Place(bytes.fromhex(written["cursor"]), sequence)
    return Place(written.get("start", sequence), sequence)
