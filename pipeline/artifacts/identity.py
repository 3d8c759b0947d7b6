"""Identities of stages, and the decision from them which stages have to run; nothing is started here.

A stage's fingerprint covers its own settings, the model's, its data, the code of its reward functions and
its inputs' fingerprints, so a change early in the graph changes every later stage. Settings that don't change
the result (deadlines, resources, logging, checkpoint intervals) are left out.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from actors.errors import UserError
from actors.models.spec import EXPERT_IMPL
from pipeline.artifacts.manifest import MANIFEST, Manifest, fingerprint, read_manifest, recover, verify

NOT_IN_IDENTITY = frozenset(
    {"save_steps", "save_minutes", "save_total_limit", "eval_steps", "eval_data", "keep_warm"}
    | {"max_tokens_per_micro_batch", "sync", "mismatch_tolerance"}
)
"""Stage keys that change when or how often something is done, but not the weights that come out."""
NOT_IN_REWARD = frozenset({"request_timeout_s", "retries", "max_in_flight", "api_key_env", "api_key_header"})
"""Keys of an entry of `rewards:` that change how a service is asked, and not what it answers."""
NEW_NAMES = {EXPERT_IMPL.key: EXPERT_IMPL}
"""Keys of an identity some of whose values earlier versions called otherwise: it is the same work."""
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
LENGTH = frozenset({"stage.max_steps", "stage.num_train_epochs"})
"""Keys that say how many steps a stage has."""
CODE = "code"
"""Part of an identity's config: source of a reward function -> digest of its code. A manifest without an
entry doesn't know what the code was: that is no change."""


@dataclass(frozen=True)
class Length:
    """Number of a stage's steps, and what depends on it."""

    steps: int
    needed_by: str = ""
    """The setting by which each step depends on the number of all; empty: none, so that a longer stage goes
    on from where a shorter one ended."""


@dataclass(frozen=True)
class Identity:
    """Everything that a stage's result depends on."""

    config: dict[str, Any]
    """Its settings and the model's, flat enough for a difference to be named."""
    inputs: dict[str, str]
    """Name -> fingerprint of each artifact that it reads."""
    data: str
    """Fingerprint of the tokenised data."""
    seed: int
    chosen: frozenset[str] = frozenset()
    """Dotted keys of `config` whose values are not their defaults."""
    earlier_inputs: dict[str, str] = field(default_factory=dict)
    """Fingerprints that earlier versions gave to the same inputs, where these differ."""
    length: Length | None = None
    """None: a stage of another length is another one."""

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.config, self.inputs, self.data, self.seed])

    def as_of(self, manifest: Manifest) -> Identity:
        """This identity in the keys and values of an earlier version's manifest, where the work is the same.

        The manifest may lack keys that are newer: these have to be at their defaults, which do what was done
        without them. It may have values under old names (`NEW_NAMES`), or the fingerprint that an input had
        then (`earlier_inputs`). Where anything else differs, the work is another: then this identity as it
        stands.
        """
        old = flat(manifest.config)
        inputs = {name: manifest.inputs.get(name, value) for name, value in self.inputs.items()}
        written_otherwise = bool(flat(self.config).keys() - old.keys()) or old != _renamed(old)
        same = (written_otherwise or inputs != self.inputs) and not self.differences(manifest)
        return replace(self, config=manifest.config, inputs=inputs) if same else self

    def differences(self, manifest: Manifest) -> list[str]:
        """Keys in which a manifest's work differs from this one."""
        old, new = _renamed(flat(manifest.config)), flat(self.config)
        changed = [
            _in_words(key)
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and (key in old or key in self.chosen)
        ]
        changed += [
            f"input {name}"
            for name, value in self.inputs.items()
            if manifest.inputs.get(name) not in (value, self.earlier_inputs.get(name, value))
        ]
        if manifest.data.get("fingerprint") != self.data:
            changed.append("data")
        if manifest.seed != self.seed:
            changed.append("seed")
        return changed

    def prolongs(self, manifest: Manifest) -> bool:
        """True where a manifest's work is the first steps of this one's."""
        length = self.length
        if length is None or length.needed_by or length.steps <= (manifest.step or 0):
            return False
        return 0 < len(changed := self.differences(manifest)) == len(LENGTH.intersection(changed))

    def changed(self, manifest: Manifest) -> Decision:
        """The decision to run again, with the reason."""
        changed = self.differences(manifest) or ["the format of manifests"]
        why = ""
        if LENGTH.issuperset(changed) and self.length is not None and self.length.needed_by:
            why = f"the learning rate of every step depends on it by {self.length.needed_by}"
        return Decision("changed", changed, why=why)


