"""The model card says what the run wrote down, in valid metadata, and nothing else."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub_server import yaml_errors
from tinygpt import GPT
from tinygpt.errors import CheckpointError, ConfigError, DataError, HubError
from tinygpt.layers import SwiGLU
from tinygpt.metrics import read_metrics
from tinygpt.model import GPTConfig
from tinygpt.publish import choose_checkpoint, model_card
from tinygpt.publish._markdown import plain
from tinygpt.tokenizer import ByteTokenizer

TINY = GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=32)


def load(text: str, folder: Path) -> ModelCard:
    (folder / "card.md").write_text(text, encoding="utf-8")
    return ModelCard.load(folder / "card.md")


def row(text: str, name: str) -> str:
    """Return the cells behind the first one of a table's row."""
    match = re.search(rf"^\| {re.escape(name.replace('_', chr(92) + '_'))} \| (.*) \|$", text, re.MULTILINE)
    assert match, f"no row {name!r} in\n{text}"
    return match[1]


def test_the_metadata_holds_the_figure_and_its_hash(run: Path, tmp_path: Path) -> None:
    text = model_card(run, repo_id="user/tiny", license="mit", datasets=["user/books"], languages=["en"], tags=["demo"])
    assert yaml_errors(text) == []
    data = load(text, tmp_path).data
    last = [line for line in read_metrics(run / "metrics.jsonl") if line["event"] == "evaluation"][-1]
    assert (data.license, data.library_name, data.datasets) == ("mit", "tinygpt", ["user/books"])
    assert (data.language, data.tags) == (["en"], ["tinygpt", "demo"])
    assert data.model_name == "tiny"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("bits_per_byte", last["bpb"])
    assert result.dataset_args == {"data_hash": last["data_hash"]}


def test_no_license_or_data_set_is_named_that_nobody_gave(run: Path, tmp_path: Path) -> None:
    data = load(model_card(run), tmp_path).data.to_dict()
    assert not {"license", "datasets", "language", "base_model"} & data.keys()


def test_the_numbers_are_those_of_the_record(run: Path) -> None:
    checkpoint = choose_checkpoint(run)
    state = json.loads((checkpoint / "state.json").read_text())["state"]
    text = model_card(run)
    model = GPT.from_pretrained(checkpoint)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert row(text, "parameters") == f"{total:,}"
    assert row(text, "steps") == "6"
    assert row(text, "tokens trained on") == str(state["tokens"])
    assert row(text, "fingerprint of the text") == f"`{state['loader']['source_fingerprint']}`"
    assert row(text, "fingerprint of the tokenizer") == f"`{ByteTokenizer().fingerprint()}`"
    assert row(text, "optimizer") == "MuonAdamW"
    start = read_metrics(run / "metrics.jsonl")[0]["environment"]
    assert row(text, "hardware") == plain(
        f"{start['device_name'] or 'cpu'}, {start['system']}, {start['threads']} threads"
    )
    versions = f"tinygpt {start['tinygpt']}, torch {start['torch']}, python {start['python']}"
    assert row(text, "versions") == plain(versions)
    assert row(text, "batch") == "64 tokens a step, as 1 times 2 rows of 32"
    assert row(text, "seed") == "0"
    assert row(text, "tokenizer") == "ByteTokenizer of 257 ids"
    assert row(text, "parameters by role").startswith("token embedding 5120, value embeddings 5120, head 5120")
    assert row(text, "precision") == "torch.float32".replace("_", r"\_")
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["event"] == "step"]
    assert row(text, "training loss, mean of the last 6 steps") == f"{sum(losses) / 6:.4f}"
    assert row(text, "dim") == "16"
    assert row(text, "grad_clip") == "none"  # which is recorded


