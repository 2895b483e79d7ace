"""Any model of this library in EleutherAI's evaluation harness."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

from tinygpt.errors import ConfigError, DataError, MissingDependencyError
from tinygpt.evals._decoding import decode_until
from tinygpt.evals._progress import progress_bar
from tinygpt.evals._scoring import LogitsModel, Row, Scorer, check_vocabulary, context_of, evaluating
from tinygpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_Request = tuple[tuple[str, str], list[int], list[int]]


class LMEvalAdapter:
    """A model and its tokenizer as the harness wants them: pass it as `model` to `lm_eval.simple_evaluate`.

    An instance is a subclass of `lm_eval.api.model.TemplateLM` as well, made on first use, so that importing this
    costs nothing. Texts are encoded, cropped from the left and scored as by the harness's own `HFLM`.

    Args:
        model: A `GPT`, or anything called with token ids `(batch, seq)` that returns logits `(batch, seq, vocab)`.
        tokenizer: The model's tokenizer.
        max_seq_len: The model's context; None for its own `max_seq_len`.
        batch_tokens: Most positions in one call of the model; lower it when memory runs out.
        share_prefixes: Whether a `GPT` reads only once what requests with one context have in common.
        add_bos: Whether texts start with `<|bos|>`, as in this library's training. `HFLM` leaves it to the tokenizer,
            and most of Hugging Face's add none.
        stop_tokens: Tokens that end a generated text; None is `<|bos|>`, with which the next document begins.
        max_new_tokens: Most tokens to generate where a task does not say.
        progress: Whether to show a bar on standard error.

    Raises:
        ConfigError: If no context is known, a number is out of range, or the tokenizer does not fit the model.
        MissingDependencyError: If lm_eval is not installed.

    References:
        Gao et al., [Language Model Evaluation Harness](https://github.com/EleutherAI/lm-evaluation-harness), 2021.

    Example:
        ```python no-run: needs the `eval` extra and the network for the task
        import lm_eval
        from tinygpt import GPT
        from tinygpt.evals import LMEvalAdapter
        from tinygpt.tokenizer import load_tokenizer

        folder = "runs/d12/step-087000"
        adapter = LMEvalAdapter(GPT.from_pretrained(folder), load_tokenizer(folder))
        results = lm_eval.simple_evaluate(adapter, tasks=["arc_easy"], limit=100)
        ```
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Make an instance that the harness takes for one of its own models."""
        return object.__new__(_as_harness_model(cls))

    def __init__(
        self,
        model: LogitsModel,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int | None = None,
        batch_tokens: int = 16_384,
        share_prefixes: bool = True,
        add_bos: bool = True,
        stop_tokens: Iterable[int] | None = None,
        max_new_tokens: int = 256,
        progress: bool = True,
    ) -> None:
        super().__init__()
        context = context_of(model, max_seq_len)
        if context is None:
            raise ConfigError("this model does not say how long a text it takes: give max_seq_len.")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens} is not positive; choose 1 or more.")
        check_vocabulary(model, tokenizer.vocab_size)
        self.model = model
        self.max_length = context
        self._scorer = Scorer(model, batch_tokens, share_prefixes)
        self._tokenizer = tokenizer  # the harness takes `tokenizer` for one of transformers
        self._add_bos = add_bos
        self._stop_tokens = frozenset((tokenizer.bos_token_id,) if stop_tokens is None else stop_tokens)
        self._max_new_tokens = max_new_tokens
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        """Id of `<|bos|>`, which also stands where a text has ended."""
        return self._tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells cached requests apart by: the tokenizer's fingerprint."""
        return self._tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return the token ids of a text; `add_special_tokens` puts `<|bos|>` first, None goes by `add_bos`."""
        with_bos = self._add_bos if add_special_tokens is None else add_special_tokens
        return [*([self._tokenizer.bos_token_id] if with_bos else []), *self._tokenizer.encode(string)]

    def loglikelihood_rolling(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, longer ones in windows of the context's length."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = [0.0] * len(requests)
        owners: list[int] = []
        windows: list[_Request] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1):
                owners.append(index)
                windows.append((("", ""), *make_disjoint_window(window)))
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Return the text after each context, cut before the first of the request's stop strings.

        Raises:
            ConfigError: If a request asks for more new tokens than the context holds, or for an option other than
                `until`, `max_gen_toks` and its other names, `do_sample`, `temperature`, `top_k` and `top_p`.
        """
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(index)
        texts = [""] * len(requests)
        with progress_bar("generating", total=len(requests), enabled=self._progress and not disable_tqdm) as advance:
            for indices in alike.values():
                options = _read_options(requests[indices[0]].args[1], self._max_new_tokens)
                room = self.max_length - options["max_new_tokens"]
                if room < 1:
                    raise ConfigError(
                        f"max_gen_toks={options['max_new_tokens']} leaves no room for a prompt in the model's context "
                        f"of {self.max_length}; set max_gen_toks in the task or in gen_kwargs."
                    )
                encoded = {i: (self.tok_encode(requests[i].args[0]) or [self.eot_token_id])[-room:] for i in indices}
                rows = max(1, self._scorer.batch_tokens // self.max_length)
                order = sorted(indices, key=lambda i: len(encoded[i]))
                for first in range(0, len(order), rows):
                    batch = order[first : first + rows]
                    prompts = [encoded[i] for i in batch]
                    with evaluating(self.model):
                        written = decode_until(
                            self.model, self._tokenizer, prompts, stop_tokens=self._stop_tokens, **options
                        )
                    for index, text in zip(batch, written, strict=True):
                        texts[index] = text
                    advance(len(batch))
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each continuation; what the harness's `loglikelihood` ends in."""
        groups = self._groups(requests)
        found: list[list[tuple[float, bool]]] = [[] for _ in groups]
        enabled = self._progress and not disable_tqdm
        with progress_bar("scoring", total=len(requests), enabled=enabled) as advance, evaluating(self.model):
            for index, scores in self._scorer.score(groups):
                found[index] = [(-score.nats, score.greedy) for score in scores]
                advance(len(scores))
        return [answer for answers in found for answer in answers]

    def _groups(self, requests: Sequence[_Request]) -> list[list[Row]]:
        """Return a row a request, those with one context after another together, as far as they fit into a batch."""
        groups: list[list[Row]] = []
        last: list[int] | None = None
        longest = 0
        for _, context, continuation in requests:
            row = self._row(context, continuation)
            fitting = max(longest, len(row.tokens))
            if context == last and (len(groups[-1]) + 1) * fitting <= self._scorer.batch_tokens:
                groups[-1].append(row)
                longest = fitting
            else:
                groups.append([row])
                longest = len(row.tokens)
            last = context
        return groups

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        if not 0 < len(continuation) <= self.max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens; it must have 1 to {self.max_length}, which is the "
                "model's context."
            )
        # The last token is only predicted, so one more than the context fits.
        tokens = [*context, *continuation][-(self.max_length + 1) :]
        return Row(tokens, len(tokens) - len(continuation))


def _as_harness_model(cls: Any) -> Any:
    """Return a class that is both `cls` and a model of the harness."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise MissingDependencyError(
            'LMEvalAdapter needs the evaluation harness: pip install "tinygpt[eval]".'
        ) from None
    return type(cls.__name__, (cls, TemplateLM), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _read_options(given: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Return the arguments of `decode_until` for a request's `generation_kwargs`.

    As in the harness a temperature counts only with `do_sample`, and 0 is the most likely token.
    """
    limits = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # first wins, as there
    known = {"until", "do_sample", "temperature", "top_k", "top_p", *limits}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"generation_kwargs has {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
    until = given.get("until") or []
    sample = given.get("do_sample", False)
    return {
        "until": [until] if isinstance(until, str) else [text for text in until if text],
        "max_new_tokens": next((given[name] for name in limits if given.get(name) is not None), max_new_tokens),
        "temperature": float(given.get("temperature", 1.0)) if sample else 0.0,
        "top_k": (given.get("top_k") or None) if sample else None,
        "top_p": given.get("top_p") if sample else None,
    }
