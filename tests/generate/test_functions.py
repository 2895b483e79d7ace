import pytest
import torch

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError, NonFiniteError
from tinygpt.generate import Engine, GenerationConfig, generate, sample_token, stream_text, stream_tokens
from tinygpt.layers import CausalSelfAttention, causal_attention
from tinygpt.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig.from_depth(3, head_dim=32, width_per_layer=16, vocab_size=257, max_seq_len=48)
    model = GPT.from_config(config.replace(window_pattern="SL", short_window_tokens=6))
    for parameter in model.parameters():
        if parameter.detach().abs().max() < 0.01:  # zero or nearly so at the start: make everything matter
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 1}, {"seed": 2, "top_k": 9, "top_p": 0.8}])
def test_cached_text_equals_text_without_cache(model: GPT, options: dict[str, float]) -> None:
    prompt = [256, 72, 101, 108]
    cached = generate(model, prompt, max_new_tokens=40, **options)
    assert cached == generate(model, prompt, max_new_tokens=40, use_cache=False, **options)
    assert len(cached) == 40


def test_a_seed_repeats_and_leaves_the_global_randomness_alone(model: GPT) -> None:
    before = torch.get_rng_state()
    first = generate(model, [256], max_new_tokens=20, seed=7)
    assert first == generate(model, [256], max_new_tokens=20, seed=7)
    assert first != generate(model, [256], max_new_tokens=20, seed=8)
    assert torch.equal(before, torch.get_rng_state())


def test_stop_tokens_end_the_text_and_are_left_out(model: GPT) -> None:
    whole = generate(model, [256], max_new_tokens=20, seed=7)
    stop = whole[8]
    assert generate(model, [256], max_new_tokens=20, seed=7, stop_tokens=[stop]) == whole[: whole.index(stop)]


def test_tokens_come_one_by_one_and_the_mode_is_put_back(model: GPT) -> None:
    model.train()
    modes = []
    handle = model.blocks[0].register_forward_pre_hook(lambda block, _: modes.append(block.training))
    first = next(stream_tokens(model, [256], max_new_tokens=5, seed=0))
    handle.remove()
    assert modes == [False]
    assert model.training
    assert model.blocks[0].training
    model.eval()
    assert first == generate(model, [256], max_new_tokens=1, seed=0)[0]


def test_an_attention_of_ones_own_that_only_appends_writes_a_text(model: GPT) -> None:
    """The contract of a cache before there were rows of different lengths; one text at a time still keeps it."""

    class Own(CausalSelfAttention):
        def forward(self, x, *, token_ids=None, cache=None):  # type: ignore[no-untyped-def]
            q, k, v = (
                proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for proj in (self.q_proj, self.k_proj, self.v_proj)
            )
            assert cache is None or cache.position == cache.length
            k, v = (k, v) if cache is None else cache.append(k, v)
            y = causal_attention(q, k, v, window_tokens=self.window_tokens)
            return self.o_proj(y.transpose(1, 2).flatten(2))

    assert model.config is not None
    torch.manual_seed(0)
    own = GPT.from_config(
        model.config,
        attention=lambda config, layer: Own(config.dim, config.num_heads, window_tokens=config.window_tokens(layer)),
    )
    for parameter in own.parameters():
        if parameter.detach().abs().max() < 0.01:
            torch.nn.init.normal_(parameter, std=0.3)
    options = {"max_new_tokens": 30, "seed": 0}
    assert generate(own, [256, 7, 8], **options) == generate(own, [256, 7, 8], use_cache=False, **options)
    engine = Engine(own, num_slots=2)
    for prompt in ([1], [2, 3]):
        engine.add(prompt, GenerationConfig(max_new_tokens=3))
    with pytest.raises(ConfigError, match="rows of this cache hold different numbers of positions"):
        list(engine.run())


def test_streamed_text_never_splits_a_character() -> None:
    text = "naïve — 😀"
    ids = [*text.encode(), 256]

    class Recites(torch.nn.Module):
        """A head that writes one fixed text, byte by byte."""

        position = -1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.position += 1
            return torch.nn.functional.one_hot(torch.tensor([ids[self.position]]), 257) * 1e4

    model = GPT.from_config(GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=64))
    model.head = Recites()
    pieces = list(stream_text(model, ByteTokenizer(), "Say:", max_new_tokens=50))
    assert pieces == list(text)


def test_sampling_keeps_only_what_top_k_and_top_p_allow() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(sample_token(logits, top_k=2, generator=generator).tolist()) == {1, 2}
    # Probabilities 0.032, 0.644, 0.237, 0.087: the first two reach 0.8, three are needed for 0.9.
    assert set(sample_token(logits, top_p=0.8, generator=generator).tolist()) == {1, 2}
    assert set(sample_token(logits, top_p=0.9, generator=generator).tolist()) == {1, 2, 3}
    assert set(sample_token(logits, top_p=1e-9, generator=generator).tolist()) == {1}
    assert set(sample_token(logits, temperature=1e-30, generator=generator).tolist()) == {1}


def test_sampled_shares_follow_softmax_at_the_temperature() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(40_000, 3)
    tokens = sample_token(logits, temperature=0.7, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens, minlength=3) / 40_000
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_ids": []}, "the prompt is empty"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 48}, r"exceed the model's context of 48; ask for at most 47"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_bad_options_are_refused_before_the_first_token(model: GPT, options: dict[str, object], message: str) -> None:
    arguments = {"token_ids": [256], "max_new_tokens": 4} | options
    with pytest.raises(ConfigError, match=message):
        stream_tokens(model, **arguments)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # the compiler looks at attributes that warn when looked at
def test_sampling_leaves_compiled_training_compiled() -> None:
    """Each new length would be compiled anew, until torch gives up on the block for good."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT.from_config(GPTConfig.from_depth(2, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=48))
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, dynamic=False)
    generate(model, [256], max_new_tokens=20, seed=0)
    assert counter.frame_count == 0
    ids = torch.randint(256, (2, 17))
    model.loss(ids[:, :-1], ids[:, 1:])[0].backward()
    assert counter.frame_count > 0
    torch._dynamo.reset()


def test_logits_that_are_not_finite_are_said() -> None:
    model = GPT.from_config(GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=8))
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        generate(model, [256], max_new_tokens=2)


def test_equal_logits_keep_exactly_k_tokens_and_tensors_are_prompts_too(model: GPT) -> None:
    tokens = sample_token(torch.zeros(500, 9), top_k=2, generator=torch.Generator().manual_seed(0))
    assert len(set(tokens.tolist())) == 2
    prompt = torch.tensor([256, 72])
    assert generate(model, prompt, max_new_tokens=3, seed=0) == generate(model, [256, 72], max_new_tokens=3, seed=0)


def test_text_as_token_ids_and_a_larger_tokenizer_are_refused(model: GPT) -> None:
    with pytest.raises(ConfigError, match="use stream_text"):
        generate(model, "hello", max_new_tokens=2)  # type: ignore[arg-type]
    small = GPT.from_config(GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=99, max_seq_len=8))
    with pytest.raises(ConfigError, match="the tokenizer has 257 ids, more than the model's vocab_size=99"):
        stream_text(small, ByteTokenizer(), "a", max_new_tokens=1)
