"""Tokens that end a turn: where samples stop, where scored answers are read, in a merged model's config.

The end-of-turn token that the chat template writes need not be the end-of-text token (EOS) of the base.
Qwen's base models have a ChatML template, whose turns end with `<|im_end|>`, and `<|endoftext|>` as EOS; in
Gemma and Phi-3.5 the two differ as well. SFT teaches what the template writes, so an engine that knows the
EOS alone never stops. Here both are found, once, for all who need them.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import UserError
from actors.models.base.resolving import follow_adapter
from actors.models.template_bounds.bounded import bounded

if TYPE_CHECKING:
    from actors.batches.generations import SamplingSpec

PROBE_ANSWER = "Raylign probe answer"
PROBE = ({"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE_ANSWER})
"""A conversation that is rendered to see what the template writes after an answer."""


@dataclass(frozen=True)
class TurnEnds:
    """Tokens that end a turn, by where they come from."""

    turn: tuple[int, ...] = ()
    """The first special token that the chat template writes after an answer; of each of its templates."""
    eos: tuple[int, ...] = ()
    """End-of-text tokens of the tokenizer, then of the base's generation_config.json (config.json where it
    has none). vLLM and transformers stop there by themselves."""
    texts: tuple[str, ...] = ()
    """Text that the template writes after an answer, where that holds no special token."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them, the template's first."""
        return tuple(dict.fromkeys((*self.turn, *self.eos)))

    @property
    def added(self) -> tuple[int | str, ...]:
        """Tokens and texts that an engine does not know by itself."""
        return (*(token for token in self.turn if token not in self.eos), *self.texts)

    def sampling(self, asked: SamplingSpec, tokenizer: Any, where: str) -> SamplingSpec:
        """`asked`, with everything that ends a turn; `where` is the section of the config that it is from.

        A stop string that is a special token travels as its id: engines look for strings in text that has no
        special tokens.

        Raises:
            UserError: a stop string or token that no sample can end with.
        """
        special = special_tokens(tokenizer)
        problems = [
            f"{where}.stop: {text!r} holds the special token {found!r} and other text, and what is "
            f"searched has no special tokens; write the token alone: {found!r}"
            for text in asked.stop
            if text not in special and (found := next((t for t in special if t in text), None)) is not None
        ]
        problems += [
            f"{where}.stop_token_ids: {token} is no token of the base (0 to {len(tokenizer) - 1})"
            for token in asked.stop_token_ids
            if not 0 <= token < len(tokenizer)
        ]
        if problems:
            raise UserError(problems)
        ids = [*asked.stop_token_ids, *(special[text] for text in asked.stop if text in special), *self.ids]
        texts = [*(text for text in asked.stop if text not in special), *self.texts]
        return asked.model_copy(
            update={"stop": list(dict.fromkeys(texts)), "stop_token_ids": list(dict.fromkeys(ids))}
        )

    def describe(self, tokenizer: Any) -> str:
        """For example `a turn ends at <|im_end|> (258, the chat template) or <|endoftext|> (256, EOS)`."""
        named = [(token, "the chat template") for token in self.turn]
        named += [(token, "EOS") for token in self.eos if token not in self.turn]
        parts = [f"{tokenizer.convert_ids_to_tokens(token)} ({token}, {source})" for token, source in named]
        parts += [f"the text {text!r} (the chat template)" for text in self.texts]
        return f"a turn ends at {' or '.join(parts)}" if parts else "nothing ends a turn"


