"""SIGINT, SIGTERM and SIGHUP unwind the same scopes as any failure; a further one is only answered."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from conftest import REPOSITORY

DRIVER = """
import select, signal, sys, time
sys.path.insert(0, sys.argv[1])
from migrena import Interrupted, Screen, Undo, signals

def slow_step():
    print("undoing", flush=True)
    while not select.select([sys.stdin], [], [], 0.1)[0]:  # a signal just before a call that waits for ever would not be heard
        pass
    print(sys.stdin.readline().strip(), flush=True)

undo = Undo(Screen())
try:
    with signals(undo), undo:
        undo.always("tidy up", lambda: print("tidied", flush=True))
        undo.on_failure("delete the destination", slow_step)
        print("working", flush=True)
        while True:
            time.sleep(0.1)
except Interrupted as error:
    print("ended by", error.number, flush=True)
print("handlers are back:", signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("further", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_during_the_undoing_is_answered_and_stops_nothing(first: signal.Signals, further: signal.Signals) -> None:
    words = [sys.executable, "-c", DRIVER, str(REPOSITORY)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == "working\n"
        process.send_signal(first)
        assert process.stdout.readline() == "undoing\n"
        process.send_signal(further)
        said = iter(process.stderr.readline, "")
        assert any("still undoing: delete the destination; please wait" in line for line in said)
        process.stdin.write("undone\n")
        process.stdin.close()
        assert process.stdout.read() == f"undone\ntidied\nended by {first.value}\nhandlers are back: True\n"
        process.stderr.read()
    assert process.returncode == 0


UNBROKEN = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from migrena import Interrupted, Screen, Undo, signals, defer_signals

def elsewhere():
    with defer_signals():
        begun.set()
        time.sleep(60)

begun = threading.Event()
try:
    with signals(Undo(Screen())):
        try:
            with defer_signals():
                with defer_signals():
                    os.kill(os.getpid(), signal.SIGTERM)
                    print("heard, not broken")
                print("still whole")
            print("never said")
        except Interrupted as error:
            print("then raised", error.number)
    with signals(Undo(Screen())):
        threading.Thread(target=elsewhere, daemon=True).start()
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)
        print("never said")
except Interrupted as error:
    print("raised at once", error.number)
"""


def test_a_signal_waits_for_the_end_of_what_it_must_not_cut_in_two_but_for_no_other_thread() -> None:
    done = subprocess.run([sys.executable, "-c", UNBROKEN, str(REPOSITORY)], check=True, capture_output=True, text=True)
    assert done.stdout == "heard, not broken\nstill whole\nthen raised 15\nraised at once 2\n"


def test_without_a_signal_nothing_is_undone_and_the_handlers_are_put_back() -> None:
    calm = DRIVER.replace("while True:\n            time.sleep(0.1)", "pass").replace("error.number", "0")
    done = subprocess.run([sys.executable, "-c", calm, str(REPOSITORY)], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout == "working\ntidied\nhandlers are back: True\n"


def test_a_first_signal_while_a_failed_run_is_undone_is_only_answered() -> None:
    failing = DRIVER.replace("while True:\n            time.sleep(0.1)", "raise ValueError").replace(
        "except Interrupted as error:", "except ValueError:").replace("error.number", '"itself"')
    words = [sys.executable, "-c", failing, str(REPOSITORY)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        assert [process.stdout.readline() for _ in range(2)] == ["working\n", "undoing\n"]
        process.send_signal(signal.SIGTERM)
        assert any("still undoing: delete the destination" in line for line in iter(process.stderr.readline, ""))
        process.stdin.write("undone\n")
        process.stdin.close()
        assert process.stdout.read() == "undone\ntidied\nended by itself\nhandlers are back: True\n"
        process.stderr.read()
    assert process.returncode == 0


def test_when_a_run_has_ended_and_only_the_telling_is_left_a_signal_is_ignored() -> None:
    driver = "import signal, sys; sys.path.insert(0, sys.argv[1]); from migrena import SIGNALS, main; code = main(['rollback']); " \
             "print(code, [signal.getsignal(each) is signal.SIG_IGN for each in SIGNALS])"
    done = subprocess.run([sys.executable, "-c", driver, str(REPOSITORY)], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout == "2 [True, True, True]\n"


def test_a_hangup_that_nohup_has_ignored_stays_ignored() -> None:
    words = ["nohup", sys.executable, "-c", DRIVER, str(REPOSITORY)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "undoing\n"
        out, _ = process.communicate("go\n", timeout=30)
    assert "ended by 15" in out
