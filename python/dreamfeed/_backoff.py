"""How long to wait before the next attempt."""

import random
import time


class Backoff:
    """Exponential with jitter: the k-th wait is uniform in 0.1 to 1 times min(longest, first * 2**k)."""

    def __init__(self, first: float = 0.2, longest: float = 10.0, give_up_after: float | None = None) -> None:
        self._first, self._longest, self._give_up_after = first, longest, give_up_after
        self._failures = 0
        self._since: float | None = None

    def reset(self) -> None:
        """An attempt succeeded."""
        self._failures, self._since = 0, None

    def wait(self) -> float | None:
        """An attempt failed: the seconds to wait before the next; None where it is time to give up."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if self._give_up_after is not None and now - self._since >= self._give_up_after:
            return None
        bound: float = min(self._longest, self._first * 2 ** min(self._failures, 32))
        self._failures += 1
        return bound * random.uniform(0.1, 1.0)
