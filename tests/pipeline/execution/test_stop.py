"""Requests to stop: answered at once with what happens, one step at most, and a second one that ends all."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.execution.stop import FILE_S, FORCE_S, REPORTING, StopRequests

STEP = "stopping after step 8, then saving"
ANSWER = f"{STEP}; again: stop now without saving"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def stop(said: list[str], tmp_path: Path) -> Iterator[StopRequests]:
    with StopRequests(said.append, tmp_path / "STOP") as stop:
        yield stop


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # The handler has run after that.


def within(seconds: float, there: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_answered_with_what_is_done_and_nothing_more_begins(
    number: int, stop: StopRequests, said: list[str]
) -> None:
    assert stop.begin(STEP)
    assert not stop.asked()
    send(number)
    assert stop.asked()
    within(5, lambda: said == [ANSWER])
    assert not stop.begin("stopping after step 9, then saving")
    with pytest.raises(KeyboardInterrupt):
        stop.begin_at_once("no step of dpo has begun")
    assert stop.cut


def test_start_up_and_evaluations_are_cut_short(stop: StopRequests, said: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)
    assert stop.cut
    assert said == ["stopping at once: no step has begun, so there is nothing to save"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_is_lost_in_a_callback_is_raised_again(stop: StopRequests) -> None:
    class Dropped:
        def __del__(self) -> None:
            send(signal.SIGTERM)
            sum(range(1000))  # Where the handler's exception is raised: printed and forgotten.

    def work() -> None:
        Dropped()
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - began < 10
    assert stop.cut


def test_the_answer_tells_what_was_cut_and_not_what_came_of_it(stop: StopRequests, said: list[str]) -> None:
    def evaluate() -> None:
        with stop.ending():
            stop.begin_at_once("the evaluation of sft is done anew next time")
            send(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert stop.cut
    assert said == ["stopping at once: the evaluation of sft is done anew next time"]


def test_a_second_signal_ends_without_saving_and_is_no_cut(stop: StopRequests, said: list[str]) -> None:
    stop.begin(STEP)
    send(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert not stop.cut
    within(5, lambda: said == [ANSWER, "stopping now without saving"])


def test_a_terminal_that_hangs_up_twice_asks_once(stop: StopRequests, said: list[str]) -> None:
    """The kernel sends SIGHUP to the job, and the shell, which gets it too, sends it on."""
    stop.begin(STEP)
    for _ in range(3):
        send(signal.SIGHUP)
    within(5, lambda: said)
    time.sleep(0.05)
    assert said == [ANSWER]


def test_signals_in_the_middle_of_a_native_call_are_answered_there_and_then(
    stop: StopRequests, said: list[str]
) -> None:
    """Two of them reach Python's handler as one, when the call is over: the second counts all the same."""
    stop.begin(STEP)
    answers: list[int] = []

    def compute() -> None:
        began = time.monotonic()
        while not answers or time.monotonic() < began + 10:
            hashlib.pbkdf2_hmac("sha256", b"native", b"call", 2_000_000)

    def ask() -> None:
        for answered in (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
            within(5, lambda n=answered: len(said) == n)
            answers.append(answered)

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(KeyboardInterrupt):
        compute()
    asking.join()
    assert answers == [1, 2]
    assert said == [ANSWER, "stopping now without saving"]
    assert not stop.cut


def test_nothing_cuts_the_end_of_a_run_short(stop: StopRequests, said: list[str]) -> None:
    with stop.ending():
        stop.begin(STEP)
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    within(5, lambda: said == ["the run is ending already", "stopping now"])


def test_the_report_is_left_out_and_the_saved_work_stays(stop: StopRequests, said: list[str]) -> None:
    stop.begin(STEP)
    send(signal.SIGTERM)
    within(5, lambda: said)
    stop.finish(REPORTING)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)
    within(5, lambda: said == [ANSWER, "stopping now"])


def test_the_stop_file_asks_as_a_signal_does(stop: StopRequests, said: list[str], tmp_path: Path) -> None:
    stop.begin(STEP)
    (tmp_path / "STOP").touch()
    within(FILE_S + 5, lambda: said == [ANSWER])
    assert not stop.begin("stopping after step 9, then saving")
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)
    assert not stop.cut


def test_the_stop_file_cuts_short_what_can_be(stop: StopRequests, said: list[str], tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(FILE_S + 5)
    assert stop.cut
    assert said == ["stopping at once: no step has begun, so there is nothing to save"]


def test_in_another_thread_only_the_file_can_ask(tmp_path: Path) -> None:
    said: list[str] = []
    begun: list[bool] = []

    def work() -> None:
        with StopRequests(said.append, tmp_path / "STOP") as stop:
            begun.append(stop.begin(STEP))
            (tmp_path / "STOP").touch()
            begun.append(stop.begin("stopping after step 9, then saving"))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (begun, said) == ([True, False], [ANSWER])
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_are_put_back_and_nohup_is_respected(said: list[str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts = signal.getsignal(signal.SIGINT)
    try:
        with StopRequests(said.append) as stop:
            stop.begin(STEP)
            send(signal.SIGHUP)
            assert not stop.asked()
            assert signal.getsignal(signal.SIGINT) is not interrupts
        assert signal.getsignal(signal.SIGINT) is interrupts
    finally:
        signal.signal(signal.SIGHUP, before)


STUBBORN = """
import subprocess, sys, time
from pipeline.execution.stop import StopRequests
with StopRequests(print) as stop:
    stop.begin("stopping after step 1, then saving")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


def test_a_run_that_does_not_end_after_the_second_signal_is_ended_with_its_processes() -> None:
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        child = psutil.Process(int(run.stdout.readline()))
        run.terminate()
        time.sleep(0.1)
        began = time.monotonic()
        run.terminate()
        assert run.wait(FORCE_S + 20) == 130
        assert time.monotonic() - began >= FORCE_S
    within(5, lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
