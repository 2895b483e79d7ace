"""Config and weights of every version of nanochat that can be built become the model that computed with them."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from nanochat_folder import logits_of, random_weights
from nanochat_names import FIXTURES, PARITY
from tinygpt import GPT, GPTConfig
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.interop.nanochat import convert_state_dict
from tinygpt.interop.nanochat._names import nanochat_name

CONFIG = {"sequence_len": 256, "vocab_size": 100, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
# By era: base of the rotation, factor on q and k, short window of 256 tokens.
CONSTANTS = [(10_000.0, 1.0, 128), (10_000.0, 1.0, 128), (100_000.0, 1.15, 128), (100_000.0, 1.2, 128)]
IDS = torch.randint(100, (2, 200), generator=torch.Generator().manual_seed(1))


def model_of(weights: dict[str, Tensor], config: dict[str, Any], **constants: float | None) -> GPT:
    ours, renamed = convert_state_dict(weights, config, **constants)
    model = GPT.from_config(ours)
    model.load_state_dict(renamed, strict=True)
    return model


def assert_close(logits: Tensor, expected: Tensor) -> None:
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", FIXTURES)
def test_the_reference_of_these_tests_is_what_nanochat_recorded(name: str) -> None:
    facts = json.loads((PARITY / f"{name}.json").read_text())
    expected = load_file(PARITY / f"{name}.expected.safetensors")
    weights = load_file(PARITY / f"{name}.weights.safetensors")
    logits = logits_of(weights, facts["config"], expected["x"][0].long(), base=100_000.0, scale=1.2, window=128)
    assert_close(logits, expected["logits"])


@pytest.mark.parametrize("era", range(4))
@pytest.mark.parametrize("pattern", [None, "SL", "ssl"])
def test_each_version_computes_what_it_computed(era: int, pattern: str | None) -> None:
    config = CONFIG if pattern is None else CONFIG | {"window_pattern": pattern}
    weights = random_weights(config, era=era)
    base, scale, window = CONSTANTS[era]
    upper = config | {"window_pattern": (pattern or "L").upper()}
    expected = logits_of(weights, upper, IDS, base=base, scale=scale, window=window)
    assert_close(model_of(weights, config)(IDS), expected)


@pytest.mark.parametrize(("era", "short"), [(1, 1024), (2, 768), (3, 512)])
def test_the_short_window_is_that_of_the_version(era: int, short: int) -> None:
    config = CONFIG | {"sequence_len": 2048, "window_pattern": "SSSL"}
    ours, _ = convert_state_dict(random_weights(config, era=era), config)
    assert [ours.window_tokens(layer) for layer in range(4)] == [short, short, short, None]


@pytest.mark.parametrize("pattern", ["L", "SSSL"])
def test_gates_of_32_channels_are_those_of_early_2026(pattern: str) -> None:
    config = CONFIG | {"window_pattern": pattern}
    weights = random_weights(config, era=2, gate_channels=32)
    expected = logits_of(weights, config, IDS, base=10_000.0, scale=1.0, window=128)
    model = model_of(weights, config)
    assert_close(model(IDS), expected)
    assert model.config is not None
    assert (model.config.value_gate_channels, model.config.value_gate_scale) == (32, 2.0)
    other = model_of(weights, config, value_gate_scale=3.0)(IDS)
    assert (other - expected).abs().max() > 0.01 * expected.abs().max()


def test_constants_that_are_not_in_the_files_can_be_given() -> None:
    config = CONFIG | {"window_pattern": "SL"}
    weights = random_weights(config, era=3)
    expected = logits_of(weights, config, IDS, base=500.0, scale=1.5, window=3, cap=20.0)
    model = model_of(weights, config, rope_base=500, qk_scale=1.5, short_window_tokens=3, soft_cap=20.0)
    assert_close(model(IDS), expected)
    assert convert_state_dict(weights, config, soft_cap=None)[0].soft_cap is None


@pytest.mark.parametrize(("rows", "multiple"), [(128, 64), (100, 1), (256, 256), (112, 16)])
def test_rows_that_pad_the_vocabulary_are_kept_and_give_no_logits(rows: int, multiple: int) -> None:
    weights = random_weights(CONFIG, era=3, rows=rows)
    config, renamed = convert_state_dict(weights, CONFIG)
    assert (config.vocab_size, config.padded_vocab_size, config.vocab_multiple) == (100, rows, multiple)
    assert torch.equal(renamed["head.weight"], weights["lm_head.weight"])
    base, scale, window = CONSTANTS[3]
    assert_close(model_of(weights, CONFIG)(IDS), logits_of(weights, CONFIG, IDS, base=base, scale=scale, window=window))


def test_the_documented_run_becomes_the_model_from_depth() -> None:
    config = {"sequence_len": 2048, "vocab_size": 32768, "n_layer": 12, "n_head": 6, "n_kv_head": 6, "n_embd": 768}
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in shapes_of_d12().items()}
    ours, renamed = convert_state_dict(weights, config | {"window_pattern": "L"})
    assert ours == GPTConfig.from_depth(12, num_kv_heads=6)
    assert sum(tensor.numel() for tensor in renamed.values()) == 286_261_730


def shapes_of_d12() -> dict[str, tuple[int, ...]]:
    shapes = dict.fromkeys(("transformer.wte.weight", "lm_head.weight"), (32768, 768))
    for layer in range(12):
        block = f"transformer.h.{layer}"
        shapes |= {f"{block}.attn.c_{name}.weight": (768, 768) for name in ("q", "k", "v", "proj")}
        shapes |= {f"{block}.mlp.c_fc.weight": (3072, 768), f"{block}.mlp.c_proj.weight": (768, 3072)}
        if layer % 2:
            shapes |= {f"value_embeds.{layer}.weight": (32768, 768), f"{block}.attn.ve_gate.weight": (6, 12)}
    vectors = {"resid_lambdas": (12,), "x0_lambdas": (12,), "smear_lambda": (1,), "backout_lambda": (1,)}
    return shapes | vectors | {"smear_gate.weight": (1, 24)}


@given(
    era=st.integers(0, 3),
    layers=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half_head=st.integers(4, 8),
    vocab_size=st.integers(1, 200),
    pattern=st.text("SL", min_size=1, max_size=4),
)
@settings(max_examples=40)
def test_names_and_parameters_are_neither_lost_nor_made_up(
    era: int, layers: int, kv_heads: int, group: int, half_head: int, vocab_size: int, pattern: str
) -> None:
    heads = kv_heads * group
    config = {
        "sequence_len": 64,
        "vocab_size": vocab_size,
        "n_layer": layers,
        "n_head": heads,
        "n_kv_head": kv_heads,
        "n_embd": heads * 2 * half_head * 3,  # at least 24, which smear reads
        "window_pattern": pattern,
    }
    weights = random_weights(config, era=era)
    ours, renamed = convert_state_dict(weights, config)
    with torch.device("meta"):
        model = GPT.from_config(ours)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(v.numel() for v in renamed.values()) == sum(v.numel() for v in weights.values())
    back: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        theirs, place = nanochat_name(name)
        if place is not None:
            back[theirs] = torch.cat((back.get(theirs, torch.empty(0)), tensor))
        else:
            assert theirs not in back
            back[theirs] = tensor
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_the_prefix_of_a_compiled_model_is_taken_off() -> None:
    weights = random_weights(CONFIG, era=3)
    prefixed = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    config, renamed = convert_state_dict(prefixed, CONFIG)
    assert renamed.keys() == convert_state_dict(weights, CONFIG)[1].keys()
    assert config.smear
    with pytest.raises(CheckpointError, match=r"holds lm_head\.weight twice"):
        convert_state_dict(prefixed | {"lm_head.weight": weights["lm_head.weight"]}, CONFIG)


def test_dtypes_stay_as_they_are_and_nothing_given_is_changed() -> None:
    weights = random_weights(CONFIG, era=3)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
    before, config = copy.deepcopy(weights), dict(CONFIG)
    _, renamed = convert_state_dict(weights, config)
    assert renamed["embedding.weight"].dtype == torch.bfloat16
    assert config == CONFIG
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("x0_lambdas"), "have resid_lambdas and lack x0_lambdas: they belong together"),
        (lambda w: w.pop("backout_lambda"), "lack backout_lambda"),
        (lambda w: w.pop("value_embeds.1.weight"), "lack value_embeds.1.weight"),
        (lambda w: w.pop("transformer.h.2.attn.c_q.weight"), r"the weights lack transformer\.h\.2\.attn\.c_q\.weight"),
        (lambda w: w.pop("transformer.wte.weight"), "the weights lack transformer.wte.weight"),
        (lambda w: w.update(engram=torch.ones(1)), "nothing is known of engram"),
        (lambda w: w.update({"transformer.h.4.attn.c_q.weight": torch.ones(1)}), "nothing is known of transformer.h.4"),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(64, 32)}),
            r"lm_head.weight is \(64, 32\) and must be \(128, 32\)",
        ),
        (lambda w: w.update(smear_lambda=torch.ones(())), r"smear_lambda is \(\) and must be \(1,\)"),
        (lambda w: w.update(smear_lambda=[1.0]), "smear_lambda is list; the weights of a model are dense"),
        (lambda w: w.update(smear_lambda=torch.ones(1).int()), "smear_lambda is torch.int32"),
        (lambda w: w.update(smear_lambda=torch.ones(1).to_sparse()), "dense floating-point"),
        (
            lambda w: w.update({f"transformer.h.{n}.attn.ve_gate.weight": torch.ones(2, 32) for n in (1, 3)}),
            r"ve_gate\.weight is \(2, 32\) and must be \(2, 12\)",
        ),
        (lambda w: [w.pop(n) for n in ("resid_lambdas", "x0_lambdas")], "no version of nanochat wrote these parts"),
        (lambda w: w.clear(), "without any"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Change, message: str) -> None:
    weights: dict[str, Any] = random_weights(CONFIG, era=3)
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(weights, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("n_kv_head"), "model_config lacks n_kv_head"),
        (lambda c: c.update(n_experts=8), "model_config has n_experts, which nanochat does not"),
        (lambda c: c.update(n_layer=True), "n_layer=True; it must be a positive integer"),
        (lambda c: c.update(n_layer="4"), "n_layer='4'"),
        (lambda c: c.update(n_embd=32.0), "n_embd=32.0"),
        (lambda c: c.update(n_head=0), "n_head=0"),
        (lambda c: c.update(n_layer=10**12), "n_layer=1000000000000; at most 1,000"),
        (lambda c: c.update(sequence_len=2**30), "sequence_len=1073741824; at most 1,048,576"),
        (lambda c: c.update(n_embd=2**40, n_head=1, n_kv_head=1), "cannot be built: GPTConfig.dim="),
        (lambda c: c.update(vocab_size=2**40), "cannot be built: GPTConfig.vocab_size="),
        (lambda c: c.update(n_embd=2**18), "weights and model_config do not fit"),
        (lambda c: c.update(n_kv_head=3), "not divisible by num_kv_heads=3"),
        (lambda c: c.update(window_pattern="SXL"), "window_pattern='SXL'; it must be a text of the letters S and L"),
        (lambda c: c.update(window_pattern=""), "letters S and L"),
        (lambda c: c.update(window_pattern=["S"]), "letters S and L"),
    ],
)
def test_configs_that_cannot_be_are_refused(change: Change, message: str) -> None:
    config: dict[str, Any] = dict(CONFIG)
    change(config)
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(random_weights(CONFIG, era=3), config)


def test_a_config_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(CheckpointError, match="model_config is a list"):
        convert_state_dict(random_weights(CONFIG, era=3), [])  # type: ignore[arg-type]


def test_other_constants_are_refused() -> None:
    weights = random_weights(CONFIG, era=3)
    with pytest.raises(ConfigError, match="dim cannot be given; rope_base, qk_scale"):
        convert_state_dict(weights, CONFIG, dim=3)
    with pytest.raises(ConfigError, match="rope_base=-1"):
        convert_state_dict(weights, CONFIG, rope_base=-1)
