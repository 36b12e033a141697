"""Messages to a service that may be slow or gone: a thread delivers them in order, and nobody waits for it."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from gptface_dist.errors import first_line, one_line

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Messages that wait, at most; of more, the oldest but the first are dropped (the first one opens the connection)."""
PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
"""Seconds between two tries of a message: they double from the first to the second of these."""
CLOSE_S = 15.0
"""Seconds that :meth:`Outbox.close` waits for messages that are left."""


class Rejected(Exception):
    """The service does not take a message, now or later."""


class Outbox:
    """Delivers messages, which are functions that may raise, one after another; one that fails is tried again, unless it is
    :class:`Rejected`.
    """

    def __init__(self, to: str):
        self._to = to
        self._waiting: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._dropped = 0
        # A daemon: a process that ends does not wait for it.
        self._thread = threading.Thread(target=self._deliver, daemon=True, name="outbox")
        self._thread.start()

    def put(self, message: Callable[[], object]) -> None:
        """Deliver ``message()`` later."""
        with self._changed:
            self._waiting.append(message)
            if len(self._waiting) > MOST_WAITING:
                del self._waiting[1]
                self._dropped += 1
            self._changed.notify()

    def close(self, remark: str) -> None:
        """Wait up to :data:`CLOSE_S` for what is left. A warning with ``remark`` counts messages that were not delivered."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_S)
        with self._changed:
            lost = len(self._waiting) + self._dropped
            self._waiting.clear()
        if lost:
            log.warning("%s: %d messages were not delivered; %s", self._to, lost, remark)

    def _deliver(self) -> None:
        pause = PAUSE_S
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closing:
                        return
                    self._changed.wait()
                message = self._waiting[0]
            try:
                message()
            except Rejected as error:
                log.warning("%s: %s; this message is left out", self._to, one_line(error))
            except Exception as error:
                if pause == PAUSE_S:
                    log.warning("%s: %s; training goes on, and it is tried again", self._to, first_line(error))
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            if pause > PAUSE_S:
                log.warning("%s: it is there again", self._to)
                pause = PAUSE_S
            with self._changed:
                # Unless `close` has given up meanwhile.
                if self._waiting:
                    self._waiting.popleft()