def test_what_changed_at_a_resume_is_disclosed(run: Path) -> None:
    text = model_card(run)
    changed = next(x for x in read_metrics(run / "metrics.jsonl") if x["event"] == "resume")["changes"]
    section = text[text.index("### Changes on the way") : text.index("## Evaluation")]
    assert changed
    for name, was, will_be in changed:
        assert f"| 4 | {plain(name)} | {plain(was)} | {plain(will_be)} |" in section


def test_a_checkpoint_before_the_resume_tells_nothing_of_later(run: Path) -> None:
    text = model_card(run / "checkpoints" / "step-000004")
    assert "Changes on the way" not in text
    assert row(text, "steps") == "4"
    found = [line for line in read_metrics(run / "metrics.jsonl") if line["event"] == "evaluation" and line["step"] < 4]
    assert row(text, "after 4 steps, the last").startswith(f"{found[-1]['bpb']:.4f} | `{found[-1]['data_hash']}`")
    assert "after 6 steps" not in text


def test_other_hardware_and_data_on_the_way_are_told_from_where_they_began(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(run, copy)
    metrics = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    second = [line for line in lines if line["event"] == "run"][-1]
    assert second["step"] == 3
    second["environment"] |= {"device_name": "Some GPU", "device_memory_bytes": 12 << 30, "world_size": 2}
    second["data"]["source_fingerprint"] = "other"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = model_card(copy)
    assert re.search(r"^\| hardware \| [^;]*; then 2 x Some GPU with 12 GiB, ", text, re.MULTILINE)
    assert row(text, "fingerprint of the text").endswith("; then other")
    before = model_card(copy / "checkpoints" / "step-000004")
    assert "Some GPU" not in before
    assert "then other" not in before


def test_a_run_without_a_record_of_its_starts_tells_what_its_checkpoint_does(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(run, copy)
    metrics = copy / "metrics.jsonl"
    metrics.write_text("".join(x for x in metrics.read_text().splitlines(True) if json.loads(x)["event"] != "run"))
    text = model_card(copy)
    state = json.loads((choose_checkpoint(copy) / "state.json").read_text())["state"]
    assert row(text, "device") == "cpu"
    assert row(text, "torch version") == plain(state["environment"]["torch version"])
    assert row(text, "seed") == "not recorded"


def test_a_model_without_a_record_says_so(tmp_path: Path) -> None:
    GPT.from_config(TINY).save_pretrained(tmp_path / "bare")
    text = model_card(tmp_path / "bare")
    assert yaml_errors(text) == []
    assert "The run that trained it left no record here." in text
    for name in ("steps", "optimizer", "training time", "fingerprint of the text", "hardware, versions", "data sets"):
        assert row(text, name) == "not recorded"
    assert "## Evaluation\n\nNot recorded." in text
    assert "The tokenizer it was trained with is not here." in text
    assert load(text, tmp_path).data.eval_results is None


def test_the_example_on_the_card_names_the_revision_and_runs(run: Path, tmp_path: Path) -> None:
    hub_text = model_card(run, repo_id="user/tiny", revision="step-6")
    assert 'folder = resolve("user/tiny", revision="step-6")' in hub_text
    code = re.search(r"```python\n(.*?)```", model_card(run), re.DOTALL)
    assert code
    exec(code[1].replace('"."', repr(str(run / "checkpoints" / "step-000006"))), {})


def test_parts_of_ones_own_are_named(tmp_path: Path) -> None:
    model = GPT.from_config(TINY, mlp=lambda config, layer: SwiGLU(config.dim, 40))
    model.save_pretrained(tmp_path / "own", ByteTokenizer())
    text = model_card(tmp_path / "own")
    assert "mlp=SwiGLU" in text
    assert "`from_pretrained` needs the same parts" in text


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.sampled_from(["---\n# a", "| x |", "[a](http://b)", "`", "<img src=x>", "\\", "a\n\n---\nb: c"]))
def test_no_text_from_a_file_becomes_markup_or_metadata(text: str) -> None:
    shown = plain(text)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_<>\[\]|#!]", shown)


def test_hostile_values_in_a_run_stay_values(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a | b # c"
    shutil.copytree(run, copy)
    state = copy / "checkpoints" / "step-000006" / "state.json"
    document = json.loads(state.read_text())
    hostile = "x\n---\nlicense: mit\n---\n| <script> [a](http://b)"
    metrics = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[0]["environment"]["device_name"] = hostile
    lines[0]["model"]["parameters"] = {hostile: hostile}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    document["state"]["loader"]["source_fingerprint"] = {"$tensor": "`` ` ``"}
    state.write_text(json.dumps(document))
    text = model_card(copy)
    assert yaml_errors(text) == []
    card = load(text, tmp_path)
    assert card.data.license is None
    assert "<script>" not in text
    assert len(re.findall(r"^\| hardware \|", text, re.MULTILINE)) == 1
    assert re.search(r"^# a \\\| b \\# c$", text, re.MULTILINE)


def test_wrong_words_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="license='MIT License' is not an identifier"):
        model_card(run, license="MIT License")
    for words in ("books", [""], ["a\nb"]):
        with pytest.raises(ConfigError, match="is not a list of names in one line each"):
            model_card(run, datasets=words)
    with pytest.raises(HubError, match="'tiny' is not a Hub name"):
        model_card(run, repo_id="tiny")
    with pytest.raises(HubError, match="is no name for a tag or branch"):
        model_card(run, revision="../x")
    with pytest.raises(CheckpointError, match=r"there is no folder 'nowhere'"):
        model_card("nowhere")
    with pytest.raises(CheckpointError, match="is no run and no model"):
        model_card(tmp_path)


def test_damaged_files_are_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 1 is not JSON"):
        model_card(copy)
    weights = copy / "checkpoints" / "step-000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or damaged"):
        model_card(copy)
    config = copy / "checkpoints" / "step-000004" / "config.json"
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="is not the config of a tinygpt model"):
        model_card(copy / "checkpoints" / "step-000004")
    config.write_text('{"model_type": "tinygpt", "format_version": 1, "dim": "wide"}')
    with pytest.raises(CheckpointError, match=r"config\.json: GPTConfig\.dim='wide'"):
        model_card(copy / "checkpoints" / "step-000004")


