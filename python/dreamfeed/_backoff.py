"""How long to wait before the next attempt."""

import random
import time


class Backoff:
    """Exponential with jitter: the k-th wait is uniform in 0.1 to 1 times min(longest, first * 2**k)."""

    def __init__(self, first: float = 0.2, longest: float = 10.0, give_up_after: float | None = None) -> None:
        self._first, self._longest, self._give_up_after = first, longest, give_up_after
        self._failures = 0
        self._since: float | None = None

    def begin(self, longest: float) -> float:
        """An attempt begins: the seconds that it may take, at most `longest`."""
        self._since = time.monotonic() if self._since is None else self._since
        if self._give_up_after is None:
            return longest
        # Not less than an attempt needs.
        return min(longest, max(self._since + self._give_up_after - time.monotonic(), 1.0))

    def reset(self) -> None:
        """An attempt succeeded."""
        self._failures, self._since = 0, None

    def wait(self) -> float | None:
        """An attempt failed: the seconds to wait before the next; None where it is time to give up."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        bound: float = min(self._longest, self._first * 2 ** min(self._failures, 32))
        self._failures += 1
        wait = bound * random.uniform(0.1, 1.0)
        if self._give_up_after is None:
            return wait
        left = self._since + self._give_up_after - now
        return min(wait, left) if left > 0 else None
