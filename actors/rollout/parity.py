"""Parity probe: compares an engine's log-probabilities of a base with those of transformers, as loaded and
after an update of its weights. Run before a run trains an architecture that the table lacks.

Most faults of engines with new architectures are silent (a bias left out, a rotation of other halves, an
update that reached half a layer), and training on such samples goes wrong slowly.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.models.spec import ModelSpec
from actors.rollout.engine import RolloutEngine
from actors.rollout.spec import EngineSpec
from actors.sync.verify import TOLERANCE, ProbeReport, compare_probes, mismatch_in_probes

if TYPE_CHECKING:
    import torch

LENGTHS = (17, 33, 48, 96)
"""Tokens of the probes: more than one block of a key-value cache, none a multiple of another."""
NAME = "probe"
FIRST_STD, LARGEST_STD = 0.02, 2.0
"""Of the random B of the probe's adapter, enlarged until the change is well above the tolerance."""
CLEAR = 20.0
"""Smallest change, in tolerances: an engine that ignores it must be seen."""


@dataclass(frozen=True)
class ParityReport:
    """Findings of a probe. Differences are of log-probabilities, engine against transformers."""

    dtype: str
    loaded: ProbeReport | None
    """Of the base as the engine loaded it; None where it could not."""
    updated: ProbeReport | None
    """After one update in place; None where it could not be made."""
    moved: float
    """Mean |difference| in transformers that the update made."""
    problems: tuple[str, ...]
    """Why this base can't be used, in sentences; empty when it can."""

    def __str__(self) -> str:
        found = [
            f"{when} median {probe.p50:.1e}, max {probe.max:.1e}"
            for when, probe in (("as loaded", self.loaded), ("after an update", self.updated))
            if probe is not None
        ]
        return f"|log-probability difference| in {self.dtype}: {'; '.join(found)} (update: {self.moved:.1e})"


def probe(spec: EngineSpec, model: ModelSpec) -> ParityReport:
    """Compare an engine of this process, which needs room for the base twice, with transformers.

    Raises: as `probe_engine`.
    """
    return probe_engine(RolloutEngine(spec), model)


def probe_engine(engine: RolloutEngine, model: ModelSpec) -> ParityReport:
    """Compare an engine with transformers on fixed tokens. The engine is empty afterwards.

    Raises:
        UserError: transformers can't load the base, or LoRA has no targets in it.
    """
    # First the trainer's model: vLLM's transformers backend changes transformers' classes in its process.
    policy = _Policy(model)
    dtype = engine.spec.dtype
    loaded = updated = None
    try:
        engine.load(policy.directory, updatable=True)
        before = engine.score_tokens(policy.tokens, policy.starts)
        loaded = compare_probes(before, policy.base)
        engine.weights.stage_payload(policy.payload())
        engine.weights.commit(0)
        after = engine.score_tokens(policy.tokens, policy.starts)
        updated = compare_probes(after, policy.changed, previous=policy.base)
    except Exception as error:
        # Whatever vLLM raises about a model that it can't run is the answer.
        what = "load" if loaded is None else "update"
        problem = f"vLLM can't {what} it: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        return ParityReport(dtype, loaded, None, policy.moved, (problem,))
    finally:
        with contextlib.suppress(Exception):
            engine.unload()
    return ParityReport(dtype, loaded, updated, policy.moved, _problems(loaded, updated, policy.moved, dtype))


def _problems(loaded: ProbeReport, updated: ProbeReport, moved: float, dtype: str) -> tuple[str, ...]:
    found = []
    for when, report in (("as loaded", loaded), ("after an update in place", updated)):
        objection = mismatch_in_probes(report, dtype)
        if objection is not None:
            found.append(f"vLLM is wrong {when}: {objection}")
    if moved < CLEAR * TOLERANCE[dtype] and dtype == "float32":
        found.append(f"the probe's update moved log-probabilities by {moved:.1e} only, which proves nothing")
    return tuple(found)


class _Policy:
    """The trainer's side: the base, and the base with a random adapter (or, without LoRA, with noise)."""

    def __init__(self, model: ModelSpec) -> None:
        from actors.models.base.loading import load_base, local_base_dir, resolve_base
        from actors.models.lora.adapters import attach_lora

        spec = model.model_copy(update={"allow_untested": True})
        self.directory = str(local_base_dir(resolve_base(spec).checked().base_path))
        self._base: Any = load_base(spec).eval()
        config = self._base.config.get_text_config()
        generator = np.random.default_rng(0)
        positions = getattr(config, "max_position_embeddings", None) or max(LENGTHS) + 1
        self.tokens = [
            generator.integers(0, config.vocab_size, min(n, positions - 1)).tolist() for n in LENGTHS
        ]
        self.starts = [1] * len(LENGTHS)
        self.base = self._logps(self._base)
        self._net: Any = (
            self._base if model.lora is None else attach_lora(self._base, model.lora, NAME).eval()
        )
        self._dtype = str(next(self._base.parameters()).dtype).removeprefix("torch.")
        self._adapted = model.lora is not None
        self._change()

    def payload(self) -> Any:
        """The changed weights as a trainer sends them."""
        from actors.models.lora.merge import adapter_factors, merged_state
        from actors.sync.payload import fused_groups_of, pack_adapter, pack_merged

        if self._adapted:
            return pack_adapter(0, self._dtype, adapter_factors(self._net, NAME))
        state = merged_state(self._base)
        return pack_merged(0, self._dtype, {name: state[name] for name in fused_groups_of(state, state)})

    def _change(self) -> None:
        std = FIRST_STD
        while True:
            self._add_noise(std)
            self.changed = self._logps(self._net)
            self.moved = float(
                np.concatenate([np.abs(a - b) for a, b in zip(self.changed, self.base, strict=True)]).mean()
            )
            if self.moved >= CLEAR * TOLERANCE["float32"] or std >= LARGEST_STD:
                return
            std *= 4

    def _add_noise(self, std: float) -> None:
        import torch

        from actors.models.lora.adapters import adapter_parameters

        generator = torch.Generator().manual_seed(0)

        def noise(like: torch.Tensor) -> torch.Tensor:
            return (torch.randn(like.shape, generator=generator) * std).to(like)

        with torch.no_grad():
            if self._adapted:
                for name, parameter in adapter_parameters(self._net, NAME).items():
                    if "lora_B" in name:
                        parameter.copy_(noise(parameter))
            else:
                for parameter in self._base.parameters():
                    if parameter.ndim > 1:
                        parameter.add_(noise(parameter) * parameter.float().std().to(parameter))

    def _logps(self, net: Any) -> list[np.ndarray]:
        """transformers' log-probability of every token but the first, a sequence at a time."""
        import torch

        found = []
        for ids in self.tokens:
            with torch.no_grad():
                logits = net(input_ids=torch.tensor([ids])).logits[0].float()
            logps = logits[:-1].log_softmax(-1)
            found.append(logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
        return found
