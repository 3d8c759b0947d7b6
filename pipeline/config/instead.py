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
    "max_completion_length": _LENGTH,
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
    "max_new_tokens": "write `max_tokens: {value}`",
}
