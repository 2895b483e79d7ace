"""What a user is likely to give by mistake is refused by name, where it is given, by an error of the library."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig, scaling, schedules
from tinygpt.data import (
    BatchLoader,
    Mixture,
    Packer,
    TextDocuments,
    TextFiles,
    ValidationSet,
    hash_split,
    open_source,
    tokenize_documents,
)
from tinygpt.errors import ConfigError, DataError
from tinygpt.evals import evaluate_bpb
from tinygpt.layers import (
    CausalSelfAttention,
    LayerCache,
    Linear,
    LMHead,
    RMSNorm,
    RotaryEmbedding,
    Smear,
    TokenEmbedding,
    ValueEmbedding,
    causal_attention,
)
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups
from tinygpt.tokenizer import BPETokenizer, ByteTokenizer, train_bpe
from tinygpt.trainer import Phase, every

TOKENIZER = ByteTokenizer()
SOURCE = TextDocuments(["one document", "another"])
CONFIG = GPTConfig.from_depth(1, head_dim=8, width_per_layer=8, vocab_size=257, max_seq_len=16)


def _loader(**changes: Any) -> BatchLoader:
    return BatchLoader(SOURCE, TOKENIZER, **{"rows": 1, "seq_len": 8, **changes})


def _wsd(**changes: Any) -> schedules.Schedule:
    return schedules.warmup_stable_decay(**{"total_steps": 10, "decay_fraction": 0.5, **changes})


# A call that takes one argument by name, and the names of whole numbers and of any numbers that it must refuse.
WHOLE: list[tuple[Callable[..., Any], str]] = [
    *((_loader, name) for name in ("rows", "seq_len", "buffer_documents", "shuffle_documents", "rank", "world_size")),
    *((_loader, name) for name in ("num_workers", "prefetch", "seed")),
    (lambda seq_len: ValidationSet.from_source(SOURCE, TOKENIZER, rows=1, seq_len=seq_len), "seq_len"),
    (lambda max_tokens: ValidationSet.from_source(SOURCE, TOKENIZER, rows=1, seq_len=8, max_tokens=max_tokens),
     "max_tokens"),
    (lambda row_tokens: Packer(row_tokens=row_tokens, bos_token_id=256), "row_tokens"),
    (lambda shard_tokens: tokenize_documents(SOURCE, TOKENIZER, "unused", shard_tokens=shard_tokens), "shard_tokens"),
    (lambda max_document_bytes: TextFiles(__file__, max_document_bytes=max_document_bytes), "max_document_bytes"),
    (lambda vocab_size: train_bpe(SOURCE, vocab_size=vocab_size), "vocab_size"),
    (GPTConfig.from_depth, "depth"),
    (scaling.from_depth, "depth"),
    (lambda in_features: Linear(in_features, 8), "in_features"),
    (RMSNorm, "dim"),
    (Smear, "dim"),
    (lambda embedding_dim: TokenEmbedding(8, embedding_dim), "embedding_dim"),
    (lambda num_embeddings: ValueEmbedding(num_embeddings, 8), "num_embeddings"),
    (lambda dim: CausalSelfAttention(dim, 2), "dim"),
    (lambda num_heads: CausalSelfAttention(8, num_heads), "num_heads"),
    (lambda window_tokens: CausalSelfAttention(8, 2, window_tokens=window_tokens), "window_tokens"),
    (lambda vocab_size: LMHead(8, vocab_size), "vocab_size"),
    (lambda max_seq_len: RotaryEmbedding(8, max_seq_len), "max_seq_len"),
    (lambda batch: LayerCache(batch, 1, 8, 4), "batch"),
    (lambda num_steps: every(num_steps, print), "num_steps"),
]  # fmt: skip
REAL: list[tuple[Callable[..., Any], str]] = [
    (schedules.constant, "value"),
    (schedules.linear_warmup, "warmup_steps"),
    (schedules.cosine, "total_steps"),
    (schedules.cosine_weight_decay, "total_steps"),
    (schedules.muon_momentum, "total_steps"),
    *((_wsd, name) for name in ("total_steps", "warmup_steps", "final", "decay_fraction")),
    (lambda step: schedules.cosine(5)(step), "step"),
    (scaling.lr_factor, "batch_tokens"),
    (lambda tokens_per_parameter: scaling.from_depth(2, tokens_per_parameter=tokens_per_parameter),
     "tokens_per_parameter"),
    (lambda validation_fraction: hash_split(SOURCE, validation_fraction=validation_fraction), "validation_fraction"),
    (lambda matrix_lr: nanochat_rules(model_dim=8, matrix_lr=matrix_lr), "matrix_lr"),
    (lambda base: RotaryEmbedding(8, 8, base=base), "base"),
]  # fmt: skip


@pytest.mark.parametrize("value", ["8", 2.5, math.nan, [8], True])
@pytest.mark.parametrize(("call", "name"), WHOLE, ids=lambda each: each if isinstance(each, str) else "")
def test_what_is_no_whole_number_is_refused_by_name(call: Callable[..., Any], name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* not a whole number; give an int"):
        call(**{name: value})


@pytest.mark.parametrize("value", ["8", [8], True])
@pytest.mark.parametrize(("call", "name"), REAL, ids=lambda each: each if isinstance(each, str) else "")
def test_what_is_no_number_is_refused_by_name(call: Callable[..., Any], name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* not a number; give a float"):
        call(**{name: value})


def test_numbers_of_numpy_are_numbers() -> None:
    assert next(_loader(rows=np.int64(2))).inputs.shape == (2, 8)
    assert schedules.linear_warmup(np.int64(4), peak=np.float32(2.0))(0) == 0.5


def test_a_run_of_no_finite_length_is_refused() -> None:
    for length in (math.nan, math.inf):
        for build in (schedules.linear_warmup, schedules.cosine_weight_decay, schedules.muon_momentum):
            with pytest.raises(ConfigError, match="must be at least 1"):
                build(length)
        with pytest.raises(ConfigError, match="must be positive"):
            scaling.lr_factor(length)


@pytest.mark.parametrize("part", [schedules.constant(), (5, 1.0), 3, "ab"])
def test_join_refuses_what_is_no_step_with_a_schedule(part: Any) -> None:
    with pytest.raises(ConfigError, match="a part is a pair of its first step and a schedule"):
        schedules.join((0, schedules.constant()), part)


def test_token_ids_and_targets_that_are_no_tensors_are_refused() -> None:
    model = GPT.from_config(CONFIG)
    with pytest.raises(ConfigError, match=r"token ids are a list, not a tensor.*torch\.tensor\(\[ids\]\)"):
        model([[1, 2, 3]])
    with pytest.raises(ConfigError, match=r"a loss needs two tensors.*got Tensor and list"):
        model.loss(torch.zeros(1, 2, dtype=torch.int64), [[1, 2]])  # type: ignore[arg-type]


def test_sizes_of_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 heads of dim=16 have 8 channels; rope turns 4"):
        CausalSelfAttention(16, 2, rope=RotaryEmbedding(4, 8))
    for build in (TokenEmbedding, ValueEmbedding):
        for sizes in ((0, 8), (8, 0), (-1, 8)):
            with pytest.raises(ConfigError, match="a table needs positive sizes"):
                build(*sizes)


def test_a_cache_of_another_depth_is_refused() -> None:
    model, deeper = GPT.from_config(CONFIG), GPT.from_config(CONFIG.replace(num_layers=2))
    with pytest.raises(ConfigError, match="got a cache of 2 layers for 1 blocks; make it with new_cache"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=deeper.new_cache(1))


@pytest.mark.parametrize("part", ["mlp", "attention", "block"])
def test_a_part_that_is_named_instead_of_built_is_refused(part: str) -> None:
    with pytest.raises(ConfigError, match=rf"{part}='swiglu' builds no part; give a function of \(config, layer\)"):
        GPT.from_config(CONFIG, **{part: "swiglu"})  # type: ignore[arg-type]


def test_attention_without_an_axis_of_heads_is_refused() -> None:
    x = torch.randn(2, 4, 8)
    with pytest.raises(ConfigError, match=r"takes \(batch, heads, seq, head_dim\) three times, got \(2, 4, 8\)"):
        causal_attention(x, x, x)


def test_an_optimizer_made_of_parameters_instead_of_the_model_is_refused() -> None:
    model = GPT.from_config(CONFIG)
    for build in (MuonAdamW.for_model, lambda given: param_groups(given, nanochat_rules(model_dim=8))):
        with pytest.raises(ConfigError, match="model is a generator, not a module; give the model itself"):
            build(model.parameters())


def test_bits_per_byte_of_anything_but_a_validation_set_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"measured on a ValidationSet, not on a BatchLoader; make one with"):
        evaluate_bpb(GPT.from_config(CONFIG), _loader())  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [[SOURCE], {"a": SOURCE}, {"a": (SOURCE,)}, {"a": (1.0, SOURCE)}])
def test_a_mixture_of_anything_but_sources_with_weights_is_refused(parts: Any) -> None:
    with pytest.raises(ConfigError, match=r"give a source and its weight by name, such as \{'prose': \(source, 0.8\)"):
        Mixture(parts)


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="the weight of 'a'='1' is a str, not a number"):
        Mixture({"a": (SOURCE, "1")})  # type: ignore[dict-item]


def test_a_text_given_for_a_path_is_refused() -> None:
    with pytest.raises(DataError, match=r"is no path: .*wrap texts in TextDocuments"):
        open_source("once upon a time " * 1000)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BPETokenizer({bytes([byte]): byte for byte in range(256)})])
def test_one_text_given_for_many_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="would be read letter by letter; give a list"):
        tokenizer.encode_batch("one text")


@pytest.mark.parametrize("pattern", ["", "a*", "(?=h)"])
def test_a_split_pattern_that_can_match_nothing_is_refused(pattern: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="can match nothing at all"):
        train_bpe(SOURCE, vocab_size=265, pattern=pattern)


def test_a_split_pattern_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="pattern=None is no regular expression"):
        train_bpe(SOURCE, vocab_size=265, pattern=None)  # type: ignore[arg-type]


def _trainer(**changes: Any) -> Trainer:
    model = GPT.from_config(CONFIG)
    return Trainer(model, MuonAdamW.for_model(model), _loader(overflow="carry"), TrainerConfig(num_steps=1), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_fn": 3}, "loss_fn is a int, which cannot be called"),
        ({"on_save": "publish"}, "on_save is a str, which cannot be called"),
        ({"tokenizer": "gpt2"}, "tokenizer is 'gpt2'; give a tokenizer such as"),
        ({"schedules": schedules.constant()}, "schedules is a _DescribedSchedule; give a dict by option"),
    ],
)
def test_a_trainer_refuses_what_it_could_only_stumble_over_later(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _trainer(**changes)


@pytest.mark.parametrize("value", ["0.1", None])
def test_a_schedule_that_gives_no_number_is_refused_at_its_step(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"schedules\['lr'\]\(0\)=.* not a number"):
        next(iter(_trainer(schedules={"lr": lambda step: value})))


@pytest.mark.parametrize("hooks", [None, 3, "hook", [None]])
def test_hooks_that_cannot_be_called_are_refused_before_the_first_step(hooks: Any) -> None:
    trainer = _trainer()
    with pytest.raises(ConfigError, match=r"hooks is .*; give a function of \(trainer, step\)"):
        trainer.fit(hooks, progress=False)
    assert trainer.next_step == 0


def test_a_name_given_for_a_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a phase has a str as loader"):
        Phase(1, loader="corpus")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="every calls a function, not a int"):
        every(5, 3)  # type: ignore[arg-type]
