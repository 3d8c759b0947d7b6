"""Loop of `raylign chat`: one vLLM engine in an actor, conversations by the base's chat template."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.batches import SamplingSpec, possible_temperature
from actors.errors import EXIT_DONE, UserError
from pipeline.monitoring import console
from pipeline.monitoring.progress import working

if TYPE_CHECKING:
    from actors.cluster import WorkerGroup

LEAVE = ("", "exit", "quit")
"""Inputs that end a conversation, as end of input does."""


def chat(
    model: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    temperature: float = 0.7,
    max_tokens: int = 256,
    seed: int = 0,
) -> int:
    """Answer `prompt`, or whatever is typed until an empty line; returns the exit code.

    Raises:
        UserError: the model can't be used, it has no chat template, or vLLM has no such temperature.
    """
    with working(f"reading {model}"):
        from actors.models.base.loading import is_adapter_dir, load_tokenizer, resolve_base
        from actors.models.spec import ModelSpec
        from actors.models.turn_ends import turn_ends

    try:
        possible_temperature(temperature, greedy=True)
    except ValueError as error:
        raise UserError(f"--temperature {error}") from None
    # A run that trained an adapter has probed its base.
    spec = ModelSpec(base=model, allow_untested=is_adapter_dir(model))
    model = spec.base
    resolve_base(spec).checked()
    tokenizer = load_tokenizer(spec)
    if not tokenizer.chat_template:
        raise UserError(
            f"{model}: its tokenizer has no chat template, so there is no way to put a question to it"
        )
    asked = SamplingSpec(temperature=temperature, max_tokens=max_tokens, seed=seed)
    sampling = turn_ends(tokenizer, model).sampling(asked, tokenizer, "chat")
    messages = [{"role": "system", "content": system}] if system else []
    with engine(model) as rollout:
        for text in [prompt] if prompt is not None else typed():
            messages.append({"role": "user", "content": text})
            answer = reply(rollout, tokenizer, messages, sampling)
            messages.append({"role": "assistant", "content": answer})
            console.say(answer)
    return EXIT_DONE


@contextlib.contextmanager
def engine(model: str) -> Iterator[WorkerGroup]:
    """A local Ray with one rollout actor that serves `model` (a model or an adapter)."""
    from actors.cluster import LimitsSpec, RoleSpec, local_resources, start_ray, stop_ray
    from actors.rollout.remote import ROLLOUT, RolloutEngines, rollout_group
    from actors.rollout.spec import EngineSpec

    threads = max(1, int(local_resources()["CPU"]))
    with tempfile.TemporaryDirectory(prefix="raylign-chat-") as logs:
        with working("starting Ray"):
            start_ray("local")
            group = rollout_group(RoleSpec(threads=threads), LimitsSpec(), Path(logs)).start()
        try:
            with working(f"starting an engine, which loads {model}"):
                group.ready().build(ROLLOUT, EngineSpec()).result()
                base = str(Path(model).absolute()) if Path(model).exists() else model
                RolloutEngines(group).load(0, base).result()
            yield group
        finally:
            group.shutdown()
            stop_ray()


def typed() -> Iterator[str]:
    """Lines from the terminal until an empty one, `exit`, or end of input."""
    console.say("An empty line ends the conversation.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line.lower() in LEAVE:
            return
        yield line


def reply(
    rollout: WorkerGroup, tokenizer: Any, messages: list[dict[str, str]], sampling: SamplingSpec
) -> str:
    """The model's next turn.

    Raises:
        UserError: the chat template refuses the messages.
    """
    from actors.rollout.remote import RolloutEngines

    ids = question(tokenizer, messages)
    generations = RolloutEngines(rollout).generate(0, [ids], sampling).result()
    return generations.texts(tokenizer, sampling.stop, sampling.stop_token_ids)[0]


def question(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to its next answer, by the template that training takes for it.

    Raises:
        UserError: the chat template refuses it, or there is none for it.
    """
    from pipeline.data.reading.bad_rows import RowProblem
    from pipeline.data.tokens.chat_format import chat_format
    from pipeline.data.tokens.encode import token_ids_of

    try:
        text = chat_format(tokenizer).render(messages, {}, for_generation=True)
    except RowProblem as problem:
        raise UserError(f"{problem.reason}: {problem.detail}") from problem
    return [int(token) for token in token_ids_of(tokenizer, [text], plain=False)["input_ids"][0]]
