"""Settings of online stages whose samples are conversations of several turns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from actors.spec import Spec

PLACE = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
Place = Annotated[str, StringConstraints(pattern=PLACE)]
"""`module:name` of something of the user's."""


class TurnSettings(Spec):
    """An environment, an agent or tools, and the limits of a conversation with them."""

    env: Place | None = None
    """Environment that answers the policy's turns, as `module:Class`; null: a sample is one turn, or `tools`
    answer."""
    agent: Place | None = None
    """Function (`module:function`) that drives a conversation by itself, through an OpenAI-compatible
    endpoint of its own; in place of `env` and `tools`."""
    tools: list[Place] = Field(default_factory=list)
    """Functions (`module:function`) that the policy may call, by TRL's rules: type hints and a docstring in
    Google's style, from which the template writes what there is to call."""
    tool_parser: str | None = Field(default=None, min_length=1)
    """vLLM's parser that finds calls of tools in a turn, by vLLM's name (`hermes`, `llama3_json`); null: a
    turn is text."""
    max_tool_calling_iterations: int | None = Field(default=None, ge=1)
    """Answers of the environment or of tools in a sample, at most, so that it has one turn more; null: as
    many as `max_completion_length` leaves room for, which counts what they say too."""
    env_timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds that one reset or step of an environment, or the tools of one turn, may take."""
    env_on_error: Literal["stop"] | float = "stop"
    """Effect of a step that fails or takes too long: `stop` ends the run; a number is the reward of that
    step, with which the sample ends."""

    @field_validator("env", mode="before")
    @classmethod
    def _no_library(cls, value: Any) -> Any:
        if value in ("openenv", "verifiers"):
            raise ValueError(
                f"environments of {value} are not run by themselves: write a class with `reset` and `step` "
                "around its client, and name it as module:Class"
            )
        return value

    @property
    def converses(self) -> bool:
        """A sample may have several turns."""
        return bool(self.env or self.tools or self.agent)

    @property
    def env_key(self) -> str:
        """Key that names who converses."""
        return "agent" if self.agent else "env" if self.env else "tools"

    @property
    def room(self) -> int | None:
        """Tokens of a prompt at most; None: no stage says so."""
        return None

    @property
    def env_name(self) -> str:
        """Name in metrics: the class's, as TRL has it, or the agent's function's, or `tools`."""
        own = self.agent or self.env
        return own.partition(":")[2] if own else "tools"

    @property
    def user_code(self) -> list[str]:
        """All that is the user's of these, as `module:name`."""
        return [*filter(None, [self.agent, self.env]), *self.tools]
