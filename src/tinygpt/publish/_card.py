"""The model card: what a run's own record says, and nothing else."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeGuard

import torch

from tinygpt.errors import ConfigError
from tinygpt.hub import check_repo_id, check_tags
from tinygpt.model import GPT, describe_blocks
from tinygpt.publish._markdown import code, number, plain, table
from tinygpt.publish._record import RunRecord, choose_checkpoint, read_record, weight_bytes

_LAST_STEPS = 50
Values = Callable[..., Any]  # from nested keys to what a run wrote down under them
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def model_card(
    source: str | Path,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    languages: Sequence[str] = (),
    tags: Sequence[str] = (),
    picture: str | None = None,
) -> str:
    """Write the text of a `README.md` with the metadata that the Hub reads, from what a run wrote down.

    A fact that the record does not hold is called not recorded. Everything from files is escaped, so that no name or
    number in them can become markup or metadata.

    Args:
        source: A checkpoint, a run (its newest checkpoint), or a folder that `save_pretrained` wrote.
        repo_id: `user/repo` to load it from, in the example of the card; `None` for the folder it lies in.
        revision: Tag or branch of that repository.
        license: Identifier such as `"mit"`. `None` writes none: nobody but you can give one.
        datasets: Names of the data sets on the Hub that it was trained on.
        languages: Codes such as `"en"`.
        tags: Further words to find it by.
        picture: Name of a picture of the run beside the card, such as `"curve.png"`.

    Returns:
        The text; `huggingface_hub.ModelCard` reads it.

    Raises:
        ConfigError: If the license is no identifier, or a name is empty or of several lines.
        CheckpointError: If there is no readable model.
        DataError: If the run's `metrics.jsonl` is damaged.
        HubError: If `repo_id` or `revision` is no name.

    References:
        Mitchell et al., [Model Cards for Model Reporting](https://arxiv.org/abs/1810.03993), 2019. Of its sections
        those are here that a training run can answer.

    Example:
        ```python
        from tinygpt.publish import model_card

        text = model_card("runs/d12", repo_id="user/d12", license="mit")
        ```
    """
    return card_text(
        read_record(choose_checkpoint(source)),
        repo_id=repo_id,
        revision=revision,
        license=license,
        datasets=datasets,
        languages=languages,
        tags=tags,
        picture=picture,
    )


def card_text(
    record: RunRecord,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    languages: Sequence[str] = (),
    tags: Sequence[str] = (),
    picture: str | None = None,
) -> str:
    """Write the card of a record; the arguments are those of `model_card`."""
    if repo_id is not None:
        check_repo_id(repo_id)
    if revision is not None:
        check_tags(revision)
    check_license(license)
    for words in (datasets, languages, tags):
        if isinstance(words, str) or any(not isinstance(w, str) or not w.strip() or "\n" in w for w in words):
            raise ConfigError(f"{words!r} is not a list of names in one line each, such as ['user/data'].")
    name = repo_id.partition("/")[2] if repo_id else record.name
    sections = [
        f"# {plain(name)}",
        _summary(record),
        "## Load it",
        _loading(record, repo_id, revision),
        "## Architecture",
        _architecture(record),
        "## Data",
        _data(record, datasets),
        "## Training",
        _training(record),
        "" if picture is None else f"![Loss, validation and rates against steps]({picture})",
        _changes(record),
        "## Evaluation",
        _evaluation(record),
        "## Limits",
        _limits(record),
    ]
    metadata = _metadata(record, name, license, datasets, languages, tags)
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def check_license(license: str | None) -> None:
    """Raise `ConfigError` unless this looks like an identifier of the Hub's list."""
    if license is not None and not (isinstance(license, str) and _LICENSE.fullmatch(license)):
        raise ConfigError(
            f"license={license!r} is not an identifier; give one such as 'mit', 'apache-2.0' or 'cc0-1.0'."
        )


def _metadata(
    record: RunRecord,
    name: str,
    license: str | None,
    datasets: Sequence[str],
    languages: Sequence[str],
    tags: Sequence[str],
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="validation",
            dataset_name=f"validation set {str(last.get('data_hash') or 'without a hash')[:12]}",
            dataset_args={"data_hash": str(last["data_hash"])} if last.get("data_hash") else None,
            metric_type="bits_per_byte",
            metric_name="bits per byte",
            metric_value=float(last["bpb"]),
        )
        for last in _evaluations(record)[-1:]
    ]
    data = ModelCardData(
        license=license,
        language=list(languages) or None,
        library_name="tinygpt",
        pipeline_tag="text-generation",
        tags=["tinygpt", *tags],
        datasets=list(datasets) or None,
        metrics=["bits_per_byte"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _summary(record: RunRecord) -> str:
    total = sum(record.parameters.values())
    text = f"A language model of {total:,} parameters"
    if not record.state:
        return text + ", saved with tinygpt. The run that trained it left no record here."
    text += f", trained with tinygpt for {record.step:,} steps" if record.step is not None else ", trained with tinygpt"
    if isinstance(tokens := record.fact("tokens"), int):
        text += f" on {tokens:,} tokens, {tokens / total:.3g} a parameter"
    return text + ". This page is written from the record of its training run."


def _loading(record: RunRecord, repo_id: str | None, revision: str | None) -> str:
    where = '"."  # the folder this file lies in' if repo_id is None else f'resolve("{repo_id}"'
    if repo_id is not None:
        where += f', revision="{revision}")' if revision else ")"
    lines = ["```bash", "pip install tinygpt", "```", "", "```python", "from tinygpt import GPT"]
    if record.has_tokenizer:
        lines.append("from tinygpt.generate import stream_text")
    if repo_id is not None:
        lines.append("from tinygpt.hub import resolve")
    if record.has_tokenizer:
        lines.append("from tinygpt.tokenizer import load_tokenizer")
    lines += ["", f"folder = {where}", "model = GPT.from_pretrained(folder)"]
    if record.has_tokenizer:
        new_tokens = min(64, record.config.max_seq_len // 2)
        lines += [
            "tokenizer = load_tokenizer(folder)",
            f'for piece in stream_text(model, tokenizer, "The", max_new_tokens={new_tokens}, seed=0):',
            '    print(piece, end="")',
        ]
    text = "\n".join([*lines, "```"])
    if own := _own_blocks(record):
        text += (
            f"\n\nIts blocks have parts that tinygpt does not build by itself: {code(own)}. "
            "`from_pretrained` needs the same parts, as its arguments `mlp`, `attention` or `block`."
        )
    return text if record.has_tokenizer else text + "\n\nThe tokenizer it was trained with is not here."


def _own_blocks(record: RunRecord) -> str | None:
    """Return the first block that differs from what the config alone would build."""
    with torch.device("meta"):
        standard = describe_blocks(GPT.from_config(record.config).blocks)
    return next((was for was, now in zip(record.blocks, standard, strict=False) if was != now), None)


def _architecture(record: RunRecord) -> str:
    c = record.config
    text = (
        f"A decoder-only transformer of {c.num_layers} blocks, {number(c.dim)} wide, with {c.num_heads} query heads of "
        f"{c.head_dim} and {c.num_kv_heads or c.num_heads} key/value heads. "
        f"It knows {number(c.vocab_size)} token ids and sees {number(c.max_seq_len)} tokens at once."
    )
    size = weight_bytes(record.parameters)
    rows: list[tuple[str, Any]] = [
        ("parameters", f"{sum(record.parameters.values()):,}"),
        ("stored as", ", ".join(f"{dtype} {count:,}" for dtype, count in record.parameters.items())),
    ]
    rows += [("size of the weights", f"{size / 1e6:,.1f} MB")] if size else []
    roles = record.each_start(_counts)
    rows += [("parameters by role", roles)] if roles else []
    rows += [(key, "none given" if value is None else value) for key, value in c.model_dump().items()]
    kinds = list(dict.fromkeys(record.blocks))
    rows += [("blocks", "; ".join(kinds[:4]) + (" ..." if len(kinds) > 4 else ""))] if kinds else []
    return text + "\n\n" + table(("", ""), rows)


def _data(record: RunRecord, datasets: Sequence[str]) -> str:
    steps = record.events("step")
    loader = record.fact("loader", "settings")
    rows: list[tuple[str, Any]] = [
        ("data sets", ", ".join(datasets) or None),
        ("fingerprint of the text", _known(record, "source_fingerprint")),
        ("tokenizer", record.each_start(_tokenizer)),
        ("fingerprint of the tokenizer", _known(record, "tokenizer_fingerprint")),
        ("tokens trained on", record.fact("tokens")),
        ("whole passes over the data", steps[-1].get("epoch") if steps else None),
    ]
    if isinstance(loader, dict):
        rows += [(f"loader: {key}", value) for key, value in loader.items() if value is not None]
    return table(("", ""), rows)


def _training(record: RunRecord) -> str:
    steps = record.events("step")
    losses = [float(s["loss"]) for s in steps[-_LAST_STEPS:] if _is_number(s.get("loss"))]
    speeds = [float(s["tokens_per_second"]) for s in steps if _is_number(s.get("tokens_per_second"))]
    seconds = record.fact("elapsed_seconds")
    peak = steps[-1].get("peak_memory_bytes") if steps else None
    rows: list[tuple[str, Any]] = [
        ("steps", record.step),
        ("optimizer", record.fact("optimizer_class")),
        ("seed", record.each_start(lambda of: of("seed"))),
        ("batch", record.each_start(_batch)),
        ("training time", _duration(seconds) if _is_number(seconds) else None),
        ("speed, median", f"{median(speeds):,.0f} tokens a second" if speeds else None),
        (f"training loss, mean of the last {len(losses)} steps", f"{fmean(losses):.4f}" if losses else None),
        ("peak memory", f"{peak / 2**20:,.0f} MiB" if _is_number(peak) else None),
    ]
    settings, environment = record.fact("settings"), record.fact("environment")
    if isinstance(settings, dict):
        rows += [(key, "none" if value is None else value) for key, value in settings.items()]
    else:
        rows.append(("schedules, precision", None))
    if record.events("run"):
        rows += [("hardware", record.each_start(_hardware)), ("versions", record.each_start(_versions))]
    elif isinstance(environment, dict):  # of a run from before such a record was written
        rows += [(key, "none" if value is None else value) for key, value in environment.items()]
    else:
        rows.append(("hardware, versions", None))
    return table(("", ""), rows)


def _known(record: RunRecord, name: str) -> Any:
    """Return a fingerprint of all starts, or the one that the checkpoint was saved with."""
    return record.each_start(lambda of: of("data", name)) or record.fact("loader", name)


def _counts(of: Values) -> str | None:
    roles = of("model", "parameters")
    if not isinstance(roles, dict):
        return None
    return ", ".join(f"{str(role).replace('_', ' ')} {number(count)}" for role, count in roles.items())


def _tokenizer(of: Values) -> str | None:
    name = of("data", "tokenizer")
    return None if name is None else f"{name} of {of('data', 'vocab_size')} ids"


def _batch(of: Values) -> str | None:
    tokens, rows, seq_len, parts = (of("batch", name) for name in ("tokens", "rows", "seq_len", "micro_batches"))
    processes = of("environment", "world_size")
    if tokens is None:
        return None
    text = f"{tokens} tokens a step" + (f", as {parts} times {rows} rows of {seq_len}" if parts and rows else "")
    return text + (f" on each of {processes} processes" if processes not in (None, 1) else "")


def _hardware(of: Values) -> str:
    name, processes, memory = (of("environment", key) for key in ("device_name", "world_size", "device_memory_bytes"))
    text = str(name or of("environment", "device"))
    if _is_number(processes) and processes > 1:
        text = f"{processes} x {text}"
    if _is_number(memory):
        text += f" with {memory / 2**30:,.0f} GiB"
    return f"{text}, {of('environment', 'system')}, {of('environment', 'threads')} threads"


def _versions(of: Values) -> str:
    return ", ".join(f"{name} {of('environment', name)}" for name in ("tinygpt", "torch", "python"))


def _changes(record: RunRecord) -> str:
    """List what differed when the run was gone on with: a jump in a curve has a reason that belongs beside it."""
    resumes = [line for line in record.events("resume") if line.get("changes")]
    if not resumes:
        return ""
    rows = [
        (line["step"] + 1, *change[:3])
        for line in resumes
        for change in line["changes"]
        if isinstance(change, list) and len(change) >= 3
    ]
    text = "The run was gone on with from a checkpoint under other conditions. What changed, and after which step:"
    return f"### Changes on the way\n\n{text}\n\n" + table(("after step", "what", "was", "became"), rows)


def _evaluations(record: RunRecord) -> list[dict[str, Any]]:
    return [line for line in record.events("evaluation") if _is_number(line.get("bpb"))]


def _evaluation(record: RunRecord) -> str:
    found = _evaluations(record)
    if not found:
        return "Not recorded."
    last = found[-1]
    same = [line for line in found if line.get("data_hash") == last.get("data_hash")]
    best = min(same, key=lambda line: float(line["bpb"]))
    rows = [
        (f"after {line['step'] + 1:,} steps" + note, f"{float(line['bpb']):.4f}", line.get("data_hash"))
        for line, note in [(last, ", the last"), *([(best, ", the best")] if best is not last else [])]
    ]
    text = "Bits per byte of held-out text; lower is better, and figures with other hashes cannot be compared."
    head = ("measured", "bits per byte", "hash of the validation set")
    if record.step is not None and last["step"] + 1 != record.step:
        text += f" These weights are those after {record.step:,} steps."
    return f"{text}\n\n{table(head, rows)}"


def _limits(record: RunRecord) -> str:
    lines = [
        "It continues text. Whether it was taught to follow instructions or to refuse anything is not recorded here.",
        "It repeats errors and prejudices of the text it was trained on, and states falsehoods in a sure voice.",
        f"It sees no further back than {number(record.config.max_seq_len)} tokens.",
    ]
    if _evaluations(record):
        lines.append("Bits per byte measure how well it predicts one kind of text. Nothing else is recorded.")
    else:
        lines.append("No measurement is recorded: measure it on your own text before you rely on it.")
    return "\n".join(f"- {line}" for line in lines)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} hours" if seconds >= 3600 else f"{seconds:,.0f} seconds"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
