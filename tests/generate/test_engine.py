"""The engine against the plain forward pass over whole texts, and against itself with one text at a time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError, NonFiniteError
from tinygpt.generate import Completion, Engine, GenerationConfig, TokenEvent, generate, generate_batch
from tinygpt.tokenizer import ByteTokenizer

VOCAB = 40
CONTEXT = 32


def make_model(**fields: Any) -> GPT:
    torch.manual_seed(0)
    settings = {"num_layers": 3, "dim": 32, "num_heads": 4, "vocab_size": VOCAB, "max_seq_len": CONTEXT, **fields}
    model = GPT.from_config(GPTConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 0.01:  # zero or nearly so at the start: make everything matter
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model(num_kv_heads=2, window_pattern="SL", short_window_tokens=5)


@pytest.fixture(scope="module")
def talker() -> GPT:
    """A model over bytes, whose texts may be looked at as text."""
    return make_model(vocab_size=257, max_seq_len=64)


def texts_of(engine: Engine) -> dict[tuple[int, int], list[TokenEvent]]:
    events: dict[tuple[int, int], list[TokenEvent]] = {}
    for event in engine.run():
        events.setdefault((event.request_id, event.sample), []).append(event)
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


@torch.no_grad()
def assert_logits_of_a_full_forward(model: GPT, prompt: list[int], events: list[TokenEvent]) -> None:
    """Compare all log-probabilities at every step; the engine was asked for the whole vocabulary."""
    tokens = tokens_of(events)
    logits = model(torch.tensor([(prompt + tokens)[:-1]]))[0, len(prompt) - 1 :].log_softmax(-1)
    for expected, event in zip(logits, events, strict=True):
        assert event.logprobs is not None
        found = torch.empty(VOCAB)
        for token, value in event.logprobs.top:
            found[token] = value
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert event.logprobs.logprob == pytest.approx(float(expected[event.token_id]), abs=1e-4)


MODELS = {
    "all": {},
    "gqa": {"num_kv_heads": 2, "window_pattern": "SSL", "short_window_tokens": 4},
    "short windows": {"window_pattern": "S", "short_window_tokens": 1},
    "plain": {"smear": False, "backout": False, "value_embeddings": False, "residual_scales": False},
    "no positions": {"rotary": False, "qk_norm": False, "num_kv_heads": 1, "norm_weight": True, "soft_cap": None},
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
@settings(max_examples=5)
@given(data=st.data())
def test_every_step_has_the_logits_of_a_full_forward_pass(fields: dict[str, Any], data: st.DataObject) -> None:
    """Requests of any length come at any time, for any number of samples, and share any number of slots."""
    model = make_model(**fields)
    engine = Engine(model, num_slots=data.draw(st.integers(2, 5)))
    prompts: dict[int, list[int]] = {}
    events: dict[tuple[int, int], list[TokenEvent]] = {}
    for _ in range(data.draw(st.integers(1, 6))):
        prompt = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20))
        options = {"temperature": data.draw(st.sampled_from([0.0, 1.0])), "seed": data.draw(st.integers(0, 99))}
        config = GenerationConfig(max_new_tokens=data.draw(st.integers(1, 12)), logprobs=VOCAB, **options)
        prompts[engine.add(prompt, config, num_samples=data.draw(st.integers(1, 2)))] = prompt
        for _ in range(data.draw(st.integers(0, 6))):
            for event in engine.step():
                events.setdefault((event.request_id, event.sample), []).append(event)
    for key, rest in texts_of(engine).items():
        events.setdefault(key, []).extend(rest)
    for (request_id, _), found in events.items():
        assert found[-1].finish_reason == "length"
        assert_logits_of_a_full_forward(model, prompts[request_id], found)


def test_a_ring_holds_through_many_turns(model: GPT) -> None:
    engine = Engine(model, num_slots=2)
    engine.add([1], GenerationConfig(max_new_tokens=CONTEXT - 1, seed=0, logprobs=VOCAB))
    engine.add([1, 2, 3, 4, 5, 6, 7, 8, 9], GenerationConfig(max_new_tokens=CONTEXT - 9, seed=1, logprobs=VOCAB))
    for (request_id, _), events in texts_of(engine).items():
        prompt = [1] if request_id == 0 else [1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert len(events) == CONTEXT - len(prompt)
        assert_logits_of_a_full_forward(model, prompt, events)


@settings(max_examples=15)
@given(data=st.data())
def test_a_text_does_not_depend_on_its_neighbours(model: GPT, data: st.DataObject) -> None:
    engine = Engine(model, num_slots=4)
    requests = {}
    for _ in range(data.draw(st.integers(2, 8))):
        prompt = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9))
        config = GenerationConfig(
            max_new_tokens=data.draw(st.integers(1, 15)),
            temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
            top_k=data.draw(st.none() | st.integers(2, 30)),
            top_p=data.draw(st.none() | st.just(0.9)),
            min_p=data.draw(st.none() | st.just(0.05)),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
            seed=data.draw(st.integers(0, 999)),
        )
        requests[engine.add(prompt, config)] = (prompt, config)
    for (request_id, _), events in texts_of(engine).items():
        prompt, config = requests[request_id]
        assert tokens_of(events) == generate(model, prompt, **config.model_dump())


def test_samples_read_their_prompt_once_and_are_those_of_the_following_seeds(model: GPT) -> None:
    read = []
    handle = model.embedding.register_forward_pre_hook(lambda _, ids: read.append(tuple(ids[0].shape)))
    engine = Engine(model, num_slots=3)
    engine.add([1, 2, 3, 4, 5, 6, 7], GenerationConfig(max_new_tokens=6, seed=20), num_samples=3)
    texts = texts_of(engine)
    handle.remove()
    assert read == [(1, 7), *[(3, 1)] * 5]
    for sample in range(3):
        alone = generate(model, [1, 2, 3, 4, 5, 6, 7], max_new_tokens=6, seed=20 + sample)
        assert tokens_of(texts[0, sample]) == alone
    assert len({tuple(tokens_of(events)) for events in texts.values()}) == 3


def test_slots_are_taken_in_order_and_used_again(model: GPT) -> None:
    engine = Engine(model, num_slots=2)
    for length in (2, 5, 1, 3):
        engine.add([7], GenerationConfig(max_new_tokens=length, seed=length))
    lasted = []
    while engine.has_work:
        assert engine.num_active <= 2
        lasted.append({event.request_id for event in engine.step()})
    # The third takes the place of the first in the step in which that ends, is done at once, and lets the fourth in.
    assert lasted == [{0, 1}, {0, 1, 2, 3}, {1, 3}, {1, 3}, {1}]
    assert (engine.num_active, engine.num_waiting) == (0, 0)


def test_a_request_for_many_samples_is_not_passed_by(model: GPT) -> None:
    engine = Engine(model, num_slots=2)
    engine.add([1], GenerationConfig(max_new_tokens=3, seed=0))
    many = engine.add([2], GenerationConfig(max_new_tokens=1, seed=0), num_samples=2)
    engine.add([3], GenerationConfig(max_new_tokens=1, seed=0))
    order = [event.request_id for event in engine.run() if event.finish_reason]
    assert order == [0, many, many, 2]


def test_cancelling_frees_slots_and_leaves_the_others_alone(model: GPT) -> None:
    engine = Engine(model, num_slots=3)
    options = {"max_new_tokens": 12, "repetition_penalty": 1.2}
    ids = [engine.add([number + 1], GenerationConfig(seed=number, **options)) for number in range(4)]
    collected: dict[int, list[int]] = {number: [] for number in ids}

    def advance() -> None:
        for event in engine.step():
            if event.token_id is not None:
                collected[event.request_id].append(event.token_id)

    advance()
    advance()
    assert engine.cancel(ids[0])
    assert engine.cancel(ids[3])  # still waiting
    assert (engine.num_active, engine.num_waiting) == (2, 0)
    assert not engine.cancel(ids[0])
    while engine.has_work:
        advance()
    for number in (1, 2):
        assert collected[ids[number]] == generate(model, [number + 1], seed=number, **options)
    assert len(collected[ids[0]]) == 2
    assert collected[ids[3]] == []


def test_memory_is_known_before_and_respects_windows(model: GPT) -> None:
    engine = Engine(model, num_slots=4, max_seq_len=20)
    head_dim, kv_heads = 8, 2
    positions = 6 + 20 + 20  # a window of 5 and itself; the last layer and every L keep all
    assert engine.cache_bytes == 2 * 4 * 4 * kv_heads * head_dim * positions


@pytest.mark.parametrize("use_cache", [True, False])
def test_stop_tokens_end_one_row_and_are_left_out(model: GPT, use_cache: bool) -> None:
    whole = generate(model, [3], max_new_tokens=20, seed=4)
    stop = whole[6]
    engine = Engine(model, num_slots=2, use_cache=use_cache)
    engine.add([3], GenerationConfig(max_new_tokens=20, seed=4, stop_tokens=[stop]))
    engine.add([3], GenerationConfig(max_new_tokens=20, seed=4))
    texts = texts_of(engine)
    assert tokens_of(texts[0, 0]) == whole[: whole.index(stop)]
    assert (texts[0, 0][-1].finish_reason, texts[0, 0][-1].token_id) == ("stop", None)
    assert tokens_of(texts[1, 0]) == whole


def complete(model: GPT, prompt: str | list[int], **options: Any) -> Completion:
    engine = Engine(model, tokenizer=ByteTokenizer(), num_slots=2)
    return generate_batch(engine, [prompt], GenerationConfig(**options))[0][0]


def test_text_is_that_of_the_tokens_and_stops_before_a_string_over_several_tokens(talker: GPT) -> None:
    whole = complete(talker, "Hello", max_new_tokens=50, seed=5, stop_tokens=[])
    assert whole.text == ByteTokenizer().decode(whole.token_ids)
    assert (len(whole.token_ids), whole.finish_reason) == (50, "length")
    stop = whole.text[7:10]
    cut = complete(talker, "Hello", max_new_tokens=50, seed=5, stop_tokens=[], stop_strings=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert ByteTokenizer().decode(cut.token_ids).endswith(stop)


def test_a_new_document_ends_a_text_unless_told_otherwise(talker: GPT) -> None:
    loud = make_model(vocab_size=257, soft_cap=None)
    with torch.no_grad():
        loud.head.weight[256] = 0
        loud.head.weight[256, :] += 100 * loud.hidden_states(torch.tensor([[256, 65]]))[0, -1]
    assert complete(loud, "A", max_new_tokens=5, temperature=0) == Completion([], "", "stop", None)
    assert complete(loud, "A", max_new_tokens=1, temperature=0, stop_tokens=()).token_ids == [256]


def test_only_ids_of_the_tokenizer_are_drawn() -> None:
    wide = make_model(vocab_size=300)
    done = complete(wide, "A", max_new_tokens=25, seed=0, temperature=50.0, stop_tokens=[])
    assert max(done.token_ids) <= 256


def test_logprobs_come_only_where_asked_for(model: GPT) -> None:
    engine = Engine(model, num_slots=3)
    for logprobs in (None, 0, 2):
        engine.add([5], GenerationConfig(max_new_tokens=3, seed=0, logprobs=logprobs, temperature=0.2, top_k=2))
    texts = texts_of(engine)
    assert all(event.logprobs is None for event in texts[0, 0])
    assert all(event.logprobs is not None and event.logprobs.top == () for event in texts[1, 0])
    assert all(event.logprobs is not None and len(event.logprobs.top) == 2 for event in texts[2, 0])
    assert tokens_of(texts[0, 0]) == tokens_of(texts[2, 0])


def test_a_repetition_penalty_counts_prompt_and_text(model: GPT) -> None:
    prompt, text = [1, 2, 3], generate(model, [1, 2, 3], max_new_tokens=12, temperature=0, repetition_penalty=1.5)
    for index, token in enumerate(text):
        read = prompt + text[:index]
        with torch.no_grad():
            logits = model(torch.tensor([read]))[0, -1]
        for seen in set(read):
            logits[seen] = logits[seen] / 1.5 if logits[seen] > 0 else logits[seen] * 1.5
        assert token == int(logits.argmax())


@pytest.mark.parametrize("length", [4, 20, 32, 90])
def test_sliding_writes_what_the_kept_tokens_give(model: GPT, length: int) -> None:
    prompt = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    engine = Engine(model, num_slots=2)
    engine.add([9], GenerationConfig(max_new_tokens=3))  # someone else is there for a while
    engine.add(prompt, GenerationConfig(max_new_tokens=60, temperature=0, logprobs=VOCAB, overflow="slide"))
    events = texts_of(engine)[1, 0]
    assert len(events) == 60

    def keep(tokens: list[int], left: int) -> list[int]:
        count = max(CONTEXT // 2, CONTEXT - left)
        return [tokens[0], *tokens[-(count - 1) :]]

    read = prompt if length <= CONTEXT else keep(prompt, 60)
    whole = list(prompt)
    for index, event in enumerate(events):
        assert_logits_of_a_full_forward(model, read, [event])
        whole.append(event.token_id)
        read = [*read, event.token_id] if len(read) < CONTEXT else keep(whole, 59 - index)


def test_nothing_asked_for_is_a_text_without_tokens(model: GPT) -> None:
    engine = Engine(model)
    engine.add([1], GenerationConfig(max_new_tokens=0), num_samples=2)
    assert [(event.token_id, event.finish_reason) for event in engine.step()] == [(None, "length")] * 2
    assert not engine.has_work


def test_batches_come_back_in_order_whatever_their_length(model: GPT) -> None:
    prompts = [[1], [2, 3], [4, 5, 6], [7], [8, 9]]
    config = GenerationConfig(max_new_tokens=5, seed=3)
    done = generate_batch(Engine(model, num_slots=2), prompts, config, num_samples=2)
    for prompt, texts in zip(prompts, done, strict=True):
        expected = [generate(model, prompt, max_new_tokens=5, seed=3 + sample) for sample in range(2)]
        assert [text.token_ids for text in texts] == expected


def test_without_a_seed_texts_differ_and_follow_the_global_randomness(model: GPT) -> None:
    torch.manual_seed(1)
    first, second = (generate(model, [1], max_new_tokens=20) for _ in range(2))
    assert first != second
    torch.manual_seed(1)
    assert generate(model, [1], max_new_tokens=20) == first


@pytest.mark.filterwarnings("ignore")  # the compiler looks at attributes that warn when looked at
def test_a_compiled_step_is_compiled_once_and_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = make_model(num_layers=2, window_pattern="S", short_window_tokens=5)
    counter, compile_ = CompileCounter(), torch.compile
    # Traced as on a GPU, at its fixed shape; only the making of kernels, most of a minute on a CPU, is left out.
    monkeypatch.setattr(torch, "compile", lambda step, **options: compile_(step, backend=counter, **options))
    compiled, plain = Engine(model, num_slots=3, compile=True), Engine(model, num_slots=3)
    for engine in (compiled, plain):
        for number, length in enumerate([4, 9, 6, 12]):
            engine.add([1, 2, 3, 4][: number + 1], GenerationConfig(max_new_tokens=length, seed=number))
    assert {key: tokens_of(e) for key, e in texts_of(compiled).items()} == {
        key: tokens_of(e) for key, e in texts_of(plain).items()
    }
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_broken_model_is_said_and_what_waits_can_go_on() -> None:
    broken = make_model()
    weight = broken.head.weight.detach().clone()
    engine = Engine(broken, num_slots=1)
    engine.add([1], GenerationConfig(max_new_tokens=3))
    second = engine.add([2, 3], GenerationConfig(max_new_tokens=3, seed=0))
    engine.step()
    torch.nn.init.constant_(broken.head.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        engine.step()
    broken.head.weight.data.copy_(weight)
    assert (engine.num_active, engine.num_waiting) == (0, 1)
    assert tokens_of(texts_of(engine)[second, 0]) == generate(broken, [2, 3], max_new_tokens=3, seed=0)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, VOCAB], {}, "token id 40 of the prompt lies outside the vocabulary of 40"),
        ([1, -2], {}, "token id -2 of the prompt"),
        ([1.5], {}, "a prompt is a sequence of token ids"),
        (7, {}, "a prompt is a sequence of token ids"),
        ("text", {}, "an Engine with a tokenizer"),
        ([1], {"max_new_tokens": 32}, "exceed the model's context of 32; ask for at most 31"),
        ([1], {"stop_strings": ["a"]}, "stop_strings need an engine with a tokenizer"),
    ],
)
def test_requests_that_cannot_work_are_refused(model: GPT, prompt: Any, options: dict[str, Any], message: str) -> None:
    engine = Engine(model)
    with pytest.raises(ConfigError, match=message):
        engine.add(prompt, GenerationConfig(**{"max_new_tokens": 4, **options}))
    assert not engine.has_work


def test_engines_that_cannot_work_are_refused(model: GPT) -> None:
    with pytest.raises(ConfigError, match="num_slots=0"):
        Engine(model, num_slots=0)
    with pytest.raises(ConfigError, match="length of 1 to 32; got num_slots=8 and max_seq_len=33"):
        Engine(model, max_seq_len=33)
    with pytest.raises(ConfigError, match="compile=True needs the cache"):
        Engine(model, compile=True, use_cache=False)
    with pytest.raises(ConfigError, match="the tokenizer has 257 ids, more than the model's vocab_size=40"):
        Engine(model, tokenizer=ByteTokenizer())
    with pytest.raises(ConfigError, match="num_samples=9 must lie between 1 and the engine's 8 slots"):
        Engine(model).add([1], num_samples=9)
    with pytest.raises(ConfigError, match="options of a request are a GenerationConfig"):
        Engine(model).add([1], {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a context of 3 is too short to slide in"):
        Engine(model, max_seq_len=3).add([1], GenerationConfig(max_new_tokens=9, overflow="slide"))
    parts = GPT(embedding=model.embedding, blocks=list(model.blocks), head=model.head)
    with pytest.raises(ConfigError, match="give the engine the max_seq_len"):
        Engine(parts)
