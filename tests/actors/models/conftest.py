"""Tiny random bases of every architecture in the table, and adapters that do something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.models.base.loading import load_base
from actors.models.lora.adapters import adapter_parameters, attach_lora
from actors.models.spec import LoraSpec, ModelSpec, TargetGroup
from tests.actors.models.tiny_models import GROUPS, SIZES, tiny_config_of, tiny_model

__all__ = ["GROUPS", "SIZES", "tiny_config_of"]


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Any]:
    """Config of a tiny model of an architecture."""
    return tiny_config_of


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a tiny random base of an architecture, made once per session."""
    made: dict[str, Path] = {}

    def make(model_type: str, seed: int = 0, **overrides: Any) -> Path:
        key = f"{model_type}-{seed}-{sorted(overrides.items())}"
        if key not in made:
            from actors.models.tiny import byte_tokenizer

            made[key] = tmp_path_factory.mktemp(model_type)
            tiny_model(model_type, seed, **overrides).save_pretrained(made[key])
            byte_tokenizer().save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def groups_of() -> Callable[[str], list[TargetGroup]]:
    """All target groups that an architecture has."""
    return lambda model_type: list(GROUPS[model_type])


def shake(peft: Any, name: str, seed: int = 1, std: float = 0.05) -> None:
    """Give an adapter a B that isn't zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for full, parameter in adapter_parameters(peft, name).items():
            if "lora_B" in full:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@pytest.fixture(scope="session")
def adapted(base_of: Callable[..., Path]) -> Callable[..., Any]:
    """A base with an adapter `policy` whose B isn't zero."""

    def make(model_type: str, lora: LoraSpec, dtype: str = "float32", **overrides: Any) -> Any:
        model = load_base(ModelSpec(base=str(base_of(model_type, **overrides)), dtype=dtype, lora=lora))
        peft = attach_lora(model, lora, "policy", seed=3)
        shake(peft, "policy")
        return peft

    return make


@pytest.fixture(scope="session")
def randomise_b() -> Callable[..., None]:
    return shake


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """(3, 20) token ids."""
    return torch.randint(3, 256, (3, 20), generator=torch.Generator().manual_seed(5))
