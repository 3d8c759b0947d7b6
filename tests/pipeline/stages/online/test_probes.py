"""Which token sequences a sync's engines are asked about."""

from __future__ import annotations

from actors.sync.spec import SyncSpec
from pipeline.stages.online.probes import probes_of

WANTED = SyncSpec(probes=2, probe_tokens=3)


def test_probes_are_the_beginnings_of_the_first_prompts_that_have_two_tokens() -> None:
    prompts = [[1], [2, 3], [4, 5, 6, 7, 8], [9, 9]]
    assert probes_of(prompts, WANTED, 10) == [[2, 3], [4, 5, 6, 7]]


def test_prompts_of_one_token_are_put_together() -> None:
    assert probes_of([[1], [2], [1], [3]], WANTED, 10) == [[1, 2, 3, 1], [2, 3, 1, 2]]
    assert probes_of([[1], [2]], WANTED, 1) == [[1, 2], [2, 1]]


def test_a_single_token_that_begins_every_text_is_a_probe_too() -> None:
    """Unconditional generation from a base: every prompt is the beginning-of-text token."""
    assert probes_of([[5]] * 4, WANTED, 10) == [[5, 5, 5, 5]]
