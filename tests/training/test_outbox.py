"""Messages are delivered in order, again where that fails, and nobody waits for them."""

import threading

import pytest

from gptface_dist.training.callbacks import outbox
from gptface_dist.training.callbacks.outbox import Outbox, Rejected


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PAUSE_S", 0.001)


def test_in_order_and_again_where_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    delivered: list[int] = []
    failures = {2: 3, 4: 1}

    def message(number: int) -> None:
        if failures.get(number, 0):
            failures[number] -= 1
            raise ConnectionError("gone")
        delivered.append(number)

    box = Outbox("the service")
    for number in range(6):
        box.put(lambda number=number: message(number))
    box.close("all is elsewhere")
    assert delivered == list(range(6))
    assert "the service: ConnectionError: gone; training goes on" in caplog.text
    assert "it is there again" in caplog.text
    assert "not delivered" not in caplog.text


def test_what_is_rejected_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    delivered: list[int] = []

    def refuse() -> None:
        raise Rejected("no such metric")

    box = Outbox("the service")
    box.put(refuse)
    box.put(lambda: delivered.append(1))
    box.close("all is elsewhere")
    assert delivered == [1]
    assert "no such metric; this message is left out" in caplog.text


def test_a_service_that_hangs_holds_up_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(outbox, "CLOSE_S", 0.05)
    monkeypatch.setattr(outbox, "MOST_WAITING", 3)
    there = threading.Event()
    box = Outbox("the service")
    for _ in range(5):
        box.put(there.wait)
    box.close("all is elsewhere")
    there.set()
    assert "5 messages were not delivered; all is elsewhere" in caplog.text
