"""Functions of the user's in a process of their own: it can be ended, and nothing of it reaches this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.rewards.functions import Samples, call_reward_function, find_function
from pipeline.rewards.user_functions import functions_closed, start_functions
from pipeline.rewards.values import RewardCall

MODULE = """
import asyncio, ctypes, os, re, signal, subprocess, sys, threading, time

print("imported")
lock = asyncio.Semaphore(1)
calls = 0

def pid(completions, **_):
    return [os.getpid()] * len(completions)

def counted(completions, **_):
    global calls
    calls += 1
    return [calls] * len(completions)

async def in_turn(completions, **_):
    async def one(text):
        async with lock:
            await asyncio.sleep(0.001)
            return len(text)
    return await asyncio.gather(*map(one, completions))

def runs_its_own_loop(completions, **_):
    return asyncio.run(in_turn_anew(completions))

async def in_turn_anew(completions):
    return [7] * len(completions)

def backtracks(completions, **_):
    return [1.0 if re.match(r"^(a+)+$", text) else 0.0 for text in completions]

def sleeps(completions, **_):
    time.sleep(0.3)
    return [1] * len(completions)

def alarmed(completions, **_):
    def over(*_):
        raise TimeoutError
    found = []
    for text in completions:
        try:
            signal.signal(signal.SIGALRM, over)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            time.sleep(5 if text == "bb" else 0)
            found.append(1)
        except TimeoutError:
            found.append(-1)
    return found  # the last alarm is left on

def thread_name(completions, **_):
    return [float(threading.current_thread() is threading.main_thread())] * len(completions)

def leaves_the_group(completions, answer):
    os.setpgrp()
    starts(completions, answer)

def starts(completions, answer):
    for command in (["sleep", "77"], [sys.executable, "-c", "import time; time.sleep(77)"]):
        with open(answer[0], "a") as file:
            print(subprocess.Popen(command).pid, file=file)
    with open(answer[0], "a") as file:
        print(os.getpid(), file=file)
    backtracks(["a" * 40 + "b"])

def leaves_a_server(completions, answer):
    import atexit
    def note(text):
        with open(answer[0], "a") as file:
            print(text, file=file)
    note(os.getpid())
    note(subprocess.Popen(["sleep", "77"]).pid)
    atexit.register(note, "put away")
    return [0] * len(completions)

def exits(**_):
    os._exit(3)

def crashes(**_):
    ctypes.string_at(0)

def kills(**_):
    os.kill(os.getpid(), signal.SIGKILL)

def hears(completions, **_):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    return [1] * len(completions)

def terminates_a_process_of_its_own(completions, **_):
    import multiprocessing
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(77,))
    process.start()
    process.terminate()
    process.join()
    return [process.exitcode] * len(completions)

def closes(**_):
    os.closerange(3, 256)
    time.sleep(60)

def reads(completions, **_):
    return [len(sys.stdin.read())] * len(completions)

def moves(completions, **_):
    os.chdir("/")
    os.environ["MOVED"] = "1"
    return [0] * len(completions)

def prints_pieces(completions, **_):
    for piece in ("one ", "line", "\\n", "no end"):
        os.write(1, piece.encode())
        time.sleep(0.05)
    return [0] * len(completions)

def prints_much(completions, **_):
    print("y" * 3_000_000)
    sys.stderr.write("one \\x1b[2J line\\n")
    return [0] * len(completions)

class Odd(Exception):
    def __init__(self):
        self.handle = open(os.devnull)
    def __str__(self):
        return "odd one"

def raises_what_cannot_be_pickled(**_):
    raise Odd

def raises_without_a_text(**_):
    class Silent(Exception):
        def __str__(self):
            raise ValueError
    raise Silent

def changes(prompts, completions, tags, **_):
    for prompt, completion, tag in zip(prompts, completions, tags):
        prompt.extend(completion)
        tag["seen"] = tag.get("seen", 0) + 1
    prompts.clear()
    return [tag["seen"] for tag in tags]

def changes_and_raises(prompts, tags, **_):
    seen = [tag.get("seen") for tag in tags]
    changes(prompts, [[]] * len(tags), tags)
    raise ValueError(f"{seen}")

def tensors(completions, **_):
    import numpy
    return numpy.arange(len(completions), dtype="float32")

def raises_then_hangs(completions, **_):
    if len(completions) < 3:
        time.sleep(60)
    raise ValueError("down")
