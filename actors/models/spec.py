"""Settings of a model worker: base, LoRA and mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from actors.spec import NewNames, Spec

EMBEDDED_BASE = "builtin:tiny-moe"
"""Value of `model.base`: the tiny trained mixture of experts that comes with Raylign."""

CHECKOUT_BASE = Path("assets/tiny-moe")
"""Place of the embedded base in a checkout; configs and results of earlier versions name it so."""

TargetGroup = Literal["attention", "experts", "shared_experts", "router", "mlp"]

Quantization = Literal["nf4", "int8"]
"""Codecs of `actors.models.quantization`."""

EXPERT_IMPL = NewNames("model.lora.expert_impl", {"beside": "unmerged"})
"""Values of `expert_impl` that earlier versions called otherwise."""


class LoraSpec(Spec):
    """LoRA, under PEFT's field names."""

    r: int = Field(default=16, ge=1)
    """Rank of the low-rank update."""
    lora_alpha: float = Field(default=32, gt=0)
    """Numerator of the scaling alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before A. Must be 0 when `experts` is a target: PEFT cannot apply it to parameters."""
    targets: list[TargetGroup] = Field(default=["attention", "experts"], min_length=1)
    """Groups of modules that get an adapter; resolved per architecture to explicit names."""
    expert_rank: Literal["r", "r/top_k"] = "r"
    """Rank of each expert's adapter: the full `r`, or `r` divided by the experts per token."""
    expert_impl: Annotated[Literal["auto", "unmerged", "peft"], BeforeValidator(EXPERT_IMPL)] = "auto"
    """Computation of expert LoRA: `unmerged`, as low-rank products x A^T B^T added to the grouped product,
    or PEFT's merged W + BA."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""


class MoeSpec(Spec):
    """Mixture-of-experts settings."""

    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of the load-balancing loss. None: the base's own value where the router trains, else 0."""
    experts_implementation: Literal["grouped_mm", "batched_mm", "eager"] = "grouped_mm"
    """transformers' implementation of the expert product."""
    router_replay: Literal["none", "rollout"] = "none"
    """Online stages: `rollout` lets the policy compute samples with the experts that the engine chose for
    them (rollout routing replay); the gates are its own."""
    router_replay_compare_steps: int = Field(default=10, ge=0)
    """With router replay: every so many steps also compute the mismatch without it, for one more pass of log-
    probabilities; 0: never."""


class ModelSpec(Spec):
    """The model that every role starts from."""

    base: str = Field(min_length=1)
    """Hub id or directory of the base model, or of a PEFT adapter (its base is then read from it);
    builtin:tiny-moe is the embedded base."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen base."""
    quantization: Quantization | None = None
    """Hold linear layers and experts of the frozen base in 4 bits (QLoRA's NF4, double quantised) or 8 bits;
    they are computed with in `dtype`."""
    trust_remote_code: bool = False
    """Allow the base's own Python code. Off: code from a hub is not run."""
    allow_untested: bool = False
    """Try an architecture that the table lacks, after a probe that compares the engine with the trainer."""
    random_init: bool = False
    """Take only config and tokenizer from `base` and initialise the weights at random, from the seed."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    lora: LoraSpec | None = Field(default_factory=LoraSpec)
    """LoRA settings; null trains every parameter."""
    moe: MoeSpec = Field(default_factory=MoeSpec)
    """Mixture-of-experts settings."""

    @field_validator("base")
    @classmethod
    def _embedded(cls, value: str) -> str:
        if value.startswith("builtin:") and value != EMBEDDED_BASE:
            raise ValueError(f"no base of this name comes with Raylign; there is {EMBEDDED_BASE}")
        return locate_embedded_base() if value == EMBEDDED_BASE else value


def locate_embedded_base() -> str:
    """Directory of the embedded base: in a checkout `assets/`, in an installed package beside its modules.

    Relative where the checkout is the working directory: results then name a base that moves with it, also
    in a job that works in Ray's copy.

    Raises:
        ValueError: this installation came without it.
    """
    package = Path(__file__).resolve().parents[1]
    places = [directory / CHECKOUT_BASE for directory in (package, package.parent)]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        raise ValueError(
            f"'{EMBEDDED_BASE}' did not come with this installation (looked for {places[0]} and {places[1]})"
            "; name a hub id or a directory"
        )
    return str(found.relative_to(Path.cwd()) if Path.cwd() == found.parents[1] else found)
