"""Keys that people know from TRL, PEFT and transformers, and what this project writes for them."""

from __future__ import annotations

_BATCH = (
    "write `batch_size`: it is global, so per_device_train_batch_size x gradient_accumulation_steps x "
    "number of devices; micro-batches follow `max_tokens_per_micro_batch`"
)
_DTYPE = "write `model.dtype: bfloat16` (or float32)"
_TARGETS = "write `model.lora.targets` with groups: attention, experts, shared_experts, router, mlp"
_DATA = "write `data: org/name`, a path, or `data: {{source: ..., name: ..., split: ...}}`"
_ONE_BASE = "write `model.base` (hub id or directory), once for all stages"
_NOT_YET = "sharding is not there yet; ranks hold the whole base and average their gradients"
_LENGTH = "write `max_length`, for prompt and answer together"
_TRACKERS = "write `logging.report_to`"
_COMPLETION = "write `max_completion_length: {value}`"
_FILTER = (
    "leave it out: what it leaves unsampled the trainer still counts, so old log-probabilities would not be "
    "those of the policy that sampled (top_p 0.9: 0.1 nats off a token); `temperature` and `stop` are "
    "accounted for, and `eval.sampling` takes it for evaluation"
)
_GENERATION = "write `steps_per_generation`: a generation is `batch_size` times as many samples"
_SAMPLES = "leave it out: samples are in the stage's samples.jsonl and in the report"
_REWARDS = "write `rewards: [...]`: `exact_match`, `module:function`, a reward stage's name or a directory"
_ALWAYS_VLLM = "leave it out: online stages sample with vLLM, in the actors of `roles.rollout`"
_MISMATCH = (
    "leave it out: old log-probabilities are the trainer's own; the engine's are compared with them at every "
    "step (`mismatch_tolerance`)"
)

