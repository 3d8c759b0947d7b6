"""Private names of other packages: each use is known, and held by a bound of versions or by a guard."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PACKAGES = ("datasets", "peft", "ray", "torch", "transformers", "trl", "vllm")

IMPORTED = {
    "actors.models.moe.experts_forward": {
        "transformers.integrations.moe._default_apply_gate",
        "transformers.integrations.moe._grouped_linear",
    },
    "actors.models.quantization.quantised_tensor": {"torch.utils._pytree.tree_map_only"},
    "actors.rollout.vllm.parameter_map": {
        "torch.utils._python_dispatch.TorchDispatchMode",
        "vllm.model_executor.model_loader.reload.layerwise._get_original_loader",
    },
}
"""Imports of private names, by module. What Ray and datasets keep private is looked up with a guard instead
(`actors.cluster.ray_private`, `pipeline.data.reading.split_files`)."""

ATTRIBUTES = {
    "peft": {"_active_adapter", "_check_forward_args", "_disable_adapters"},
    "ray": {"_actor_id"},
    "torch": {
        "_cdata",
        "_disabled_torch_function_impl",
        "_get_sequence_number_for_group",
        "_make_wrapper_subclass",
        "_schema",
        "_timeout",
        "_to_copy",
        "_varlen_attn_backward",
    },
    "transformers": {
        "_attn_implementation",
        "_can_record_outputs",
        "_can_set_experts_implementation",
        "_experts_implementation",
        "_is_expert_parallel",
        "_is_hf_initialized",
        "_load_pretrained_model",
        "_name_or_path",
        "_tp_plan",
        "_weight_conversions",
    },
}
"""Private attributes of objects of other packages, by package."""

OF_PYTHON = {"_HANDLER", "_asdict", "_exit", "_replace"}
"""Of signal's stubs, os, and named tuples."""

OF_VLLM = {
    "_C",  # its operators in torch
    "_adapter_manager",
    "_apply_gate",  # of transformers' experts
    "_compute_routing",
    "_copy_to_expert",
    "_get_weight_loader",
    "_grouped_topk",
    "_load_unquantized_expert",
    "_load_weights_other",
    "_map_name",
    "_narrow_for_rank",
    "_registry",
    "_setup_kernel",
    "_slice_w13_a",
    "_slice_w13_b",
    "_slice_w2_a",
    "_slice_w2_b",
    "_use_zentorch",
    "_w13_slices",
}


@functools.cache
def trees(root: Path) -> tuple[tuple[str, ast.Module], ...]:
    """Modules of both packages with their code."""
    paths = [p for package in ("actors", "pipeline") for p in sorted((root / package).rglob("*.py"))]
    names = [".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    return tuple((name, ast.parse(path.read_text())) for name, path in zip(names, paths))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_imports(tree: ast.Module) -> set[str]:
    """Dotted names with a private part that a module imports from one of the packages."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n for n in names if n.split(".")[0] in PACKAGES and any(map(private, n.split(".")))}


def own_names(root: Path) -> set[str]:
    """Private names that the two packages themselves define: methods, functions, classes, fields."""
    found = set()
    for _, tree in trees(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
                found.add(node.attr)
    return found


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def test_every_import_of_a_private_name_is_known(repository: Path) -> None:
    found = {module: private_imports(tree) for module, tree in trees(repository)}
    assert {module: names for module, names in found.items() if names} == IMPORTED


def test_every_private_attribute_of_another_packages_object_is_known(repository: Path) -> None:
    own = own_names(repository)
    found = {
        node.attr
        for _, tree in trees(repository)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own
    }
    known = set().union(*ATTRIBUTES.values()) | OF_VLLM
    assert found - known - OF_PYTHON == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_whose_private_parts_are_used_has_an_upper_bound_that_fits_what_is_installed(
    package: str, repository: Path
) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    bounds = [r for r in map(Requirement, listed) if r.name.removesuffix("-cpu") == package]
    assert bounds
    for bound in bounds:
        assert bound.specifier.contains(Version(importlib.metadata.version(bound.name))), bound
    assert any(s.operator in ("<", "==") for bound in bounds for s in bound.specifier)


def test_older_releases_of_transformers_than_have_the_private_names_are_excluded(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    (bound,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    # 5.18 was the first with `_is_expert_parallel`, 5.19 with `_mesh_manager`; looked up in their wheels.
    assert not bound.specifier.contains("5.17.0")
    assert not bound.specifier.contains("5.18.0")
