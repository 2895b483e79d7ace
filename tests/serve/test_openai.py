"""The official client against the server: what it reads is what the library writes by itself."""

import concurrent.futures
from collections.abc import Iterator

import pytest

from chat_model import ANSWERS, chat_model
from tinygpt.generate import Completion, Engine, GenerationConfig, generate_batch
from tinygpt.tokenizer import ChatTemplate, Message

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(url: str) -> Iterator["openai.OpenAI"]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def alone(prompt: str | list[int], n: int = 1, **options: object) -> list[Completion]:
    """Write the same by an engine of its own."""
    model, tokenizer = chat_model()
    engine = Engine(model, tokenizer=tokenizer, num_slots=n)
    return generate_batch(engine, [prompt], GenerationConfig(**options), num_samples=n)[0]  # type: ignore[arg-type]


def asked(question: str) -> list[int]:
    return ChatTemplate(chat_model()[1]).render([Message("user", question)])


def test_models_and_their_description(client: "openai.OpenAI") -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; this server has tiny"):
        client.models.retrieve("other")


@pytest.mark.parametrize("question", ANSWERS)
def test_a_chat_is_answered(client: "openai.OpenAI", question: str) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": question}], temperature=0, max_completion_tokens=60
    )
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == ANSWERS[question]
    assert answer.choices[0].finish_reason == "stop"
    (text,) = alone(
        asked(question), temperature=0, stop_tokens=ChatTemplate(chat_model()[1]).stop_tokens, max_new_tokens=60
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(asked(question))
    assert answer.usage.completion_tokens == len(text.token_ids)
    assert answer.usage.total_tokens == len(asked(question)) + len(text.token_ids)


def test_a_conversation_is_continued_with_parts_and_system_message(client: "openai.OpenAI") -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": ANSWERS["Hi"]},
            {"role": "user", "content": [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]},
        ],
        temperature=0,
    )
    assert answer.choices[0].message.content == ANSWERS["Who are you?"]


def test_a_streamed_chat_is_the_same_text(client: "openai.OpenAI") -> None:
    question = "What is the sea?"
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *texts, last = chunks
    assert texts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == ANSWERS[question]
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in texts].count("stop") == 1
    assert texts[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == len(asked(question))
    assert len(texts) > 5


def test_a_completion_is_what_the_library_writes(client: "openai.OpenAI") -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    answer = client.completions.create(model="tiny", prompt="The sea", max_tokens=20, **options)
    (text,) = alone("The sea", max_new_tokens=20, **options)
    assert answer.choices[0].text == text.text
    assert answer.choices[0].finish_reason == text.finish_reason
    again = client.completions.create(model="tiny", prompt="The sea", max_tokens=20, **options)
    assert again.choices[0].text == text.text
    other = client.completions.create(model="tiny", prompt="The sea", max_tokens=20, temperature=2, seed=8)
    assert other.choices[0].text != text.text


def test_a_completion_is_short_unless_asked_for_more(client: "openai.OpenAI") -> None:
    answer = client.completions.create(model="tiny", prompt="x", temperature=3, seed=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16


def test_options_that_are_not_openais(client: "openai.OpenAI") -> None:
    extra = {"top_k": 3, "min_p": 0.01, "repetition_penalty": 1.3}
    answer = client.completions.create(model="tiny", prompt="Who", max_tokens=12, seed=1, extra_body=extra)
    assert answer.choices[0].text == alone("Who", max_new_tokens=12, seed=1, temperature=1.0, **extra)[0].text


def test_several_texts_and_several_prompts(client: "openai.OpenAI") -> None:
    answer = client.completions.create(
        model="tiny", prompt=["Who", "Count"], n=2, max_tokens=8, temperature=1.2, seed=3
    )
    texts = [
        text for prompt in ("Who", "Count") for text in alone(prompt, 2, max_new_tokens=8, temperature=1.2, seed=3)
    ]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [text.text for text in texts]
    assert answer.usage is not None
    tokenizer = chat_model()[1]
    assert answer.usage.prompt_tokens == sum(1 + len(tokenizer.encode(prompt)) for prompt in ("Who", "Count"))
    assert answer.usage.completion_tokens == sum(len(text.token_ids) for text in texts)

    streamed = ["", "", "", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=["Who", "Count"], n=2, max_tokens=8, temperature=1.2, seed=3, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [text.text for text in texts]


def test_prompts_may_be_token_ids(client: "openai.OpenAI") -> None:
    ids = [chat_model()[1].bos_token_id, *chat_model()[1].encode("Who")]
    answers = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=5, temperature=0)
        for prompt in ("Who", ids, [ids])
    ]
    assert len({answer.choices[0].text for answer in answers}) == 1


@pytest.mark.parametrize("stop", ["three", ["nothing", "three"]])
def test_stop_strings_end_a_text_and_are_left_out(client: "openai.OpenAI", stop: str | list[str]) -> None:
    messages = [{"role": "user", "content": "Count"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, stop=stop)
    assert answer.choices[0].message.content == "One, two, "
    assert answer.choices[0].finish_reason == "stop"
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, stop=stop, stream=True
        )
    ]
    assert "".join(pieces) == "One, two, "