INSTEAD: dict[str, str] = {
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "train_batch_size": _BATCH,
    "micro_batch_size": "write `max_tokens_per_micro_batch`: micro-batches follow a token budget",
    "per_device_eval_batch_size": "evaluation follows `max_tokens_per_micro_batch`; leave it out",
    "warmup_ratio": "write `warmup_steps: {value}` (a number below 1 is a share of all steps)",
    "lr": "write `learning_rate: {value}`",
    "lr_scheduler": "write `lr_scheduler_type`",
    "scheduler": "write `lr_scheduler_type`",
    "epochs": "write `num_train_epochs: {value}`",
    "num_epochs": "write `num_train_epochs: {value}`",
    "steps": "write `max_steps: {value}`",
    "optimizer": "write `optim`",
    "max_seq_length": _LENGTH,
    "max_prompt_length": _LENGTH,
    "max_completion_length": f"{_LENGTH}; online stages have it as well",
    "padding_free": "write `packing: auto`",
    "save_strategy": "write `save_steps`",
    "eval_strategy": "write `eval_steps`",
    "evaluation_strategy": "write `eval_steps`",
    "logging_strategy": "write `logging.logging_steps`",
    "logging_dir": _TRACKERS,
    "wandb_project": _TRACKERS,
    "report_to": _TRACKERS,
    "run_name": "write `name`, at the top",
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "torch_dtype": _DTYPE,
    "model_name_or_path": _ONE_BASE,
    "model_name": _ONE_BASE,
    "base_model": _ONE_BASE,
    "ref_model": "write `reference: base` or a stage's name; left out, it is what the stage starts from",
    "precompute_ref_log_probs": "reference log-probabilities are always computed ahead; leave it out",
    "sync_ref_model": "a moving reference (TR-DPO) is not there; leave it out",
    "lora_r": "write `r: {value}`",
    "rank": "write `r: {value}`",
    "lora_rank": "write `r: {value}`",
    "alpha": "write `lora_alpha: {value}`",
    "dropout": "write `lora_dropout: {value}`",
    "target_modules": _TARGETS,
    "target_parameters": _TARGETS,
    "lora_target_modules": _TARGETS,
    "peft_config": "write `model.lora`",
    "use_peft": "write `model.lora` (null trains everything)",
    "use_dora": "DoRA fails on expert parameters in PEFT and is not offered",
    "init_lora_weights": "only PEFT's default initialisation works on expert parameters; leave it out",
    "modules_to_save": "whole modules beside LoRA are not offered; `model.lora: null` trains everything",
    "load_in_4bit": "quantised bases are not there yet",
    "load_in_8bit": "quantised bases are not there yet",
    "output_router_logits": "write `model.moe.router_aux_loss_coef`",
    "dataset": _DATA,
    "datasets": _DATA,
    "dataset_name": _DATA,
    "dataset_config": _DATA,
    "train_dataset": _DATA,
    "dataset_text_field": "write `data: {{source: ..., columns: {{text: {value}}}}}`",
    "eval_dataset": "write `eval_data`",
    "path": "write `source: {value}`",
    "subset": "write `name: {value}`",
    "completion_only_loss": "write `train_on: answer` (or all)",
    "assistant_only_loss": "write `train_on: answer` (or all)",
    "remove_unused_columns": "leave it out; columns are mapped by `data.columns`",
    "push_to_hub": "leave it out; an adapter directory is in PEFT's layout, ready for `hf upload`",
    "resume_from_checkpoint": "leave it out; the same `raylign run` goes on from the last checkpoint",
    "overwrite_output_dir": "leave it out; `raylign run --fresh` starts anew",
    "deepspeed": _NOT_YET,
    "fsdp": _NOT_YET,
    "fsdp_config": _NOT_YET,
    "use_cpu": "leave it out; a role without `gpus` runs on the CPU",
    "num_gpus": "write `gpus: {value}` (for each worker)",
    "num_cpus": "write `cpus: {value}` (for each worker)",
    "num_workers": "write `workers: {value}`",
    "world_size": "write `roles.policy.workers`",
    "max_new_tokens": "write `max_tokens: {value}` (in an online stage `max_completion_length: {value}`)",
    "response_length": _COMPLETION,
    "max_response_length": _COMPLETION,
    "generate_max_len": _COMPLETION,
    "num_ppo_epochs": "write `num_iterations: {value}`",
    "ppo_epochs": "write `num_iterations: {value}`",
    "num_mini_batches": "write `steps_per_generation: {value}` (`batch_size` is the size of one of them)",
    "mini_batch_size": "write `batch_size`: samples per optimizer step, over all ranks",
    "ppo_mini_batch_size": "write `batch_size`: samples per optimizer step, over all ranks",
    "rollout_batch_size": _GENERATION,
    "generation_batch_size": _GENERATION,
    "total_episodes": "write `max_steps`: a step is batch_size x steps_per_generation samples",
    "rloo_k": "write `num_generations: {value}`",
    "n_samples_per_prompt": "write `num_generations: {value}`",
    "kl_coef": "write `beta: {value}`",
    "init_kl_coef": "write `beta: {value}`",
    "adap_kl_ctrl": "write `kl_target` (and `kl_horizon`); without it beta is fixed",
    "target_kl": "write `kl_target: {value}`",
    "horizon": "write `kl_horizon: {value}`",
    "cliprange": "write `epsilon: {value}`",
    "clip_range": "write `epsilon: {value}`",
    "eps_clip": "write `epsilon: {value}`",
    "clip_ratio": "write `epsilon: {value}`",
    "clip_ratio_c": "write `delta: {value}`",
    "value_clip": "write `cliprange_value: {value}`",
    "gae_lambda": "write `lam: {value}`",
    "lambd": "write `lam: {value}`",
    "entropy_coeff": "write `entropy_coef: {value}`",
    "normalize_advantages": "write `whiten_advantages: shift_and_scale`",
    "normalize_reward": "write `scale_rewards: batch` (GRPO) or `whiten_rewards: scale` (PPO)",
    "critic_lr": "write `critic_learning_rate: {value}`",
    "value_model_path": "write `critic_init: STAGE` (a reward stage), or leave it out",
    "sft_model_path": "write `init: STAGE`; by default it is the last policy before this stage",
    "reward_model": _REWARDS,
    "reward_model_path": _REWARDS,
    "reward_funcs": _REWARDS,
    "reward_function": _REWARDS,
    "reward_weights": "write each weight with its source: `rewards: [{{source: ..., weight: ...}}]`",
    "use_vllm": _ALWAYS_VLLM,
    "vllm_mode": _ALWAYS_VLLM,
    "vllm_gpu_memory_utilization": "write `roles.rollout.engine.gpu_memory_utilization: {value}`",
    "vllm_tensor_parallel_size": "write `roles.rollout.engine.tensor_parallel_size: {value}`",
    "vllm_max_model_length": "write `roles.rollout.engine.max_model_len: {value}`",
    "vllm_importance_sampling_correction": _MISMATCH,
    "top_p": _FILTER,
    "top_k": _FILTER,
    "min_p": _FILTER,
    "repetition_penalty": _FILTER,
    "presence_penalty": _FILTER,
    "frequency_penalty": _FILTER,
    "generation_kwargs": _FILTER,
    "shuffle_dataset": "write `shuffle: {value}`",
    "log_completions": _SAMPLES,
    "num_sample_generations": _SAMPLES,
}
