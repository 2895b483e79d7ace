"""One optimizer step recorded from nanochat, from its weights and gradients to its next weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups

PARITY = Path(__file__).parents[1] / "data_files" / "parity"
OPTIONS = {"row_equilibration": True, "norm_renormalization": True}
# The schedule of the recording at step 0.
LR_SCALE, MOMENTUM, MUON_WEIGHT_DECAY = 1 / 5, 0.85, 0.1

SCALARS = {
    "smear_gate.weight": "smear.gate.weight",
    "smear_lambda": "smear.scale",
    "backout_lambda": "backout.scale",
    "lm_head.weight": "head.weight",
    "transformer.wte.weight": "embedding.weight",
}
PARTS = {
    "c_q": "attention.q_proj",
    "c_k": "attention.k_proj",
    "c_v": "attention.v_proj",
    "ve_gate": "attention.value_gate",
}


def recording(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    weights = load_file(PARITY / f"{name}.weights.safetensors")
    expected = load_file(PARITY / f"{name}.expected.safetensors")
    return weights, expected, json.loads((PARITY / f"{name}.json").read_text())


def our_tensors(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename, and split the scales that are one vector there and one scalar a block here."""
    ours = {}
    for name, tensor in recorded.items():
        if name in ("resid_lambdas", "x0_lambdas"):
            kind = "residual_scale" if name == "resid_lambdas" else "x0_scale"
            ours.update({f"blocks.{layer}.{kind}": value.reshape(1) for layer, value in enumerate(tensor)})
        elif name.startswith("value_embeds."):
            ours[f"blocks.{name.split('.')[1]}.attention.value_embedding.weight"] = tensor
        elif name.startswith("transformer.h."):
            _, _, layer, part, matrix, _ = name.split(".")
            mlp = {"c_fc": "mlp.up_proj", "c_proj": "mlp.down_proj"}
            attention = PARTS | {"c_proj": "attention.o_proj"}
            ours[f"blocks.{layer}.{(mlp if part == 'mlp' else attention)[matrix]}.weight"] = tensor
        else:
            ours[SCALARS[name]] = tensor
    return ours


def module_of(tensors: dict[str, Tensor]) -> nn.Module:
    """Hang parameters into a tree of empty modules by their dotted names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(leaf, nn.Parameter(tensor.clone()))
    return root


def with_prefix(expected: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in expected.items() if name.startswith(prefix)}


def step_as_recorded(optimizer: MuonAdamW, parameters: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * LR_SCALE
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = MOMENTUM, MUON_WEIGHT_DECAY
    for name, parameter in parameters.items():
        parameter.grad = grads[name]
    optimizer.step()


def assert_equal_weights(
    parameters: dict[str, nn.Parameter], before: dict[str, Tensor], after: dict[str, Tensor]
) -> None:
    assert parameters.keys() == after.keys()
    for name, expected in after.items():
        # Relative to the change, which is much stricter than relative to the weights.
        change = (expected - before[name]).norm()
        assert change > 0, name
        error = (parameters[name].detach() - expected).norm() / change
        assert error < 1e-4, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", ["all_blocks", "gqa"])
def test_recorded_groups_give_the_recorded_weights(name: str) -> None:
    weights, expected, description = recording(name)
    parameters = {key: nn.Parameter(value.clone()) for key, value in weights.items()}
    groups = []
    for saved in description["param_groups"]:
        group = {key: saved[key] for key in ("kind", "betas", "eps", "beta2", "weight_decay") if key in saved}
        group["params"] = [(key, parameters[key]) for key in saved["params"]]
        group["lr"] = saved["initial_lr"]
        if group["kind"] == "muon":
            group |= OPTIONS | {"polar_steps": saved["ns_steps"]}
        groups.append(group)
    step_as_recorded(MuonAdamW(groups), parameters, with_prefix(expected, "grad."))
    assert_equal_weights(parameters, weights, with_prefix(expected, "after_1."))


@pytest.mark.parametrize("name", ["all_blocks", "gqa"])
def test_nanochat_rules_give_the_recorded_weights_under_our_names(name: str) -> None:
    weights, expected, description = recording(name)
    before = our_tensors(weights)
    model = module_of(before)
    rules = nanochat_rules(model_dim=description["config"]["n_embd"], embedding_lr=0.2, unembedding_lr=0.004, **OPTIONS)
    optimizer = MuonAdamW(param_groups(model, rules))
    parameters = dict(model.named_parameters())
    step_as_recorded(optimizer, parameters, our_tensors(with_prefix(expected, "grad.")))
    assert_equal_weights(parameters, before, our_tensors(with_prefix(expected, "after_1.")))


def test_the_options_matter_to_the_recording() -> None:
    weights, expected, _ = recording("gqa")
    name = "transformer.h.0.mlp.c_fc.weight"
    parameter = nn.Parameter(weights[name].clone())
    optimizer = MuonAdamW([{"params": [(name, parameter)], "kind": "muon", "lr": 0.02}])
    step_as_recorded(optimizer, {name: parameter}, with_prefix(expected, "grad."))
    after = expected[f"after_1.{name}"]
    assert (parameter.detach() - after).norm() / (after - weights[name]).norm() > 1e-2
    assert torch.isfinite(parameter).all()