@dataclass(frozen=True)
class Decision:
    """State of a stage on disk, which says what to do with it, and the reasons."""

    state: Literal["fresh", "partial", "changed", "new"]
    changed: list[str] = field(default_factory=list)
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    identity: Identity | None = None
    """The wanted identity, in the keys and values of the manifest that was found."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Checkpoints that can't be gone on from, newest first -> what is wrong with their files."""
    why: str = ""
    """Reason for which what changed matters, where it is not plain."""

    @property
    def says(self) -> str:
        """One line for the user."""
        if self.state == "fresh":
            return "already done, skipped"
        damaged = f"{' and '.join(self.damaged)} {'are' if len(self.damaged) > 1 else 'is'} damaged"
        if self.state == "partial":
            line = f"continues from {self.checkpoint.name if self.checkpoint else 'its checkpoint'}"
            return f"{line}, since {damaged}" if self.damaged else line
        if self.damaged:
            return f"runs again from its start: {damaged}, and no other checkpoint is there"
        if self.state == "changed":
            return "runs again: changed " + ", ".join(self.changed) + (f" ({self.why})" if self.why else "")
        return "new"


def identity_config(stage: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The keys of a stage and of the model that its result depends on."""
    kept = {key: value for key, value in stage.items() if key not in NOT_IN_IDENTITY | {"data", "seed"}}
    if "rewards" in kept:
        kept["rewards"] = [
            {key: value for key, value in one.items() if key not in NOT_IN_REWARD} for one in kept["rewards"]
        ]
    # The way in which weights are synced doesn't matter, but that samples go on with new ones does, and that
    # LoRA is computed beside them: its sums are rounded otherwise than merged weights.
    sync = stage.get("sync") or {}
    if sync.get("in_flight") == "keep":
        kept["in_flight"] = "keep"
    if sync.get("payload") == "lora":
        kept["payload"] = "lora"
    return {"stage": kept, "model": model}


def decide(directory: Path, identity: Identity) -> Decision:
    """Compare the wanted identity with what is on disk: fresh, partial, changed or new.

    Raises:
        UserError: the manifest of a finished stage cannot be read.
    """
    recover(directory / "adapter")
    recover(directory / "model")
    manifest = read_manifest(directory)
    if manifest is None:
        return _by_checkpoints(directory, identity)
    known = identity.as_of(manifest)
    if manifest.fingerprint != known.fingerprint:
        changed = identity.changed(manifest)
        if not identity.prolongs(manifest):
            return changed
        longer = _by_checkpoints(directory, identity)
        if longer.state == "partial":
            return longer
        return replace(changed, why="no checkpoint to go on from", damaged=longer.damaged)
    if verify(directory, manifest):
        return Decision("changed", ["files of the finished stage are missing or damaged"])
    return Decision("fresh", manifest=manifest, identity=known)


def _by_checkpoints(directory: Path, identity: Identity) -> Decision:
    """The decision for a stage that is not finished: it goes on from its newest sound checkpoint."""
    damaged: dict[str, str] = {}
    for checkpoint in checkpoints(directory):
        try:
            saved = read_manifest(checkpoint)
        except UserError:
            damaged[checkpoint.name] = f"{checkpoint / MANIFEST} cannot be read"
            continue
        if saved is None:
            continue
        known = identity.as_of(saved)
        if saved.fingerprint != known.fingerprint and not identity.prolongs(saved):
            return identity.changed(saved)
        if problems := verify(checkpoint, saved):
            damaged[checkpoint.name] = ", ".join(problems)
            continue
        return Decision("partial", checkpoint=checkpoint, manifest=saved, identity=known, damaged=damaged)
    return Decision("changed", damaged=damaged) if damaged else Decision("new")


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints of a stage, newest first. One without a manifest is incomplete; a directory of
    another name, such as a copy of one that a user made, is none."""
    found = {p: CHECKPOINT.fullmatch(p.name) for p in directory.glob("checkpoint-*")}
    steps = {p: int(match[1]) for p, match in found.items() if match and (p / MANIFEST).is_file()}
    return sorted(steps, key=lambda p: -steps[p])


def set_aside_newer(checkpoint: Path) -> None:
    """Rename checkpoints that are newer than the one gone on from to `checkpoint-N.damaged`, where nothing
    reads them: else they would count as the newest, and the sound ones would be removed before them."""
    newer = checkpoints(checkpoint.parent)
    for path in newer[: newer.index(checkpoint)]:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def _in_words(key: str) -> str:
    """A key of an identity's config as a message names it."""
    return f"code of {key.removeprefix(f'{CODE}.')}" if key.startswith(f"{CODE}.") else key


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """Flat settings with values under their present names."""
    return {k: NEW_NAMES[k].current(v) if k in NEW_NAMES else v for k, v in settings.items()}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested settings; list elements by number, if they have keys of their own."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}".strip(".")).items()}
