"""One or two rows of public data sets, written by hand in each set's published form; none was downloaded."""

from __future__ import annotations

import json
from typing import Any

Q, A, B = "What is 2+2?", "It is 4.", "It is 5."
ROLES = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
WORSE = [ROLES[0], {"role": "assistant", "content": B}]
SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
TOOL = {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}, "b": {"type": "int"}}}
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
GLAIVE = (
    f"USER: {Q}\n\n\nASSISTANT: <functioncall> "
    '{"name": "add", "arguments": \'{"a": 2, "b": 2}\'} <|endoftext|>\n\n\n'
    f'FUNCTION RESPONSE: {{"sum": 4}}\n\n\nASSISTANT: {A} <|endoftext|>\n\n\n'
)

SETS: dict[str, list[dict[str, Any]]] = {
    "Alpaca": [{"instruction": Q, "input": "", "output": A, "text": f"Below is ... {Q} ... {A}"}],
    "LLaMA-Factory's Alpaca form": [
        {"instruction": Q, "input": "", "output": A, "system": "Be brief.", "history": [["Hi.", "Hello."]]}
    ],
    "Dolly": [{"instruction": Q, "context": "", "response": A, "category": "open_qa"}],
    "OpenHermes-2.5": [{"conversations": SHAREGPT, "source": "x", "system_prompt": None, "category": None}],
    "SlimOrca": [
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {**SHAREGPT[0], "weight": 0.0},
                {**SHAREGPT[1], "weight": 1.0},
            ]
        }
    ],
    "OpenOrca": [{"id": "flan.1", "system_prompt": "", "question": Q, "response": A}],
    "UltraChat 200k": [{"prompt": Q, "prompt_id": "1", "messages": ROLES}],
    "Tulu 3 SFT": [{"id": "1", "messages": ROLES, "source": "x"}],
    "No Robots": [{"prompt": Q, "prompt_id": "1", "messages": ROLES, "category": "Open QA"}],
    "Capybara": [
        {"source": "x", "conversation": [{"input": Q, "output": A}, {"input": "And?", "output": A}]}
    ],
    "WildChat, LMSYS-Chat": [{"conversation": ROLES, "model": "x", "turn": 1, "language": "English"}],
    "NuminaMath-CoT": [{"source": "x", "problem": Q, "solution": A, "messages": ROLES}],
    "LIMA": [{"conversations": [Q, A], "source": "x"}],
    "UltraChat (first form)": [{"id": "0", "data": [Q, A]}],
    "MATH": [{"problem": Q, "level": "Level 1", "type": "Algebra", "solution": A}],
    "MetaMathQA": [{"type": "GSM_AnsAug", "query": Q, "original_question": Q, "response": A}],
    "GSM8K": [{"question": Q, "answer": "2+2=4\n#### 4"}],
    "xLAM function calling": [
        {"id": 0, "query": Q, "tools": json.dumps([TOOL]), "answers": json.dumps([CALL])}
    ],
    "glaive-function-calling-v2": [{"system": "SYSTEM: You are a helpful assistant.", "chat": GLAIVE}],
    "HelpSteer2": [{"prompt": Q, "response": A, "helpfulness": 4, "correctness": 4, "verbosity": 1}],
    "OASST1": [
        {"message_id": "a", "parent_id": None, "text": Q, "role": "prompter", "lang": "en"},
        {"message_id": "b", "parent_id": "a", "text": A, "role": "assistant", "lang": "en"},
    ],
    "UltraFeedback": [
        {
            "source": "x",
            "instruction": Q,
            "completions": [{"response": A, "overall_score": 9}, {"response": B, "overall_score": 1}],
        }
    ],
    "Nectar": [
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
            "answers": [{"answer": A, "rank": 1.0}, {"answer": B, "rank": 2.0}],
        }
    ],
    "UltraFeedback binarized": [
        {"prompt": Q, "chosen": ROLES, "rejected": WORSE, "messages": ROLES, "score_chosen": 9.0}
    ],
    "HH-RLHF": [
        {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {B}"}
    ],
    "Orca DPO pairs": [{"system": "", "question": Q, "chosen": A, "rejected": B}],
    "LLaMA-Factory's ShareGPT pairs": [
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": B}}
    ],
    "ms-swift's pairs": [{"messages": ROLES, "rejected_response": B}],
    "Tulu 3 preferences": [{"id": "1", "prompt": Q, "chosen": ROLES, "rejected": WORSE}],
    "PKU-SafeRLHF": [{"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 0}],
    "KTO mix": [{"prompt": ROLES[:1], "completion": ROLES[1:], "label": True}],
    "LLaMA-Factory's KTO form": [{"conversations": SHAREGPT, "kto_tag": True}],
    "Tulu 3 RLVR": [{"messages": ROLES[:1], "ground_truth": "4", "dataset": "gsm8k"}],
    "DAPO-Math": [{"data_source": "x", "prompt": ROLES[:1], "reward_model": {"ground_truth": "4"}}],
    "MATH-500": [{"problem": Q, "solution": A, "answer": "4", "subject": "Algebra", "level": 1}],
}