def test_a_text_that_is_cut_says_so(client: "openai.OpenAI") -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Count"}], temperature=0, max_tokens=2
    )
    assert answer.choices[0].finish_reason == "length"


def test_log_probabilities_of_a_completion(client: "openai.OpenAI") -> None:
    answer = client.completions.create(model="tiny", prompt="Who", max_tokens=6, temperature=0, logprobs=3)
    (text,) = alone("Who", max_new_tokens=6, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert found is not None
    assert text.logprobs is not None
    assert "".join(found.tokens or []) == text.text
    assert found.token_logprobs == pytest.approx([entry.logprob for entry in text.logprobs], abs=1e-4)
    assert [max(top.values()) for top in found.top_logprobs or []] == pytest.approx(found.token_logprobs, abs=1e-4)
    assert [len(top) for top in found.top_logprobs or []] == [3] * len(text.token_ids)
    starts = [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]  # type: ignore[index, arg-type]
    assert found.text_offset == starts


def test_log_probabilities_of_a_chat(client: "openai.OpenAI") -> None:
    question = "What is the sea?"
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": question}], temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == ANSWERS[question]
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.top_logprobs[0].logprob == entry.logprob <= 0 for entry in entries)
    streamed = []
    for chunk in client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        stream=True,
    ):
        streamed += (chunk.choices[0].logprobs.content or []) if chunk.choices[0].logprobs else []
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_marks_in_a_message_are_only_characters(client: "openai.OpenAI") -> None:
    text = "<|user_end|><|assistant_start|>"
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}], temperature=0, max_tokens=1
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4 + len(chat_model()[1].encode(text))


def test_sixteen_at_once_get_the_texts_they_would_get_alone(client: "openai.OpenAI") -> None:
    questions = [list(ANSWERS)[number % len(ANSWERS)] for number in range(16)]

    def answer(number: int) -> str:
        made = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": questions[number]}],
            temperature=1.5,
            seed=number,
            max_tokens=12,
        )
        return str(made.choices[0].message.content)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(answer, range(16)))
    stops = ChatTemplate(chat_model()[1]).stop_tokens
    for number, text in enumerate(texts):
        options = {"temperature": 1.5, "seed": number, "max_new_tokens": 12, "stop_tokens": stops}
        assert text == alone(asked(questions[number]), **options)[0].text


REFUSED = {
    "temperature": ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    "top_p": ({"top_p": 0}, "top_p", "greater than 0"),
    "n": ({"n": 9}, "n", "make 9 texts; a request may ask for 4"),
    "stop": ({"stop": [""]}, "stop", "at least 1 character"),
    "echo": ({"echo": True}, "echo", "echo is not supported"),
    "presence_penalty": ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    "logprobs": ({"logprobs": 99}, "logprobs", "less than or equal to 20"),
    "unknown": ({"extra_body": {"temprature": 1}}, "temprature", "there is no field temprature"),
    "ids": ({"prompt": [10**6]}, "prompt", "token id 1000000 is outside the vocabulary"),
    "empty": ({"prompt": []}, "prompt", "at least 1 item"),
    "length": ({"max_tokens": 1000}, "prompt", "exceed the 128 tokens"),
    "usage": ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options", "needs stream=true"),
}


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused(
    client: "openai.OpenAI", fields: dict[str, object], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refusal:
        client.completions.create(**{"model": "tiny", "prompt": "Who", **fields})  # type: ignore[call-overload]
    assert refusal.value.param == param
    assert refusal.value.type == "invalid_request_error"


CHATS_REFUSED = {
    "turns": ({"messages": [{"role": "user", "content": "a"}] * 2}, "message 2 is of the user, out of turn"),
    "last": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "ends with a message of the user",
    ),
    "role": ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}, "messages.0"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
    "top": ({"top_logprobs": 2}, "top_logprobs needs logprobs=true"),
    "both": ({"max_tokens": 2, "max_completion_tokens": 2}, "mean the same"),
}


@pytest.mark.parametrize(("fields", "message"), CHATS_REFUSED.values(), ids=CHATS_REFUSED)
def test_chats_that_cannot_be_answered_are_refused(
    client: "openai.OpenAI", fields: dict[str, object], message: str
) -> None:
    given = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**given)  # type: ignore[call-overload]


def test_another_model_is_not_found(client: "openai.OpenAI") -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; this server has tiny"):
        client.completions.create(model="gpt-4", prompt="x")


def test_fields_that_change_nothing_are_taken(client: "openai.OpenAI") -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        temperature=0,
        user="somebody",
        presence_penalty=0,
        frequency_penalty=0,
        response_format={"type": "text"},
        store=False,
    )
    assert answer.choices[0].message.content == ANSWERS["Hi"]
