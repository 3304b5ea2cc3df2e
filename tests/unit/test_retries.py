"""Attempts of a copy: what arrives renews them, in each pass anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

import migrena
from migrena import BothEnds, Chunk, HostError, Pass, with_retries
from unit.makers import UUID

CHUNKS = [Chunk(offset, 10, 10, ((offset, 10),)) for offset in (0, 10, 20, 30)]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ends of a copy that has one more attempt after a failure, in no time."""
    monkeypatch.setattr(migrena, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: 0.0))
    journal, screen = SimpleNamespace(write=lambda *_, **__: None), SimpleNamespace(warn=lambda text: None)
    run = SimpleNamespace(settings=SimpleNamespace(retries=1), journal=journal, screen=screen)
    made = object.__new__(BothEnds)
    vars(made).update(run=run, is_ending=False, arrived=set(), renew=lambda: None, ends=lambda: None)
    return made


def failing(both: BothEnds, *reached: int) -> Any:
    """Each call gets through so many chunks from the first one on, and then fails; the one after the last is successful."""
    turns = iter(reached)

    def act(_ends: object) -> str:
        if (number := next(turns, None)) is None:
            return "done"
        for chunk in CHUNKS[:number]:
            both.count(chunk, 10)
        raise HostError("lost")

    return act


@pytest.mark.parametrize(("reached", "is_done"), [
    ((0,), True), ((0, 0), False), ((1, 2, 3, 4), True), ((1, 1, 1), False), ((2, 3), True), ((2, 2), False)])
def test_an_attempt_that_gets_further_than_all_before_renews_them(both: Any, reached: tuple[int, ...], is_done: bool) -> None:
    if is_done:
        assert with_retries(both, failing(both, *reached), "runs on") == "done"
    else:
        with pytest.raises(HostError, match="lost"):
            with_retries(both, failing(both, *reached), "runs on")


def test_each_pass_of_a_warm_copy_counts_for_itself(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([1, 2, None, 1, 2, None])

    def move_disk(_ends: object, _job: object, callbacks: Any, _known: object) -> tuple[Any, object]:
        if (number := next(turns)) is None:
            return SimpleNamespace(held=1, looking=1.0, sending=1.0, seconds=1.0), None
        for chunk in CHUNKS[:number]:
            callbacks.arrived(chunk, 10)
        raise HostError("lost")

    job = SimpleNamespace(source=SimpleNamespace(is_file=False, length=1), key="root")
    host = SimpleNamespace(script=lambda *_: "0\nrunning")
    copy = SimpleNamespace(both=both, job=job, known=None, begun=lambda **_: job)
    run = SimpleNamespace(plan=SimpleNamespace(server=SimpleNamespace(id=UUID)))
    both.ends = lambda: SimpleNamespace(source=host)
    for name in ("require_it_runs", "lock_fresh", "require_running"):
        monkeypatch.setattr(migrena, name, lambda *_: None)
    for name, stand_in in (("move_disk", move_disk), ("replace", lambda one, **_: one),
                           ("gate", lambda *_, **__: SimpleNamespace(source=SimpleNamespace(server=None)))):
        monkeypatch.setattr(migrena, name, stand_in)
    for _ in range(2):
        assert migrena.one_pass(cast(Any, run), cast(Any, copy)) == Pass(1, 1.0, 1.0, 1.0)
