"""Files of a model worker: adapters and models in their public formats, and checkpoints of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PretrainedConfig

from actors.errors import UserError
from actors.models.base.loading import load_tokenizer
from actors.models.files import give_usual_mode
from actors.models.lora import adapters
from actors.models.lora.heads import head_parameters
from actors.models.parallel.fsdp import is_sharded
from actors.models.parallel.fsdp_files import write_sharded_model
from actors.models.turn_ends import write_turn_ends
from actors.trainer.host_state import HostState
from actors.trainer.updates import Updates


class Saving:
    """The part of a `ModelHost` that writes to disk and reads checkpoints back.

    Where weights are sharded every rank hands over its slices; rank 0 writes.
    """

    def __init__(self, state: HostState, updates: Updates) -> None:
        self._state, self._updates = state, updates

    def save_adapter(self, role: str, directory: str | Path) -> None:
        """Write one adapter in PEFT's layout, with its head if it has one (rank 0)."""
        state = self._state
        head = state.heads.get(role)
        parameters = {**adapters.adapter_parameters(state.model, role), **head_parameters(head)}
        state.check_replicas(parameters.values())
        # Collective where adapters are sharded; elsewhere the other ranks have nothing to do here.
        if self._writes or any(map(is_sharded, parameters.values())):
            weight = None if head is None else head.weight
            adapters.save_adapter(state.model, role, directory, weight, write=self._writes)
        state.ranks.wait()

    def save_model(self, directory: str | Path) -> None:
        """Write the whole model and its tokenizer in transformers' layout (rank 0); for `lora: null`."""
        state = self._state
        if state.model is not state.base:
            raise UserError("the model has adapters: save those, or merge them")
        state.check_replicas(state.base.parameters())
        if state.sharded:
            with _as_loaded(state.config):
                write_sharded_model(state.base, directory, write=self._writes)
        elif self._writes:
            # Parameters in training are views of one storage, which transformers takes for tied weights.
            weights = {name: value.detach().clone() for name, value in state.base.state_dict().items()}
            with _as_loaded(state.config):
                state.base.save_pretrained(str(directory), state_dict=weights)
            give_usual_mode(*Path(directory).glob("*.safetensors"))
        if self._writes:
            load_tokenizer(state.spec.model).save_pretrained(str(directory))
            write_turn_ends(directory)
        state.ranks.wait()

    def save_checkpoint(self, directory: str | Path, role: str | None = None) -> None:
        """Write all that `load_checkpoint` needs to go on bit for bit (rank 0).

        Args:
            directory: one for each role.
            role: which of the prepared roles; None: the one prepared last.
        """
        training = self._updates.training_of(role)
        self._state.check_replicas(training.parameters.values())
        if self._writes or training.is_sharded:
            training.save(Path(directory), write=self._writes)
        self._state.ranks.wait()

    def save_before(self, directory: str | Path, steps: int, role: str | None = None) -> bool:
        """As `save_checkpoint`, while the other thread of this rank works on step `steps`: until that is
        applied, all is still as the step before has left it. For the first rank alone, which has all of it.

        Returns:
            False where that step was applied already, or ranks hold slices of what is trained.
        """
        training = self._updates.training_of(role)
        if training.is_sharded:
            return False
        with training.committing:
            if training.steps_done != steps:
                return False
            training.save(Path(directory), write=self._writes)
        return True

    def load_checkpoint(self, directory: str | Path, role: str | None = None) -> int:
        """Go on from a role's checkpoint, after `prepare_training` with the same settings.

        Returns:
            Steps done so far: the number of the next step.

        Raises:
            UserError: incomplete, damaged, or of other settings.
        """
        training = self._updates.training_of(role)
        training.load(Path(directory))
        return training.steps_done

    @property
    def _writes(self) -> bool:
        return self._state.ranks.rank == 0


@contextmanager
def _as_loaded(config: PretrainedConfig) -> Iterator[None]:
    """A config as it is meant to be saved: a cache is off here because training has no use for one."""
    config.use_cache = True
    try:
        yield
    finally:
        config.use_cache = False
