"""`raylign chat`: one vLLM engine in an actor, a conversation through the base's chat template."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import EXIT_DONE, UserError
from actors.sampling import SamplingSpec
from pipeline import console

if TYPE_CHECKING:
    from actors.group import ActorGroup

LEAVE = ("", "exit", "quit")
"""What ends a conversation, beside end of input."""


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
        UserError: the model can't be used, or it has no chat template.
    """
    from actors.models.loading import is_adapter_dir, load_tokenizer, resolve_base
    from actors.models.spec import ModelSpec
    from actors.models.turn_ends import turn_ends

    # A run that trained an adapter has probed its base.
    spec = ModelSpec(base=model, allow_untested=is_adapter_dir(model))
    base = resolve_base(spec).checked().base_path
    tokenizer = load_tokenizer(spec)
    if not tokenizer.chat_template:
        raise UserError(
            f"{model}: its tokenizer has no chat template, so there is no way to put a question to it"
        )
    asked = SamplingSpec(temperature=temperature, max_tokens=max_tokens, seed=seed)
    sampling = turn_ends(tokenizer, base).sampling(asked, tokenizer, "chat")
    messages = [{"role": "system", "content": system}] if system else []
    with engine(model) as rollout:
        for text in [prompt] if prompt is not None else typed():
            messages.append({"role": "user", "content": text})
            answer = reply(rollout, tokenizer, messages, sampling)
            messages.append({"role": "assistant", "content": answer})
            console.say(answer)
    return EXIT_DONE


@contextlib.contextmanager
def engine(model: str) -> Iterator[ActorGroup]:
    """A local Ray with one rollout actor that serves `model` (a model or an adapter)."""
    from actors.cluster import local_resources, start_ray, stop_ray
    from actors.group import ROLLOUT, rollout_group
    from actors.rollout import EngineSpec
    from actors.runtime import LimitsSpec, RoleSpec

    threads = max(1, int(local_resources()["CPU"]))
    with tempfile.TemporaryDirectory(prefix="raylign-chat-") as logs:
        start_ray()
        group = rollout_group(RoleSpec(threads=threads), LimitsSpec(), Path(logs)).start()
        try:
            group.ready().build(ROLLOUT, EngineSpec()).result()
            group.call("load", str(Path(model).absolute()) if Path(model).exists() else model, phase="load")
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


def reply(rollout: ActorGroup, tokenizer: Any, messages: list[dict[str, str]], sampling: SamplingSpec) -> str:
    """The model's next turn."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    generations = rollout.call_rank(0, "generate", [ids], sampling, None, phase="generate")
    return generations.texts(tokenizer, sampling.stop, sampling.stop_token_ids)[0]
