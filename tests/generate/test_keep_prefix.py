"""Going on from the text before, against reading every prompt whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError
from tinygpt.generate import Engine, GenerationConfig, TokenEvent

VOCAB = 40
CONTEXT = 48
WINDOWS = {"window_pattern": "SSL", "short_window_tokens": 4}
MODELS: dict[str, dict[str, Any]] = {
    "all": {},
    "windows": WINDOWS,
    "grouped": {"num_kv_heads": 2, **WINDOWS},
    "plain": {"smear": False, "backout": False, "value_embeddings": False, "residual_scales": False},
    "no smear, windows": {"smear": False, "num_kv_heads": 1, **WINDOWS},
}


def make_model(dtype: torch.dtype = torch.float64, **fields: Any) -> GPT:
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "dim": 32, "num_heads": 4, "vocab_size": VOCAB, "max_seq_len": CONTEXT}
    model = GPT.from_config(GPTConfig(**{**sizes, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 0.01:  # zero or nearly so at the start: make everything matter
                torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def write(engine: Engine, prompt: list[int], stop_after: int = 99, **options: Any) -> list[TokenEvent]:
    """Return the events of a text, which is cancelled after some steps."""
    request = engine.add(prompt, GenerationConfig(**{"max_new_tokens": 4, "logprobs": VOCAB, "seed": 3, **options}))
    events = []
    for _ in range(stop_after):
        if engine.has_work:
            events += engine.step()
    engine.cancel(request)
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def logprobs_of(events: list[TokenEvent]) -> torch.Tensor:
    found = torch.full((len(events), VOCAB), float("nan"), dtype=torch.float64)
    for row, event in zip(found, events, strict=True):
        for token, value in event.logprobs.top if event.logprobs else ():
            row[token] = value
    return found


def assert_same(found: list[TokenEvent], expected: list[TokenEvent], tolerance: float = 1e-9) -> None:
    assert tokens_of(found) == tokens_of(expected)
    assert [event.finish_reason for event in found] == [event.finish_reason for event in expected]
    torch.testing.assert_close(logprobs_of(found), logprobs_of(expected), rtol=0, atol=tolerance, equal_nan=True)


@contextmanager
def counted(model: GPT) -> Iterator[list[int]]:
    """Give how many tokens the model reads in each of its passes."""
    read: list[int] = []
    handle = model.embedding.register_forward_pre_hook(lambda _, ids: read.append(ids[0].shape[1]))
    yield read
    handle.remove()


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
@settings(max_examples=20)
@given(data=st.data())
def test_every_turn_is_that_of_an_engine_that_reads_it_whole(fields: dict[str, Any], data: st.DataObject) -> None:
    """Texts end by length, stop token or cancelling; prompts go on from them, go back, slide or are new."""
    model = make_model(**fields)
    keeping = Engine(model, num_slots=1, keep_prefix=True)
    said: list[int] = []
    for _ in range(data.draw(st.integers(2, 6))):
        cut = data.draw(st.sampled_from([0, 0, 0, 0, 1, 3, 99]))
        new = data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=9))
        prompt = said[: max(0, len(said) - cut)] + new or [1]
        options = {
            "max_new_tokens": data.draw(st.integers(0, 12)),
            "temperature": data.draw(st.sampled_from([0.0, 1.0])),
            "stop_tokens": data.draw(st.sets(st.integers(0, VOCAB - 1), max_size=6)),
            "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3])),
            "overflow": "slide",
        }
        stop_after = data.draw(st.sampled_from([99, 99, 1, 3]))
        found = write(keeping, prompt, stop_after, **options)
        assert_same(found, write(Engine(model, num_slots=1), prompt, stop_after, **options))
        said = prompt + tokens_of(found)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_a_turn_reads_its_new_tokens_alone(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    engine = Engine(model, num_slots=1, keep_prefix=True)
    said = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    said += tokens_of(write(engine, said))
    with counted(model) as read:
        said += [10, 11, 12]
        events = write(engine, said, max_new_tokens=3)
        # The last token of the answer was drawn and not read yet; each new token but the last is read in its turn.
        assert read == [1 + 3, 1, 1]
        read.clear()
        said += tokens_of(events)
        stop = tokens_of(write(Engine(model, num_slots=1), [*said, 13], temperature=0))
        read.clear()
        # The token at which an answer ends is never read; all before it are.
        ended = write(engine, [*said, 13], temperature=0, stop_tokens=stop[-1:])
        answer = tokens_of(ended)
        assert read == [1 + 1, *[1] * len(answer)]
        assert ended[-1].finish_reason == "stop"
        read.clear()
        write(engine, [*said, 13, *answer, *stop[-1:], 14], max_new_tokens=1)
        assert read == [2]


@pytest.mark.parametrize("fields", [{}, {"smear": False}], ids=["smear", "no smear"])
def test_without_windows_a_turn_goes_back_to_where_it_differs(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    engine = Engine(model, num_slots=1, keep_prefix=True)
    write(engine, [1, 2, 3, 4, 5, 6])
    embedded = [1] if model.smear else []  # the smear needs the embedding of the token before
    with counted(model) as read:
        write(engine, [1, 2, 3, 4, 5, 6], max_new_tokens=1)
        assert read == [*embedded, 1]  # logits are not kept, so its last token is read again
        read.clear()
        write(engine, [1, 2, 3, 7, 8], max_new_tokens=1)
        assert read == [*embedded, 2]
        read.clear()
        write(engine, [9, 8, 7], max_new_tokens=1)
        assert read == [3]


def test_a_window_goes_back_as_long_as_it_has_let_go_of_nothing() -> None:
    model = make_model(**WINDOWS)
    engine = Engine(model, num_slots=1, keep_prefix=True)
    write(engine, [1, 2, 3, 4, 5], max_new_tokens=1)  # a window of 4 and the token itself
    with counted(model) as read:
        write(engine, [1, 2, 3, 6], max_new_tokens=1)
        assert read == [1, 1]
        write(engine, [1, 2, 3, 6, 7, 8], max_new_tokens=1)
        read.clear()
        write(engine, [1, 2, 3, 6, 7], max_new_tokens=1)
        assert read == [5]


class Failing(torch.nn.Module):
    """Fails once, when asked for the n-th time."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part
        self.left = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.part(x)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("at", [1, 2, 4], ids=["while the prompt is read", "at the first token", "at the third"])