"""
SAMPLES = Samples(["q"] * 3, ["a", "bb", "ccc"], [[1], [2], [3]])


def close_functions() -> None:
    with functions_closed():
        pass


@pytest.fixture
def of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RewardCall]]:
    (tmp_path / "functions_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def call(name: str, samples: Samples = SAMPLES, timeout_s: float = 20) -> RewardCall:
        return call_reward_function(find_function(f"functions_of_mine:{name}"), samples, timeout_s)

    yield call
    close_functions()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_module_is_loaded_once_into_another_process_for_all_of_its_functions(of: Any) -> None:
    (pid,) = set(of("pid").values)
    assert pid != os.getpid()
    assert [of("counted").values for _ in range(2)] == [[1.0] * 3, [2.0] * 3]
    assert set(of("pid").values) == {pid}
    assert "functions_of_mine" not in sys.modules


def test_a_lock_made_while_the_module_was_imported_works_in_every_step(of: Any) -> None:
    for _ in range(3):
        assert of("in_turn").values == [1.0, 2.0, 3.0]
        assert of("runs_its_own_loop").values == [7.0] * 3


def test_an_expression_that_backtracks_is_ended_and_the_next_call_has_a_fresh_process(of: Any) -> None:
    (before,) = set(of("pid").values)
    begun = time.monotonic()
    found = of("backtracks", Samples(["q"], ["a" * 40 + "b"], [[1]]), 0.4)
    assert found.problem.startswith("no answer within 0.4 s for 1 samples")
    assert time.monotonic() - begun < 3
    assert gone(int(before))
    assert of("backtracks").values == [1.0, 0.0, 0.0]


def test_a_value_after_the_deadline_is_not_taken_by_this_call_nor_the_next(of: Any) -> None:
    assert "no answer within 0.2 s" in of("sleeps", timeout_s=0.2).problem
    assert of("counted").values == [1.0] * 3


def test_alarms_work_and_one_that_is_left_on_hits_nobody(of: Any) -> None:
    assert of("thread_name").values == [1.0] * 3
    for _ in range(2):
        assert of("alarmed").values == [1.0, -1.0, 1.0]
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exits", "it ended its process (exit code 3), in a call with 3 samples"),
        ("crashes", "its process was ended by SIGSEGV: a crash in compiled code"),
        ("kills", "its process was ended by SIGKILL: out of memory, or ended by somebody"),
        ("closes", "it closed its process's connection"),
        ("raises_what_cannot_be_pickled", "it raised Odd: odd one"),
        ("raises_without_a_text", "it raised Silent: its text can't be read"),
        ("raises_then_hangs", "it raised ValueError: down"),
    ],
)
def test_whatever_ends_a_call_is_told_and_the_next_one_works(of: Any, name: str, says: str) -> None:
    found = of(name, timeout_s=2 if name == "raises_then_hangs" else 20)
    assert found.problem.startswith(says)
    assert found.bad == (0, 1, 2)
    assert of("tensors").values == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("name", ["starts", "leaves_the_group"])
def test_what_a_function_started_ends_with_it(of: Any, tmp_path: Path, name: str) -> None:
    file = str(tmp_path / "pids")
    found = of(name, Samples(["q"], ["a"], [[1]], {"answer": [file]}), 1.5)
    assert "no answer" in found.problem
    pids = [int(pid) for pid in Path(file).read_text().split()]
    assert len(pids) == 3
    assert wait_for(lambda: all(gone(pid) for pid in pids))


def test_signals_that_ask_for_a_stop_end_no_call_but_processes_that_it_started(of: Any) -> None:
    assert of("hears").values == [1.0] * 3
    assert of("terminates_a_process_of_its_own").values == [-signal.SIGTERM] * 3


def test_standard_input_is_empty_and_where_a_function_goes_is_its_own_concern(
    of: Any, tmp_path: Path
) -> None:
    assert of("reads").values == [0.0] * 3
    assert of("moves").values == [0.0] * 3
    assert Path.cwd() == tmp_path
    assert "MOVED" not in os.environ


def test_what_functions_print_is_on_the_screen_and_acts_on_no_terminal(
    of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    of("prints_much")
    close_functions()  # which waits for the rest
    printed = capsys.readouterr()
    assert printed.out.count("y") == 3_000_000
    assert printed.out.startswith("imported\n")
    assert printed.err == "one \\x1b[2J line\n"


def test_lines_that_functions_print_are_written_whole(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    of("prints_pieces")
    close_functions()
    assert [text for text in written if text] == ["imported\n", "one line\n", "no end"]


def test_each_sample_of_each_call_has_arguments_of_its_own(of: Any) -> None:
    prompt, tag = [{"role": "user", "content": "q"}], {"a": 1}
    answers = [[{"role": "assistant", "content": "a"}] for _ in range(4)]
    samples = Samples([prompt] * 4, answers, [[1]] * 4, {"tags": [tag] * 4})
    for _ in range(2):
        assert of("changes", samples).values == [1.0] * 4
    assert (prompt, tag) == ([{"role": "user", "content": "q"}], {"a": 1})
    assert of("changes_and_raises", samples).problem == "it raised ValueError: [None]"


def test_a_module_that_ends_its_process_while_it_is_imported_is_told(
    of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.errors import UserError

    (tmp_path / "leaves_here.py").write_text("import os\nos._exit(5)\n")
    (tmp_path / "gives_up_here.py").write_text("import sys\nsys.exit('no key')\n")
    (tmp_path / "wrong_here.py").write_text("def f(:\n")
    for module, says in (
        ("leaves_here", "it ended its process (exit code 5)"),
        ("gives_up_here", "SystemExit: no key"),
        ("wrong_here", "SyntaxError"),
    ):
        with pytest.raises(UserError) as raised:
            find_function(f"{module}:f")
        assert f"'{module}:f' cannot be imported ({says}" in str(raised.value)


RUN = """
import os, sys, time
from pipeline.rewards.functions import Samples, call_reward_function, find_function
print(os.getpid(), flush=True)
function = find_function("functions_of_mine:leaves_the_group")
call_reward_function(function, Samples(["q"], ["a"], [[1]], {"answer": [sys.argv[1]]}), 600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_run_that_started_it(of: Any, tmp_path: Path, number: int) -> None:
    file = tmp_path / "pids"
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[3]}"}
    with subprocess.Popen([sys.executable, "-c", RUN, str(file)], stderr=subprocess.PIPE, env=env) as run:
        try:
            assert wait_for(lambda: file.exists() and len(file.read_text().split()) == 3)
            run.send_signal(number)
            run.communicate(timeout=10)
        finally:
            run.kill()
    assert run.returncode == -number
    pids = [int(pid) for pid in file.read_text().split()]
    assert wait_for(lambda: all(gone(pid) for pid in pids))


