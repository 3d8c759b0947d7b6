"""`raylign serve`: what is served, at which address, and vLLM's server with a stock client."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from pipeline.cli.app import main
from tests.whole_runs.runs import ENVIRONMENT, TINY_MOE

QUESTION = [{"role": "user", "content": "37+45="}]


def run_with(directory: Path, *targets: str) -> Any:
    """A run's directory with one stage, whose adapter answers otherwise than its base; the adapted model."""
    import torch

    from actors.models.base.loading import load_base
    from actors.models.lora.adapters import attach_lora, save_adapter
    from actors.models.spec import LoraSpec, ModelSpec

    spec = LoraSpec(r=4, targets=list(targets))  # type: ignore[arg-type]
    peft = attach_lora(load_base(ModelSpec(base=str(TINY_MOE))), spec, "default", 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(peft, "default", directory / "sft" / "adapter")
    (directory / "run.json").write_text('{"name": "served"}')
    config = {"name": "served", "model": {"base": str(TINY_MOE)}, "stages": {"sft": {"data": "x"}}}
    (directory / "config.yaml").write_text(json.dumps(config))
    return peft


def answer(model: Any) -> str:
    """The greedy answer of a transformers model."""
    from actors.models.base.loading import load_tokenizer
    from actors.models.spec import ModelSpec

    tokenizer = load_tokenizer(ModelSpec(base=str(TINY_MOE)))
    ids = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    made = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=end)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def served(directory: Path, *arguments: str) -> tuple[subprocess.Popen[str], str, str]:
    """The command under way, its line, and the address in it."""
    command = [sys.executable, "-m", "pipeline", "serve", str(directory), "--port", "0", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"serving .* at (http\S+/v1)", line):
            return process, line, found[1]
    raise AssertionError("".join(lines))


def asked(url: str, model: str) -> str | None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    made = client.chat.completions.create(
        model=model,
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=24,
    )
    assert made.choices[0].finish_reason == "stop"
    return made.choices[0].message.content


def ended(process: subprocess.Popen[str], number: int) -> int:
    """Exit code after a signal; nothing that it started is left."""
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    code = process.wait(60)
    assert below
    assert not psutil.wait_procs(below, timeout=20)[1]
    return code


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_base_and_adapter_answer_by_their_names_as_they_do_in_transformers(tmp_path: Path) -> None:
    model = run_with(tmp_path, "attention")
    with_adapter = answer(model)
    with model.disable_adapter():
        alone = answer(model)
    assert with_adapter != alone
    process, line, url = served(tmp_path)
    try:
        assert "serving base, sft at http://127.0.0.1:" in line
        assert (asked(url, "base"), asked(url, "sft")) == (alone, with_adapter)
        assert ended(process, signal.SIGINT) == 0
    finally:
        process.kill()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_adapter_of_experts_is_served_alone_from_a_merged_copy(tmp_path: Path) -> None:
    model = run_with(tmp_path, "attention", "experts")
    process, line, url = served(tmp_path)
    try:
        assert "serving sft at http" in line
        assert "not the others: sft adapts experts" in line
        assert asked(url, "sft") == answer(model)
        assert ended(process, signal.SIGTERM) == 0
    finally:
        process.kill()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_vllms_core_starts_ends_it_with_nothing_left(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "serve", str(TINY_MOE), "--port", "0"]
    process = subprocess.Popen(command, env=ENVIRONMENT | {"TMPDIR": str(tmp_path)}, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not cores(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(3)
        assert ended(process, number) == 130
        assert not list(tmp_path.glob("raylign-*"))
    finally:
        process.kill()


def cores(pid: int) -> list[psutil.Process]:
    """Processes below one that multiprocessing has spawned."""
    below = psutil.Process(pid).children(recursive=True)
    return [one for one in below if "spawn_main" in " ".join(one.cmdline())]


def test_what_can_not_be_served_ends_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text('{"name": "served"}')
    config = {"name": "served", "model": {"base": str(TINY_MOE)}, "stages": {"sft": {"data": "x"}}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = {
            ("./nowhere",): "directory './nowhere' does not exist",
            (str(tmp_path),): "holds no policy yet",
            (str(tmp_path), "--model", "dpo"): "--model dpo: .* has no such result; possible: base",
            (str(TINY_MOE), "--model", "dpo"): "--model is for the results of a run",
            (str(TINY_MOE), "--port", port): f"--port {port}: .*can't be used",
            (str(TINY_MOE), "--host", "0.0.0.0"): "--host 0.0.0.0: other machines could reach it",
            (str(TINY_MOE), "--dtype", "int8"): "--dtype: 'int8'",
        }
        for arguments, problem in cases.items():
            more = () if "--port" in arguments else ("--port", "0")
            with mock.patch.dict(os.environ):
                assert main(["serve", *arguments, *more]) == 2
            assert re.search(problem, capsys.readouterr().err.replace("\n", " ")), arguments