def test_what_a_failed_step_leaves_behind_is_not_gone_on_from(fields: dict[str, Any], at: int) -> None:
    model = make_model(**fields)
    failing = model.blocks[1].mlp = Failing(model.blocks[1].mlp)  # the first layer has read the token, the last not
    whole = write(Engine(model, num_slots=1), [1, 2, 3, 4, 5, 6, 7], temperature=0)
    engine = Engine(model, num_slots=1, keep_prefix=True)
    write(engine, [1, 2, 3])
    failing.left = at
    with pytest.raises(KeyboardInterrupt):
        write(engine, [1, 2, 3, 4, 5, 6, 7], temperature=0)
    prompt = [1, 2, 3, 4, 5, 6, 7, *tokens_of(whole)[: at - 1], 30, 31]
    assert_same(write(engine, prompt), write(Engine(model, num_slots=1), prompt))


# The product of int8 weights rounds what enters it where there are few tokens, and not where there are many.
@pytest.mark.parametrize(("weights", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1), ("int8", 0.1)])
def test_copies_of_the_weights_go_on_as_well(weights: Any, tolerance: float) -> None:
    model = make_model(torch.float32, **WINDOWS)
    engine = Engine(model, num_slots=1, keep_prefix=True, weights=weights)
    said = [1, 2, 3, 4, 5, 6, 7]
    for new in ([8, 9], [10], [11, 12, 13]):
        said += new
        events = write(engine, said, temperature=0)
        first = write(Engine(model, num_slots=1, weights=weights), said, max_new_tokens=1)
        torch.testing.assert_close(logprobs_of(events[:1]), logprobs_of(first), rtol=0, atol=tolerance)
        said += tokens_of(events)


@pytest.mark.filterwarnings("ignore")  # the compiler looks at attributes that warn when looked at
def test_a_compiled_engine_goes_on_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, compile_ = CompileCounter(), torch.compile
    # Traced as on a GPU, at its fixed shape; only the making of kernels is left out.
    monkeypatch.setattr(torch, "compile", lambda step, **options: compile_(step, backend=counter, **options))
    model = make_model(num_layers=2, **WINDOWS)
    engine = Engine(model, num_slots=1, keep_prefix=True, compile=True)
    said = [1, 2, 3, 4, 5, 6, 7]
    for new in ([8, 9], [10], [11, 12, 13]):
        said += new
        engine.add(said, GenerationConfig(max_new_tokens=4, logprobs=VOCAB, temperature=0))
        with counted(model) as read:  # the prompt alone: what is compiled would be compiled anew for a hook
            events = engine.step()
        assert read == [len(said) if new == [8, 9] else 1 + len(new)]
        events += engine.run()
        assert_same(events, write(Engine(model, num_slots=1), said, temperature=0))
        said += tokens_of(events)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_by_default_nothing_is_kept_and_texts_repeat_to_the_bit() -> None:
    model = make_model(torch.float32, **WINDOWS)
    used, prompt = Engine(model, num_slots=1), [1, 2, 3, 4, 5, 6, 7]
    prompt += tokens_of(write(used, prompt))
    with counted(model) as read:
        again = write(used, prompt)
    assert read == [len(prompt), 1, 1, 1]
    assert again == [
        TokenEvent(1, e.sample, e.token_id, e.text, e.logprobs, e.finish_reason)
        for e in write(Engine(model, num_slots=1), prompt)
    ]


@pytest.mark.parametrize("options", [{"num_slots": 2}, {"num_slots": 1, "use_cache": False}])
def test_one_cached_text_at_a_time_is_all_it_goes_on_from(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="keep_prefix=True goes on from the cache of the one text before"):
        Engine(make_model(), keep_prefix=True, **options)
