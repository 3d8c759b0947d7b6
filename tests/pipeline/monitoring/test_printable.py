"""Escape codes in data, samples, notes and job output never reach the terminal."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from actors.errors import RunFailure, UserError
from pipeline.cli.app import main
from pipeline.monitoring import console
from pipeline.monitoring.printable import (
    PrintableConsole,
    PrintableOutput,
    printable,
    printable_log,
    printable_stdout,
)
from pipeline.monitoring.progress import Progress

EVIL = "a\x1b[2Jb\x1b]52;c;cm0=\x07c\x9b31md\u202ee\x00f\bg\x7fh\ud800i"
"""Clears the screen, fills the clipboard, colours by an 8-bit code, turns the text, and half a pair."""
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]")


def terminal() -> tuple[PrintableConsole, io.StringIO]:
    """A console that takes its file for a terminal with colours."""
    file = io.StringIO()
    return PrintableConsole(file=file, force_terminal=True, color_system="standard", width=200), file


def own_codes(text: str) -> str:
    """Text without the codes that rich writes for a style."""
    return re.sub("\x1b\\[[0-9;]*m", "", text)


def test_acting_characters_are_shown_and_all_others_kept() -> None:
    assert printable("tab\tline\nünïcode 漢字 \U0001f600") == "tab\tline\nünïcode 漢字 \U0001f600"
    assert printable("a\x1b[2J\x9b\r\u202e\ud800") == r"a\x1b[2J\x9b\x0d\u202e\ud800"
    assert not any(ACTING.search(printable(chr(code))) for code in range(0x11000))


def test_output_of_a_job_is_plain_lines() -> None:
    assert printable_log("\x1b[36m(pid=1)\x1b[0m 5 %\r10 %\r\nend\x1b[2J") == "(pid=1) 5 %\n10 %\nend\\x1b[2J"


def test_a_console_has_its_own_colours_and_none_of_the_texts() -> None:
    shown, file = terminal()
    shown.print(EVIL, style="bold")
    shown.print(f"[red]{EVIL}[/]")
    text = file.getvalue()
    assert "\x1b[1m" in text
    assert "\x1b[31m" in text
    assert not ACTING.search(own_codes(text))


@pytest.mark.parametrize("live", [False, True])
def test_notes_and_tables_of_a_run_are_printable(live: bool) -> None:
    shown, file = terminal()
    if not live:
        file = io.StringIO()
        shown = PrintableConsole(file=file, width=200)
    with Progress(shown) as progress:
        progress.note(EVIL)
        progress.table(EVIL, ["a"], [[EVIL]])
        progress.stage("sft", total=2)
        progress.note(EVIL)
    cursor = re.sub("\x1b\\[[0-9;?]*[A-Za-z]|\r", "", file.getvalue())
    assert not ACTING.search(cursor)
    assert "52;c;cm0=" in cursor
    assert "\x1b]" not in file.getvalue()
    assert "\x1b[2J" not in file.getvalue()


@pytest.mark.parametrize("live", [True, False])
def test_what_is_being_done_is_printable(live: bool) -> None:
    file = io.StringIO()
    console = PrintableConsole(file=file, force_terminal=live, color_system=None, width=200)
    with Progress(console) as progress:
        progress.phase(f"reading {EVIL}")
        progress.count(f"of {EVIL}")
        console.print(progress._render())
    acting = ACTING.findall(re.sub("\x1b\\[[0-9;?]*[A-Za-z]|\r", "", file.getvalue()))
    assert acting == []
    assert "\x1b[2J" not in file.getvalue()
    assert "\x1b]52" not in file.getvalue()
    assert r"reading a\x1b[2Jb" in file.getvalue()


def test_messages_of_commands_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(EVIL)
    console.table(EVIL, ["a"], [[EVIL]])
    console.user_error(UserError([EVIL, f"key: {EVIL}"]), EVIL)
    console.run_failure(RunFailure("rank 0", "update", EVIL))
    captured = capsys.readouterr()
    assert not ACTING.search(captured.out + captured.err)


def test_rows_with_escape_codes_are_shown_by_inspect_without_acting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil[link].jsonl"
    content = EVIL.replace("\ud800", "")
    path.write_text(json.dumps({"prompt": content, "completion": content, "other": content}) + "\n")
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert not ACTING.search(said)
    assert r"\x1b[2J" in said
    assert "evil[link].jsonl" in said


def test_what_is_written_past_the_console_is_printable_too(capsys: pytest.CaptureFixture[str]) -> None:
    with printable_stdout():
        assert sys.stdout.write(EVIL) == len(EVIL)
        console.say("and a line")
        sys.stdout.flush()
    assert isinstance(sys.stdout, io.TextIOBase)
    said = capsys.readouterr().out
    assert not ACTING.search(said)
    assert "and a line" in said
    assert PrintableOutput(sys.__stdout__).encoding == sys.__stdout__.encoding  # type: ignore[arg-type, union-attr]


def test_every_console_of_the_commands_is_a_printable_one(repository: Path) -> None:
    assert isinstance(console.out, PrintableConsole)
    assert isinstance(console.err, PrintableConsole)
    assert isinstance(Progress().console, PrintableConsole)
    rooms = ("cli", "monitoring", "execution", "jobs", "planning", "report")
    for path in (path for room in rooms for path in (repository / "pipeline" / room).rglob("*.py")):
        assert not re.search(r"(?<!Printable)\bConsole\(stderr|\bConsole\(\)", path.read_text()), path
    assert issubclass(PrintableConsole, Console)
