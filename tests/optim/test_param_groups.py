"""Which parameter goes where, and which mistakes are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError
from tinygpt.layers import GeluMLP, SwiGLU
from tinygpt.optim import MuonAdamW, Rule, nanochat_rules, param_groups


class Transformer(nn.Module):
    """A transformer of torch's own parts: fused QKV, biases, learned norms and positions."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.pos_emb = nn.Parameter(torch.zeros(6, 8))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )
        self.patch = nn.Conv1d(8, 8, 3, padding=1)
        self.lm_head = nn.Linear(8, 20, bias=False)
        if tied:
            self.lm_head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.pos_emb
        x = self.patch(x.mT).mT
        return self.lm_head(self.encoder(x))


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


MUON = {"kind": "muon", "options": {"lr": 0.02}}
ADAMW = {"kind": "adamw", "options": {"lr": 1e-3}}
REST = Rule("*", **ADAMW)


def test_the_first_matching_rule_wins_and_order_is_kept() -> None:
    groups = param_groups(
        Transformer(),
        [
            Rule(("encoder.*.self_attn.*", "encoder.*.linear1.*"), ndim=2, **MUON),
            Rule("encoder.*.linear?.weight", kind="muon", options={"lr": 0.01, "momentum": 0.9}),
            REST,
        ],
    )
    assert [group["kind"] for group in groups] == ["muon", "muon", "adamw"]
    assert names(groups)[0] == [
        f"encoder.layers.{layer}.{name}.weight".replace("in_proj.weight", "in_proj_weight")
        for layer in range(2)
        for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1")
    ]
    assert names(groups)[1] == ["encoder.layers.0.linear2.weight", "encoder.layers.1.linear2.weight"]
    assert groups[1]["momentum"] == 0.9
    taken = [name for group in names(groups) for name in group]
    assert sorted(taken) == sorted(name for name, _ in Transformer().named_parameters())
    MuonAdamW(groups)


def test_a_tied_parameter_is_taken_once() -> None:
    model = Transformer(tied=True)
    rules = [Rule("lm_head.weight", **ADAMW), Rule("encoder.*", ndim=2, **MUON), REST]
    with_names = names(param_groups(model, rules))
    assert sum(group.count("tokens.weight") for group in with_names) == 1
    assert not any("lm_head.weight" in group for group in with_names)


def test_frozen_parameters_are_left_out() -> None:
    model = Transformer()
    model.tokens.requires_grad_(False)
    groups = param_groups(model, [Rule("tokens.*", **ADAMW), REST])
    assert len(groups) == 1
    assert "tokens.weight" not in names(groups)[0]


class MarkedHead(nn.Module):
    is_lm_head = True

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(4, 4))


def tied_through_parameter() -> nn.Module:
    model = nn.Module()
    model.table = nn.Embedding(4, 8)
    model.first = nn.Linear(8, 4, bias=False)
    model.first.weight = model.table.weight
    return nn.ModuleDict({"inner": model})


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


ALL_MUON = Rule("*", **MUON)
REFUSED: list[tuple[Callable[[], nn.Module], list[Rule], str]] = [
    (Transformer, [Rule("encoder.*", **ADAMW)], r"no rule matches pos_emb \(6, 8\), tokens\.weight \(20, 8\)"),
    (Transformer, [Rule("decoder.*", **MUON), REST], r"'decoder\.\*' matches nothing: no parameter has such a name"),
    (Transformer, [REST, Rule("lm_head.*", **MUON)], r"matches nothing: earlier rules take lm_head\.weight"),
    (lambda: nn.Embedding(4, 4), [ALL_MUON], r"weight \(an embedding\).*Use kind='adamw'"),
    (lambda: nn.EmbeddingBag(4, 4), [ALL_MUON], r"weight \(an embedding\)"),
    (Transformer, [Rule("lm_head.*", **MUON), REST], r"lm_head\.weight \(a head\)"),
    (MarkedHead, [ALL_MUON], r"matrix \(a head\)"),
    (tied_through_parameter, [ALL_MUON], r"inner\.table\.weight \(an embedding\)"),
    (lambda: nn.LayerNorm(4), [ALL_MUON], r"use kind='adamw', or ndim=2 in the rule, for weight \(4,\), bias \(4,\)"),
    (lambda: frozen(nn.Linear(2, 2)), [REST], "Linear has no parameter with requires_grad=True"),
]


