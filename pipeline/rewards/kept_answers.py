"""Answers of services, kept in a file of the stage by what was asked.

A service need not answer the same question alike twice. What it said once is what a stage goes on with, also
after it was killed, so that the steps since its last checkpoint have the rewards that they had before.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "answers.jsonl"
"""Name of the file in a stage's directory: a line with `key` and `reward` for each."""


def content_key(content: Any) -> str:
    """Key of what was asked: sha256 of its JSON.

    Raises:
        ValueError, TypeError: JSON can't hold it.
    """
    text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class KeptAnswers:
    """The answers of one stage; several threads may ask for them."""

    def __init__(self, path: Path | None) -> None:
        """`path`: of the file, which is read when the first answer is looked for; None: nothing is kept."""
        self._path = path
        self._lock = threading.Lock()
        self._found: dict[str, float | None] | None = None

    def known(self, keys: set[str]) -> dict[str, float | None]:
        """The answers that there are to these."""
        with self._lock:
            found = self._read()
            return {key: found[key] for key in keys if key in found}

    def keep(self, answers: Mapping[str, float | None]) -> dict[str, float | None]:
        """Write answers, which are on the disk when this returns; those that count. Of two answers to one
        question, asked at the same time for two steps, the first one does."""
        if self._path is None or not answers:
            return dict(answers)
        with self._lock:
            found = self._read()
            new = {key: value for key, value in answers.items() if key not in found}
            found.update(new)
            lines = [json.dumps({"key": key, "reward": value}) + "\n" for key, value in new.items()]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            return {key: found[key] for key in answers}

    def _read(self) -> dict[str, float | None]:
        if self._found is None:
            self._found = {}
            if self._path is not None and self._path.exists():
                whole = self._path.read_bytes()
                end = whole.rfind(b"\n") + 1
                if end < len(whole):  # a line that was being written when the run was killed
                    os.truncate(self._path, end)
                for line in whole[:end].splitlines():
                    row = json.loads(line)
                    self._found[row["key"]] = row["reward"]
        return self._found
