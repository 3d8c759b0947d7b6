"""Fixes the date that chat templates see, so that a run of several days renders one text.

Some templates write the date into the conversation (gpt-oss's, Granite's and Llama 3.2's, by transformers'
`strftime_now`). With the clock's date a stage's rows would differ from day to day: finished stages would run
again, and checkpoints would not be resumed from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.artifacts.manifest import read_manifest, write_json

FILE = "template_date.json"
_FIXED = "raylign_template_date"
"""Attribute of a tokenizer that holds the date, so that it goes wherever the template goes."""


def writes_date(tokenizer: Any) -> bool:
    """True where a chat template of this tokenizer asks for the date."""
    templates = tokenizer.chat_template or ""
    each = templates.values() if isinstance(templates, dict) else [templates]
    return any("strftime_now" in template for template in each)


def fix_date(tokenizer: Any, date: datetime) -> None:
    """Let the tokenizer's templates see this date, whatever the clock says."""
    setattr(tokenizer, _FIXED, date)


def strftime_of(tokenizer: Any) -> Callable[[str], str]:
    """The function that templates call as `strftime_now`: of the fixed date, else of the present."""
    date = getattr(tokenizer, _FIXED, None) or datetime.now()
    return date.strftime


def date_of_run(directory: Path) -> datetime | None:
    """The date that a run has kept; for a run made before dates were kept, that of its first finished stage.

    None: there is no such run.
    """
    try:
        return datetime.fromisoformat(json.loads((directory / FILE).read_text())["date"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = [read_manifest(path.parent) for path in directory.glob("*/manifest.json")]
    created = sorted(manifest.created for manifest in found if manifest is not None and manifest.created)
    return datetime.fromisoformat(created[0].replace("Z", "+00:00")).astimezone() if created else None


def keep_date(tokenizer: Any, directory: Path, write: bool = True) -> datetime | None:
    """Give the tokenizer the run's date, and keep it in the run directory (with `write`); the date, or None
    where no template asks for one."""
    if not writes_date(tokenizer):
        return None
    date = date_of_run(directory) or datetime.now().replace(microsecond=0)
    fix_date(tokenizer, date)
    if write and not (directory / FILE).is_file():
        write_json(directory / FILE, {"date": date.isoformat()})
    return date


def date_notice(date: datetime) -> str:
    """One line about it for the user."""
    return f"the chat template writes the date: all of this run sees {date:%Y-%m-%d %H:%M:%S}"