SCRIPT = """
import threading
from actors.errors import UserError
from pipeline.rewards.functions import Samples, call_reward_function, find_function
factor, lock = 3, threading.Lock()

def scaled(completions, **columns):
    return [factor * len(text) for text in completions]

def locked(completions, **columns):
    with lock:
        return scaled(completions)

print(call_reward_function(find_function("__main__:scaled"), Samples(["q"], ["ab"], [[1]]), 20).values)
try:
    find_function("__main__:locked")
except UserError as error:
    print(error)
"""


def test_a_function_of_a_script_is_carried_into_its_process_and_nothing_of_the_script_runs_twice(
    tmp_path: Path,
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[3]}"}
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    first, second = ran.stdout.splitlines()
    assert first == "[6.0]"
    assert second.startswith("locked can't be carried into a process of its own (TypeError: cannot pickle")
    assert ran.stderr == ""


def test_an_answer_that_was_ready_in_time_is_taken_though_this_process_stood_still(of: Any) -> None:
    of("pid")
    own = os.getpid()
    command = ["sh", "-c", f"sleep 0.2; kill -STOP {own}; sleep 3; kill -CONT {own}"]
    with subprocess.Popen(command):
        assert of("sleeps", timeout_s=2).values == [1.0] * 3


def test_processes_are_gone_when_the_run_is_over_once_their_modules_have_put_away_their_things(
    of: Any, tmp_path: Path
) -> None:
    file = tmp_path / "pids"
    of("leaves_a_server", Samples(["q"], ["a"], [[1]], {"answer": [str(file)]}))
    with functions_closed():
        close_functions()  # A check of another run, say.
        assert not any(gone(int(pid)) for pid in file.read_text().split())
        start_functions(["functions_of_mine:pid"])
    pids = [int(pid) for pid in file.read_text().split()[:2]]
    assert file.read_text().split()[2:] == ["put", "away"]
    assert all(wait_for(lambda pid=pid: gone(pid)) for pid in pids)


def test_the_process_loads_none_of_the_heavy_libraries_by_itself(repository: Path) -> None:
    heavy = "{'torch', 'ray', 'transformers', 'numpy', 'pydantic', 'rich', 'asyncio'}"
    script = f"import pipeline.rewards.child, sys; print({heavy} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True)
    assert ran.stdout.strip() == "set()"
