"""Probes of a stage's weight syncs: token sequences that engine and trainer both score."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle, islice

from actors.sync.spec import SyncSpec


def probes_of(prompts: Sequence[Sequence[int]], wanted: SyncSpec, max_new_tokens: int) -> list[list[int]]:
    """Up to `wanted.probes` sequences of 2 to `wanted.probe_tokens` + 1 tokens: the beginnings of prompts.

    A probe's first token has nothing before it to be predicted from, so a prompt of one token is none. Where
    all prompts are that short, their tokens one after the other are the probes: digests of the weights are
    the proof, and scores of any tokens show what comes after the weights.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: of a sample; with its prompt these are what an engine has room for.
    """
    usable = islice((ids for ids in prompts if len(ids) > 1), wanted.probes)
    if found := [list(ids[: wanted.probe_tokens + 1]) for ids in usable]:
        return found
    tokens = list(dict.fromkeys(chain.from_iterable(prompts)))
    length = 1 + min(wanted.probe_tokens, max_new_tokens)
    starts = range(min(wanted.probes, len(tokens)))
    return [list(islice(cycle(tokens), start, start + length)) for start in starts]
