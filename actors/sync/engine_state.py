"""State machine of one rollout engine's weights: observations in, states out; no Ray, no threads, no clock.

    state        event          next state
    starting     loaded         fresh           it holds the base and has reached the trainer
    fresh        acknowledged   staged          the next version is in a buffer next to the weights
    serving      acknowledged   staged
    staged       discarded      fresh | serving what it was before
    staged       committed      committed       the version is loaded, nothing is proved
    committed    verified       serving
    any          failed         lost            its process died, or its weights can't be trusted
    lost         restarted      starting        generation + 1

Any other pair is a mistake of the caller. Two rules hold for every event:

- It names the generation of the engine that it was observed on. Of another generation than the present one it
  is stale and changes nothing.
- Only `restarted` leaves `lost`, and it counts the generation up. So of all that saw one death, the first to
  replace the engine does so; the others' events are stale.

Versions only grow, and an engine serves one once it was verified on this generation. Staging that fails
anywhere is discarded everywhere; a failure inside a commit loses the engine, because its weights are then
half of two versions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from actors.cluster.health import Member, ProcessState
from actors.sync.protocol import NO_VERSION


class WeightsState(StrEnum):
    """Knowledge about the weights of one engine."""

    STARTING = "starting"
    """Was just made, or is being made; holds nothing that counts."""
    FRESH = "fresh"
    """Holds what it was loaded with: before a sync the base, with which it serves nobody."""
    SERVING = "serving"
    """Holds a verified version."""
    STAGED = "staged"
    """Has the next version in a buffer next to the weights that it holds."""
    COMMITTED = "committed"
    """Loaded the next version; nothing is proved yet."""
    LOST = "lost"
    """Has to be replaced."""


class WeightsEvent(StrEnum):
    """Observation of one engine."""

    LOADED = "loaded"
    ACKNOWLEDGED = "acknowledged"
    DISCARDED = "discarded"
    COMMITTED = "committed"
    VERIFIED = "verified"
    FAILED = "failed"
    """Failed to commit, was not what it should be after it, or died."""
    RESTARTED = "restarted"


_NEXT: dict[tuple[WeightsState, WeightsEvent], WeightsState] = {
    (WeightsState.STARTING, WeightsEvent.LOADED): WeightsState.FRESH,
    (WeightsState.FRESH, WeightsEvent.ACKNOWLEDGED): WeightsState.STAGED,
    (WeightsState.SERVING, WeightsEvent.ACKNOWLEDGED): WeightsState.STAGED,
    (WeightsState.STAGED, WeightsEvent.COMMITTED): WeightsState.COMMITTED,
    (WeightsState.COMMITTED, WeightsEvent.VERIFIED): WeightsState.SERVING,
}
"""Every way forward; failing, discarding and restarting are in `Engine.after`."""


@dataclass(frozen=True)
class Engine:
    """The weights of one engine, and which engine that is."""

    state: WeightsState = WeightsState.FRESH
    version: int = NO_VERSION
    """The version that it serves, or goes on serving if what is staged is discarded."""
    generation: int = 0
    """Engines that were made in this place before it."""
    reason: str = ""
    """Why it is lost."""
    process: int = 0
    """Generation of the process that it lives in. An engine is also made anew in a living process."""

    @property
    def whole(self) -> bool:
        """It holds one version, or the base, and nothing is going on."""
        return self.state in (WeightsState.FRESH, WeightsState.SERVING)

    def after(
        self,
        event: WeightsEvent,
        version: int = NO_VERSION,
        reason: str = "",
        generation: int | None = None,
    ) -> Engine:
        """The engine once `event` was seen on its `generation` (None: the present one).

        Raises:
            ValueError: the event can't happen in this state.
        """
        if generation is not None and generation != self.generation:
            return self
        if event is WeightsEvent.FAILED:
            if self.state is WeightsState.LOST:
                return self
            return replace(self, state=WeightsState.LOST, version=NO_VERSION, reason=reason)
        if event is WeightsEvent.RESTARTED and self.state is WeightsState.LOST:
            return Engine(WeightsState.STARTING, generation=self.generation + 1, process=self.process)
        if event is WeightsEvent.DISCARDED and self.state is not WeightsState.COMMITTED:
            return replace(self, state=self._before_staging())
        state = _NEXT.get((self.state, event))
        if state is None:
            raise ValueError(f"a {self.state} engine can't be {event}")
        return replace(self, state=state, version=version if event is WeightsEvent.VERIFIED else self.version)

    def in_process(self, member: Member) -> Engine:
        """The engine, given what is known of its process: lost with it, or with one that took its place."""
        if member.generation != self.process:
            return self.after(WeightsEvent.FAILED, reason="its process was replaced")
        if member.state in (ProcessState.SUSPECT, ProcessState.DEAD):
            return self.after(WeightsEvent.FAILED, reason=member.reason)
        return self

    def _before_staging(self) -> WeightsState:
        if self.state is not WeightsState.STAGED:
            return self.state
        return WeightsState.FRESH if self.version == NO_VERSION else WeightsState.SERVING
