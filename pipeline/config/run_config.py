"""One run, as its YAML says it. Composes the specs that each room owns; defaults live there only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from actors.cluster import LimitsSpec, RaySpec, RoleSpec
from actors.models.spec import ModelSpec
from actors.spec import Spec
from pipeline.config.names import NAME_PATTERN
from pipeline.evaluation.spec import AUTO, EvalSpec
from pipeline.monitoring.spec import LoggingSpec
from pipeline.roles import RolesSpec
from pipeline.stages.specs.registry import STAGE_TYPES, NamedStage, OnlineStage, Stage


def _as_path(value: Any) -> Any:
    if isinstance(value, str) and ("\0" in value or not _encodes(value)):
        raise ValueError(f"{value!r} has a character that no path has")
    return Path(value).expanduser() if isinstance(value, str) and value else value


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class RunConfig(Spec):
    """A run: stages over one model, in order, with the roles they use."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the run, and of its directory; left out, it is that of the config's file."""
    output_dir: Annotated[Path, BeforeValidator(_as_path, json_schema_input_type=str)] = Field(
        default_factory=lambda given: Path("runs") / given.get("name", "")
    )
    """Run directory; by default runs/NAME. Relative to where the command is typed."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random: order, initialisation, dropout, sampling."""
    model: ModelSpec
    """Base, LoRA and mixture-of-experts settings."""
    stages: dict[str, Stage] = Field(min_length=1)
    """Stages by name, in the order in which they run."""
    roles: RolesSpec = Field(default_factory=RolesSpec)
    """Processes and resources per role."""
    eval: EvalSpec | None = None
    """Evaluation of base and stages; null: none."""
    logging: LoggingSpec = Field(default_factory=LoggingSpec)
    """Metrics and trackers."""
    limits: LimitsSpec = Field(default_factory=LimitsSpec)
    """Deadlines."""
    ray: RaySpec = Field(default_factory=RaySpec)
    """The cluster."""

    @model_validator(mode="before")
    @classmethod
    def _type_from_name(cls, data: Any) -> Any:
        """A stage named like a type is of that type."""
        stages = data.get("stages") if isinstance(data, dict) else None
        if not isinstance(stages, dict):
            return data
        typed = {
            name: {"type": name, **stage} if name in STAGE_TYPES and isinstance(stage, dict) else stage
            for name, stage in stages.items()
        }
        return {**data, "stages": typed}

    @model_validator(mode="after")
    def _settle(self) -> RunConfig:
        """Fill defaults that depend on other sections."""
        if self.model.lora is None and "reference" not in self.roles.model_fields_set:
            self.roles.reference = RoleSpec()
        rollout = self.roles.rollout
        if rollout.share is not None and "workers" not in rollout.model_fields_set:
            rollout.workers = self.roles.policy.workers
        return self

    def init_of(self, stage: str) -> str:
        """`base` or the stage whose result `stage` starts from."""
        names = list(self.stages)
        earlier = names[: names.index(stage)]
        policies = [name for name in earlier if self.stages[name].hands_on_policy]
        return self.stages[stage].init or (policies[-1] if policies else "base")

    def stage(self, name: str) -> NamedStage:
        """One stage, with what it has of the run."""
        return NamedStage(name, self.stages[name], self.seed_of(name), self.model.base)

    def online_stages(self) -> dict[str, OnlineStage]:
        """Stages that sample, by name."""
        return {name: stage for name, stage in self.stages.items() if stage.online}

    def reference_of(self, stage: str) -> str | None:
        """`base` or the stage that is the reference policy of a stage; None: it has none."""
        spec = self.stages[stage]
        return spec.compared_with or self.init_of(stage) if spec.has_reference else None

    def reward_models_of(self, stage: str) -> dict[str, str | None]:
        """Reward models that a stage asks: source -> its stage, or None for a directory."""
        sources = self.stages[stage].reward_models
        return {source: source if source in self.stages else None for source in sources}

    def judge_settings(self, model: str) -> ModelSpec:
        """Settings of a model that judges samples: the run's, but for what is the base's own."""
        return self.model.model_copy(update={"base": model, "quantization": None, "random_init": False})

    def critic_init_of(self, stage: str) -> str | None:
        """`base` or the stage whose adapter the critic of a stage starts from; None: it has no critic."""
        critic = self.stages[stage].critic
        return critic.critic_init or self.init_of(stage) if critic is not None else None

    def seed_of(self, stage: str) -> int:
        """Seed of one stage."""
        own = self.stages[stage].seed
        return self.seed if own is None else own

    def functions(self) -> dict[str, str]:
        """Functions of the user's that the run calls: `module:function` by the key that names it."""
        found = {
            f"stages.{name}.rewards.{position}": reward.function
            for name, stage in self.online_stages().items()
            for position, reward in enumerate(stage.rewards)
            if reward.function is not None
        }
        found |= self.environments()
        if self.eval is not None and ":" in self.eval.metric:
            found["eval.metric"] = self.eval.metric
        return found

    def environments(self) -> dict[str, str]:
        """Environments, agents and tools of the user's: `module:name` by the key that names it."""
        found: dict[str, str] = {}
        for name, stage in self.online_stages().items():
            found |= {f"stages.{name}.{key}": own for key in ("env", "agent") if (own := getattr(stage, key))}
            found |= {f"stages.{name}.tools.{i}": source for i, source in enumerate(stage.tools)}
        return found

    def eval_turns(self) -> tuple[str, OnlineStage] | None:
        """Stage whose environment or tools models converse with as they are evaluated, by name; None: an
        answer is one turn."""
        talking = {name: stage for name, stage in self.online_stages().items() if stage.converses}
        if self.eval is None or self.eval.env_of is None or not talking:
            return None
        name = list(talking)[-1] if self.eval.env_of == AUTO else self.eval.env_of
        return (name, talking[name]) if name in talking else None

    def eval_models(self) -> list[str]:
        """`base` and stages to evaluate, in order."""
        if self.eval is None:
            return []
        return self.eval.models or [
            "base",
            *(name for name, stage in self.stages.items() if stage.hands_on_policy),
        ]
