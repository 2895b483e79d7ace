"""The assembled model: causality, cache, switches, swaps, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinygpt import GPT, GPTConfig
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.layers import LMHead, RMSNorm, SwiGLU, TokenEmbedding, init_weights

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "max_seq_len": 24,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "dim": 32,
    "window_pattern": "SL",
    "short_window_tokens": 5,
}
SWITCHES = {
    "rotary": False,
    "qk_norm": False,
    "embedding_norm": False,
    "value_embeddings": False,
    "residual_scales": False,
    "x0_scales": False,
    "smear": False,
    "backout": False,
    "soft_cap": None,
    "norm_weight": True,
    "window_pattern": "L",
    "num_kv_heads": None,
    "rope_clockwise": False,
}


def tiny_model(**changes: Any) -> GPT:
    """A model whose every parameter matters: those that start at zero are drawn too."""
    torch.manual_seed(0)
    model = GPT.from_config(GPTConfig(**{**TINY, **changes}))
    for parameter in model.parameters():
        if (parameter == 0).all():
            nn.init.normal_(parameter, std=0.1)
    return model


def test_a_later_token_never_changes_an_earlier_logit() -> None:
    model = tiny_model()
    ids = torch.randint(61, (1, 24))
    logits = model(ids)
    for t in (0, 7, 23):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 61
        other = model(changed)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.allclose(other[:, t], logits[:, t])


@pytest.mark.parametrize("pieces", [[24], [1] * 24, [10, 1, 1, 12], [2, 22]])
def test_reading_with_a_cache_equals_reading_at_once(pieces: list[int]) -> None:
    model = tiny_model()
    ids = torch.randint(61, (3, 24))
    cache = model.new_cache(3)
    logits = torch.cat([model(part, cache=cache) for part in ids.split(pieces, dim=1)], dim=1)
    assert cache.length == 24
    torch.testing.assert_close(logits, model(ids), rtol=1e-4, atol=1e-5)


def test_the_eps_of_the_config_reaches_every_norm() -> None:
    model = tiny_model(norm_eps=0.25, norm_weight=True)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert {norm.eps for norm in norms} == {0.25}
    assert len(norms) == 2 + 2 * len(model.blocks)
    assert all(block.attention.norm_eps == 0.25 for block in model.blocks)  # type: ignore[union-attr]


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_feature_can_be_switched_off_alone_and_the_rest_learns(switch: str) -> None:
    assert _loss_after_training(tiny_model(**{switch: SWITCHES[switch]})) < 0.1


def test_everything_switched_off_leaves_a_plain_gpt_that_learns() -> None:
    model = tiny_model(**{**SWITCHES, "rotary": True})
    names = {name.split(".")[-2] if name.count(".") > 1 else name for name, _ in model.named_parameters()}
    assert not {"smear", "backout", "value_gate", "value_embedding"} & names
    assert not any("scale" in name for name, _ in model.named_parameters())
    assert _loss_after_training(model) < 0.1


def _loss_after_training(model: GPT) -> float:
    torch.manual_seed(1)
    ids = torch.randint(61, (2, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss = torch.tensor(0.0)
    for _ in range(60):
        total, count = model.loss(ids[:, :-1], ids[:, 1:])
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = tiny_model()
    ids = torch.randint(61, (2, 25))
    total, count = model.loss(ids[:, :-1], ids[:, 1:])
    reference = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, reference)
    torch.testing.assert_close(model.token_losses(ids[:, :-1], ids[:, 1:]).sum(), reference.detach())
    assert int(count) == 48


def test_a_swapped_mlp_is_used_counted_and_trained() -> None:
    config = GPTConfig(**TINY)
    model = GPT.from_config(config, mlp=lambda config, layer: SwiGLU(config.dim, 48 + layer))
    assert [block.mlp.up_proj.out_features for block in model.blocks] == [48, 49, 50, 51]
    standard = GPT.from_config(config)
    mlp_weights = sum(3 * 32 * (48 + layer) for layer in range(4)) - 4 * 2 * 32 * 128
    assert model.num_parameters().matrices - standard.num_parameters().matrices == mlp_weights
    assert model.flops_per_token() - standard.flops_per_token() == 6 * mlp_weights
    assert _loss_after_training(model) < 0.1


def test_a_whole_block_can_be_swapped_and_own_parts_assembled() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor, *, x0: torch.Tensor, token_ids: torch.Tensor, cache: Any = None) -> Any:
            return x + torch.tanh(self.linear(x.cumsum(1))) + 0.1 * x0

    config = GPTConfig(vocab_size=9, max_seq_len=8, num_layers=2, num_heads=2, dim=16)
    swapped = GPT.from_config(config, block=lambda config, layer: Mixer())
    own = GPT(embedding=TokenEmbedding(9, 16), blocks=[Mixer(), Mixer()], head=LMHead(16, 9))
    for model in (swapped, own):
        assert model(torch.randint(9, (2, 8))).shape == (2, 8, 9)
    with pytest.raises(ConfigError, match="block 0 has no attention with num_kv_heads"):
        swapped.new_cache(1)
    with pytest.raises(ConfigError, match="no config: give new_cache the max_seq_len"):
        own.new_cache(1)
    with pytest.raises(ConfigError, match="assembled without a config"):
        own.save_pretrained("never-written")
    with pytest.raises(ConfigError, match="no config: give flops_per_token"):
        own.flops_per_token()
    with pytest.raises(ConfigError, match="either block"):
        GPT.from_config(config, block=lambda c, i: Mixer(), mlp=lambda c, i: Mixer())
    with pytest.raises(ConfigError, match="at least one block"):
        GPT(embedding=TokenEmbedding(9, 16), blocks=[], head=LMHead(16, 9))


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("embedding", "x", "embedding is 'x', a str; each part of a model must be a torch.nn.Module"),
        ("head", None, "head is 'None', a NoneType"),
        ("blocks", [lambda x: x], "block 0 is '<function .*, a function"),
        ("final_norm", RMSNorm, "final_norm is RMSNorm, a class"),
        ("smear", 1.0, "smear is '1.0', a float"),
    ],
)
def test_a_part_that_is_no_module_is_refused(name: str, part: Any, message: str) -> None:
    parts: dict[str, Any] = {"embedding": TokenEmbedding(9, 16), "blocks": [nn.Identity()], "head": LMHead(16, 9)}
    with pytest.raises(ConfigError, match=message):
        GPT(**{**parts, name: part})


@pytest.mark.parametrize("name", ["mlp", "attention", "block"])
def test_a_factory_that_builds_no_module_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.* 0 is 'None', a NoneType; each part of a model must be"):
        GPT.from_config(GPTConfig(**TINY), **{name: lambda config, layer: None})
    with pytest.raises(ConfigError, match=rf"{name} is a SwiGLU itself.*lambda config, layer: SwiGLU\(\.\.\.\)"):
        GPT.from_config(GPTConfig(**TINY), **{name: SwiGLU(32, 64)})  # type: ignore[arg-type]


def test_building_on_meta_and_drawing_later_gives_the_same_weights() -> None:
    torch.manual_seed(5)
    direct = GPT.from_config(GPTConfig(**TINY))
    with torch.device("meta"):
        later = GPT.from_config(GPTConfig(**TINY))
    later = later.to_empty(device="cpu")
    torch.manual_seed(5)
    init_weights(later)
    for (name, a), b in zip(direct.state_dict().items(), later.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.randint(61, (1, 24))
    assert torch.equal(direct(ids), later(ids))


def test_a_new_model_predicts_almost_evenly() -> None:
    torch.manual_seed(0)
    model = GPT.from_config(GPTConfig(**TINY))
    ids = torch.randint(61, (4, 25))
    total, count = model.loss(ids[:, :-1], ids[:, 1:])
    assert float(total.detach() / count) == pytest.approx(torch.tensor(61.0).log().item(), abs=0.01)


def test_bfloat16_compute_keeps_float32_masters_and_stays_close() -> None:
    model = tiny_model()
    ids = torch.randint(61, (2, 24))
    exact = model(ids)
    model.set_compute_dtype(torch.bfloat16, embeddings=True)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.float32
    rough = model(ids)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * exact.abs().mean()
    model.loss(ids, ids)[0].backward()
    assert model.blocks[0].mlp.up_proj.weight.grad.dtype == torch.float32
    with pytest.raises(ConfigError, match=r"torch\.int8 is not a floating-point dtype"):
        model.set_compute_dtype(torch.int8)


def test_windows_end_with_a_full_layer_and_default_to_a_quarter() -> None:
    config = GPTConfig.from_depth(6, max_seq_len=2048, window_pattern="SSSL")
    assert [config.window_tokens(i) for i in range(6)] == [512, 512, 512, None, 512, None]
    assert GPTConfig(max_seq_len=256, window_pattern="S").window_tokens(0) == 128
    assert [config.has_value_embedding(i) for i in range(6)] == [False, True] * 3
    assert [GPTConfig(num_layers=3).has_value_embedding(i) for i in range(3)] == [True, False, True]


def test_from_depth_widens_with_depth() -> None:
    for depth, dim in [(1, 128), (2, 128), (3, 256), (12, 768), (20, 1280)]:
        config = GPTConfig.from_depth(depth)
        assert (config.num_layers, config.dim, config.num_heads) == (depth, dim, dim // 128)
    with pytest.raises(ConfigError, match="from_depth needs positive numbers"):
        GPTConfig.from_depth(0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 100, "num_heads": 6}, r"dim=100 is not divisible by num_heads=6"),
        ({"num_kv_heads": 4}, r"num_heads=6 is not divisible by num_kv_heads=4; choose one of 1, 2, 3, 6"),
        ({"num_layers": 0}, r"GPTConfig.num_layers=0: input should be greater than or equal to 1"),
        ({"num_layers": True}, r"GPTConfig.num_layers=True: input should be a valid integer"),
        ({"depth": 3}, r"GPTConfig has no field 'depth'; its fields are vocab_size"),
        ({"window_pattern": "SX"}, r"GPTConfig.window_pattern='SX'"),
        ({"dim": 9, "num_heads": 3}, r"rotary needs an even head width"),
    ],
)
def test_a_wrong_config_says_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**fields)
    with pytest.raises(ConfigError, match=message):
        GPTConfig().replace(**fields)


def test_wrong_token_ids_are_refused() -> None:
    model = tiny_model()
    for wrong, message in [
        (torch.zeros(4, dtype=torch.int64), r"integers of shape \(batch, seq\), got torch.int64 of \(4,\)"),
        (torch.zeros(1, 4), r"got torch.float32"),
        (torch.zeros(1, 25, dtype=torch.int64), "got 25 tokens; this model takes 1 to 24"),
        (torch.zeros(1, 0, dtype=torch.int64), "got 0 tokens"),
        (torch.full((1, 4), 61), "token id 61 lies outside the vocabulary of 61"),
        (torch.full((1, 4), -1), "token id -1 lies outside"),
    ]:
        with pytest.raises(ConfigError, match=message):
            model(wrong)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_save_and_load_give_the_same_model(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.config == model.config
    ids = torch.randint(61, (2, 24))
    if dtype is None:
        assert torch.equal(loaded(ids), model(ids))
    assert {p.dtype for p in loaded.parameters()} == {dtype or torch.float32}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_loading_keeps_mixed_storage_as_it_was_saved(tmp_path: Path) -> None:
    tiny_model().set_compute_dtype(torch.bfloat16, embeddings=True).save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.embedding.weight.dtype == torch.bfloat16
    assert loaded.head.weight.dtype == torch.float32


def test_on_a_cpu_tables_in_half_precision_do_not_make_the_model_compute_in_it(tmp_path: Path) -> None:
    tiny_model().set_compute_dtype(torch.bfloat16, embeddings=True).save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    ids = torch.randint(61, (2, 24))
    assert loaded.hidden_states(ids).dtype == torch.float32
    assert torch.equal(loaded(ids), GPT.from_pretrained(tmp_path, dtype=torch.float32)(ids))
    cache = loaded.new_cache(2)
    torch.testing.assert_close(loaded(ids, cache=cache), loaded(ids))
    assert cache.layers[0]._keys.dtype == torch.float32
    assert loaded.bfloat16().hidden_states(ids).dtype == torch.bfloat16
    assert loaded.float().set_compute_dtype(torch.bfloat16).hidden_states(ids).dtype == torch.bfloat16


def test_loading_a_swapped_model_needs_the_part_again(tmp_path: Path) -> None:
    def mlp(config: GPTConfig, layer: int) -> nn.Module:
        return SwiGLU(config.dim, 40)

    GPT.from_config(GPTConfig(**TINY), mlp=mlp).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"was saved with block 0 = .*mlp=SwiGLU\), and this model has .*ReluSquaredMLP.*parts of your own",
    ):
        GPT.from_pretrained(tmp_path)
    assert isinstance(GPT.from_pretrained(tmp_path, mlp=mlp).blocks[0].mlp, SwiGLU)


def test_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()
    fields = json.loads(good_config)
    for text, message in [
        ("{", r"config\.json is damaged"),
        (json.dumps({**fields, "model_type": "llama"}), "not the config of a tinygpt model"),
        (json.dumps({**fields, "format_version": 99}), "format version 99"),
        (json.dumps({**fields, "dim": "wide"}), "GPTConfig.dim='wide'"),
        (json.dumps({**fields, "dim": 64}), r"k_proj.weight is \(16, 32\), the model's \(32, 64\)"),
    ]:
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            GPT.from_pretrained(tmp_path)
    config.write_text(good_config)
    for content in (good_weights[:1000], b"", b"\xff" * 100):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match="missing or damaged"):
            GPT.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        GPT.from_pretrained(tmp_path)


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    model = tiny_model()
    ids = torch.randint(61, (1, 24))
    cache = model.new_cache(1)
    model(ids[:, :20], cache=cache)
    with pytest.raises(ConfigError, match="got 5 tokens for a cache with room for 4 more after 20"):
        model(ids[:, :5], cache=cache)
    torch.testing.assert_close(model(ids[:, 20:], cache=cache), model(ids)[:, 20:], rtol=1e-4, atol=1e-5)


def test_any_head_that_gives_logits_trains_and_is_measured() -> None:
    model = tiny_model()
    plain = nn.Linear(32, 61, bias=False)
    plain.weight = nn.Parameter(model.head.weight[:61].clone())
    ids = torch.randint(61, (2, 25))
    model.head.soft_cap = None
    expected = model.loss(ids[:, :-1], ids[:, 1:])[0]
    losses = model.token_losses(ids[:, :-1], ids[:, 1:])
    model.head = plain
    torch.testing.assert_close(model.loss(ids[:, :-1], ids[:, 1:])[0], expected)
    torch.testing.assert_close(model.token_losses(ids[:, :-1], ids[:, 1:]), losses)


def test_the_config_decides_the_base_of_the_rotation() -> None:
    ids = torch.randint(61, (1, 24))
    assert not torch.allclose(tiny_model(rope_base=100.0)(ids), tiny_model()(ids))


@pytest.mark.filterwarnings("ignore")  # the compiler looks at attributes that warn when looked at
def test_blocks_compiled_one_by_one_are_saved_under_their_own_names(tmp_path: Path) -> None:
    model = tiny_model()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    model.save_pretrained(tmp_path)
    ids = torch.randint(61, (1, 24))
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(ids), model(ids))


def test_absurd_sizes_are_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    for field in ("dim", "num_heads", "max_seq_len", "vocab_size", "num_layers", "hidden_dim"):
        with pytest.raises(ConfigError, match=rf"GPTConfig\.{field}=2147483648"):
            GPTConfig(**{**TINY, field: 2**31})


def test_weights_of_a_strange_dtype_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "head.weight": weights["head.weight"].to(torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"dtypes other than F32.*head\.weight.*I32"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"dtype torch\.int8 is not a floating-point dtype"):
        GPT.from_pretrained(tmp_path, dtype=torch.int8)


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch without rows"):
        tiny_model()(torch.zeros(0, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 10**9}, "num_layers=1000000000"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000"),
        ({"vocab_size": 2**24, "dim": 2**20}, r"does not fit the model|cannot be built"),
        ({"self": 1}, "has no field 'self'"),
        ({"blocks": 3}, "does not describe 4 blocks"),
        ({"blocks": ["Block()"] * 10}, "does not describe 4 blocks"),
        ({"window_pattern": "L" * 2**26}, "more than 33,554,432 are not read"),
        ({"num_layers": 100}, "does not describe 100 blocks"),
    ],
    ids=lambda value: str(value)[:40],  # one is 64 MiB long, and names of tests go from process to process
)
def test_a_config_that_asks_for_too_much_is_refused_before_memory_is_taken(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        GPT.from_pretrained(tmp_path)


def test_tables_that_no_file_bounds_are_bounded(tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=64, max_seq_len=8, num_layers=1, num_heads=1, dim=64)
    GPT.from_config(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_seq_len": 2**24}))
    with pytest.raises(CheckpointError, match=r"tables larger than any model's of its size: .*\(16777216, "):
        GPT.from_pretrained(tmp_path)


def test_a_header_that_declares_more_than_there_is_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for size in (2**63, len(content), 0):
        weights.write_bytes(size.to_bytes(8, "little") + content[8:])
        with pytest.raises(CheckpointError, match=f"declares a header of {size:,}"):
            GPT.from_pretrained(tmp_path)