def turn_ends(tokenizer: Any, base: str | Path | None = None) -> TurnEnds:
    """Tokens that end a turn by this tokenizer's template and by `base`, as a config names it (None: by the
    tokenizer alone)."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    given = [] if base is None else _eos_of(base)
    written = [_first_special(tokenizer, text) for text in after_answers(tokenizer) if text]
    turn = [found for found in written if isinstance(found, int)]
    # A token without a row in the embedding is never sampled, and vLLM refuses it as a stop token.
    rows = (None if base is None else vocab_size(base)) or len(tokenizer)
    turn, eos = ([token for token in dict.fromkeys(ids) if token < rows] for ids in (turn, [*own, *given]))
    return TurnEnds(tuple(turn), tuple(eos), tuple(found for found in written if isinstance(found, str)))


def write_turn_ends(directory: str | Path) -> None:
    """Write every token that ends a turn into the generation_config.json of a model's directory, as EOS.

    A server of the model then stops there by itself. A file that has them already is left alone.
    """
    from actors.models.base.loading import load_tokenizer
    from actors.models.spec import ModelSpec

    directory = Path(directory)
    try:
        tokenizer = load_tokenizer(ModelSpec(base=str(directory)))
    except UserError:  # A model without a tokenizer has no template either.
        return
    ends = turn_ends(tokenizer, directory)
    if set(ends.turn) <= set(_eos_of(directory)):
        return
    file = directory / "generation_config.json"
    held = _held(directory, file.name)
    # transformers and vLLM take what this says in place of config.json's.
    ids = list(dict.fromkeys([*ends.turn, *_eos_of(directory)]))
    held["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    file.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n")


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that decoding leaves out, by their text."""
    flagged = {str(t): i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)) | flagged


def after_answers(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer's chat templates write after an answer, up to the last visible character; none
    of a template that doesn't take a plain question and answer."""
    templates = tokenizer.chat_template
    if not templates:
        return []
    each = list(templates.values()) if isinstance(templates, dict) else [templates]
    found = [_after_answer(tokenizer, template) for template in each]
    for i, template in enumerate(each):
        if found[i] == "" and (other := training_template(tokenizer, template)) is not None:
            # GLM-4.5 ends an answer with the head of the next turn, which only TRL's template writes there.
            found[i] = _after_answer(tokenizer, other)
    return [text for text in found if text is not None]


def after_probe(text: str) -> str | None:
    """Text behind the probe's answer in a rendered conversation; None where that answer isn't in it."""
    place = text.rfind(PROBE_ANSWER)
    return None if place < 0 else text[place + len(PROBE_ANSWER) :].rstrip()


def training_template(tokenizer: Any, template: str) -> str | None:
    """TRL's template with `{% generation %}` marks in place of this one, which is one of the tokenizer's;
    None when TRL has none."""
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    try:
        with bounded(tokenizer):
            return get_training_chat_template(tokenizer)
    except UserError:
        raise
    except Exception:  # it probes the template with tool calls, which many templates refuse
        return None


def _after_answer(tokenizer: Any, template: str) -> str | None:
    try:
        with bounded(tokenizer):
            text = tokenizer.apply_chat_template(list(PROBE), chat_template=template, tokenize=False)
    except UserError:
        raise
    except Exception:  # a template may raise anything: its code belongs to the base
        return None
    return after_probe(text)


def _first_special(tokenizer: Any, text: str) -> int | str:
    """The first special token of `text`, which a sample ends with. `text` itself where it holds none. Phi-3
    writes `<|end|>`, a line break and `<|endoftext|>`."""
    special = set(special_tokens(tokenizer).values())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((int(token) for token in ids if token in special), text)


def vocab_size(base: str | Path) -> int | None:
    """Rows of the embedding of a base, by its config."""
    held = _held(base, "config.json")
    found = held.get("vocab_size", held.get("text_config", {}).get("vocab_size"))
    return None if found is None else int(found)


def _eos_of(base: str | Path) -> list[int]:
    """EOS ids that a base names, from the one file that generation in transformers and vLLM reads."""
    for name in ("generation_config.json", "config.json"):
        held = _held(base, name)
        value = held.get("eos_token_id", held.get("text_config", {}).get("eos_token_id"))
        if value is not None:
            return [int(token) for token in (value if isinstance(value, list) else [value])]
    return []


def _held(base: str | Path, name: str) -> dict[str, Any]:
    """Content of a JSON file of a base; empty where it can't be read, which others tell the user."""
    place = follow_adapter(str(base))[0]
    try:
        file = Path(place) / name if Path(place).is_dir() else _from_hub(place, name)
        held = json.loads(file.read_text())
    except (OSError, ValueError, TypeError):
        return {}
    return held if isinstance(held, dict) else {}


@lru_cache  # each call asks the hub whether the file has changed
def _from_hub(place: str, name: str) -> Path:
    from transformers.utils import cached_file

    return Path(cached_file(place, name))