def test_a_checkpoint_of_a_run_is_chosen_by_step_by_figure_or_as_the_latest(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints"
    figures = {x["step"] + 1: x["bpb"] for x in read_metrics(run / "metrics.jsonl") if x["event"] == "evaluation"}
    assert choose_checkpoint(run) == choose_checkpoint(run, "latest") == folder / "step-000006"
    assert choose_checkpoint(run, 2) == folder / "step-000002"
    assert choose_checkpoint(run, "best") == folder / f"step-{min(figures, key=lambda s: figures[s]):06d}"
    assert choose_checkpoint(folder / "step-000002") == folder / "step-000002"
    other = tmp_path / "other"  # its first two evaluations were of another set, and look far better
    shutil.copytree(run, other)
    lines = read_metrics(run / "metrics.jsonl")
    changed = [
        {**x, "bpb": 0.1, "data_hash": "another"} if x["event"] == "evaluation" and x["step"] < 5 else x for x in lines
    ]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert choose_checkpoint(other, "best") == other / "checkpoints" / "step-000006"
    with pytest.raises(CheckpointError, match=r"no checkpoint .*step-000003; there are those of steps 2, 4, 6"):
        choose_checkpoint(run, 3)
    with pytest.raises(ConfigError, match="chooses among the checkpoints of a run"):
        choose_checkpoint(folder / "step-000002", "best")
    with pytest.raises(ConfigError, match="step='first' is not known"):
        choose_checkpoint(run, "first")  # type: ignore[arg-type]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="none is known to be the best"):
        choose_checkpoint(copy, "best")
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        choose_checkpoint(copy)