@pytest.mark.parametrize(("build", "rules", "message"), REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_a_mistake_in_the_rules_is_refused(build: Callable[[], nn.Module], rules: list[Rule], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        param_groups(build(), rules)


@pytest.mark.parametrize("name", ["head", "output", "unembed", "unembedding"])
def test_a_head_is_known_by_name_and_size(name: str) -> None:
    sizes = {"tokens": nn.Embedding(20, 8), name: nn.Linear(8, 20, bias=False)}
    rules = [Rule("tokens.*", **ADAMW), ALL_MUON]
    with pytest.raises(ConfigError, match="a head"):
        param_groups(nn.ModuleDict(sizes), rules)
    sizes[name] = nn.Linear(8, 19, bias=False)
    assert len(param_groups(nn.ModuleDict(sizes), rules)) == 2


def test_an_optional_rule_may_match_nothing() -> None:
    assert len(param_groups(Transformer(), [Rule("decoder.*", optional=True, **MUON), REST])) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_for_model_sorts_a_foreign_transformer(tied: bool) -> None:
    muon, adamw = MuonAdamW.for_model(Transformer(tied=tied)).param_groups
    assert (muon["kind"], adamw["kind"]) == ("muon", "adamw")
    assert muon["param_names"] == [
        f"encoder.layers.{layer}.{name}"
        for layer in range(2)
        for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    ]
    assert {"tokens.weight", "pos_emb", "patch.weight", "encoder.layers.0.norm1.weight"} <= set(adamw["param_names"])
    assert ("lm_head.weight" in adamw["param_names"]) is not tied


def test_for_model_trains_a_foreign_transformer() -> None:
    torch.manual_seed(0)
    model = Transformer()
    optimizer = MuonAdamW.for_model(model, adamw_lr=1e-2)
    ids = torch.randint(20, (16, 6))
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        # The token at the position before: attention must learn to look back.
        loss = nn.functional.cross_entropy(model(ids)[:, 1:].flatten(0, 1), ids[:, :-1].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_for_model_takes_more_names_for_adamw() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
    muon, adamw = MuonAdamW.for_model(model, adamw_names=["1.*"]).param_groups
    assert (muon["param_names"], adamw["param_names"]) == (["0.weight"], ["1.weight"])
    with pytest.raises(ConfigError, match=r"adamw_names: 'head\.\*' matches no parameter"):
        MuonAdamW.for_model(model, adamw_names=["head.*"])


def test_for_model_gives_single_rows_to_adamw() -> None:
    (group,) = MuonAdamW.for_model(nn.Linear(24, 1)).param_groups
    assert group["kind"] == "adamw"


def test_for_model_refuses_a_model_without_parameters() -> None:
    with pytest.raises(ConfigError, match="Identity has no parameter"):
        MuonAdamW.for_model(nn.Identity())


def lr_of(rules: list[Rule], name: str) -> float:
    parameter = torch.zeros(2) if name.endswith("norm.weight") else torch.zeros(2, 2)
    return next(rule.options["lr"] for rule in rules if rule.matches(name, parameter))


def test_nanochat_rates_follow_width_and_batch_but_smear_and_backout_do_not() -> None:
    reference, scaled = nanochat_rules(model_dim=768), nanochat_rules(model_dim=192, batch_lr_scale=0.5)
    expected = {
        "head.weight": (0.008, 2 * 0.5),
        "embedding.weight": (0.3, 2 * 0.5),
        "blocks.3.attention.value_embedding.weight": (0.15, 2 * 0.5),
        "blocks.3.attention.q_proj.weight": (0.02, 0.5),
        "blocks.3.attention.value_gate.weight": (0.02, 0.5),
        "blocks.11.mlp.down_proj.weight": (0.02, 0.5),
        "blocks.0.residual_scale": (0.005, 0.5),
        "blocks.0.x0_scale": (0.5, 0.5),
        "blocks.0.attention_norm.weight": (0.005, 0.5),
        "smear.gate.weight": (0.2, 1.0),
        "smear.scale": (0.2, 1.0),
        "backout.scale": (0.2, 1.0),
    }
    for name, (lr, factor) in expected.items():
        assert lr_of(reference, name) == pytest.approx(lr), name
        assert lr_of(scaled, name) == pytest.approx(lr * factor), name


def test_nanochat_rules_pass_without_the_optional_parts_and_refuse_strangers() -> None:
    plain = nn.ModuleDict({"embedding": nn.Embedding(4, 8), "head": nn.Linear(8, 4, bias=False)})
    assert names(param_groups(plain, nanochat_rules(model_dim=8))) == [["head.weight"], ["embedding.weight"]]
    plain["adapter"] = nn.Linear(8, 8, bias=False)
    with pytest.raises(ConfigError, match=r"no rule matches adapter\.weight \(8, 8\)"):
        param_groups(plain, nanochat_rules(model_dim=8))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_weight": True},
        {"num_kv_heads": 1},
        {"value_embeddings": False, "residual_scales": False, "smear": False, "backout": False, "qk_norm": False},
    ],
)
@pytest.mark.parametrize("mlp", [None, SwiGLU, GeluMLP])
def test_nanochat_rules_know_every_parameter_of_our_gpt(
    changes: dict[str, Any], mlp: Callable[..., Any] | None
) -> None:
    config = GPTConfig.from_depth(2, vocab_size=64, max_seq_len=32).replace(**changes)
    factory = None if mlp is None else lambda config, layer: mlp(config.dim, 32)
    model = GPT.from_config(config, **({} if factory is None else {"mlp": factory}))
    groups = param_groups(model, nanochat_rules(model_dim=config.dim))
    muon = [name for group in groups if group["kind"] == "muon" for name, _ in group["params"]]
    assert muon == [name for name, p in model.blocks.named_parameters(prefix="blocks") if is_matrix(name, p)]
    MuonAdamW(groups)


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and "value_embedding" not in name


def test_nanochat_rules_refuse_what_is_impossible() -> None:
    with pytest.raises(ConfigError, match="model_dim=0 must be positive"):
        nanochat_rules(model_dim=0)
    with pytest.raises(ConfigError, match="table_second_moment='rows' is not known; choose 'element' or 'row'"):
        nanochat_rules(model_dim=8, table_second_moment="rows")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="table_first_moment='half' is not known; choose 'float32' or 'bfloat16'"):
        nanochat_rules(model_dim=8, table_first_moment="half")  # type: ignore[arg-type]
