"""A folder as nanochat writes it loads with its logits, or is refused before anything is used."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat_folder import encoding, random_weights, write_folder, write_tokenizer
from nanochat_names import FIXTURES, PARITY
from tinygpt import GPT
from tinygpt.errors import CheckpointError, ConfigError, DataError
from tinygpt.interop.nanochat import load_checkpoint
from tinygpt.tokenizer import load_tokenizer_json

CONFIG = {"sequence_len": 64, "vocab_size": 270, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 24}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints where nanochat keeps them, and its tokenizer."""
    base = tmp_path / "nanochat"
    write_tokenizer(base / "tokenizer")
    weights = random_weights(CONFIG, era=3)
    for step in (100, 200):
        write_folder(base / "base_checkpoints" / "d2", weights, CONFIG, step=step)
    return base / "base_checkpoints" / "d2"


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_logits_are_those_nanochat_recorded(name: str, prefix: str, tmp_path: Path) -> None:
    facts = json.loads((PARITY / f"{name}.json").read_text())
    expected = load_file(PARITY / f"{name}.expected.safetensors")
    weights = {prefix + key: value for key, value in load_file(PARITY / f"{name}.weights.safetensors").items()}
    write_folder(tmp_path, weights, facts["config"])
    model, tokenizer, metadata = load_checkpoint(tmp_path)
    logits = model(expected["x"][0].long())
    assert (logits - expected["logits"]).abs().max() <= 1e-4 * expected["logits"].abs().max()
    assert tokenizer is None
    assert metadata.step == 100
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loaded_model_is_published_like_any_other(folder: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load_checkpoint(folder)
    assert tokenizer is not None
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save(tmp_path / "ours")
    again = GPT.from_pretrained(tmp_path / "ours")
    ids = torch.tensor([tokenizer.encode("the whale")])
    assert torch.equal(again(ids), model(ids))


def test_the_newest_step_is_taken_or_the_one_asked_for(folder: Path) -> None:
    assert load_checkpoint(folder)[2].step == 200
    assert load_checkpoint(folder, 100)[2].step == 100
    with pytest.raises(CheckpointError, match="has no step 300; it has 100, 200"):
        load_checkpoint(folder, 300)


def test_metadata_is_what_nanochat_wrote(folder: Path) -> None:
    metadata = load_checkpoint(folder)[2]
    assert (metadata.val_bpb, metadata.elapsed_seconds) == (1.25, 60.5)
    assert (metadata.batch_tokens, metadata.tokens) == (512, 200 * 512)
    assert metadata.model_config == CONFIG
    assert metadata.user_config == {"depth": 2, "total_batch_size": -1}
    assert metadata.loop_state["smooth_train_loss"] == 3.5
    assert metadata.fields["step"] == 200


def test_metadata_of_2025_says_less(tmp_path: Path) -> None:
    write_folder(tmp_path, random_weights(CONFIG, era=0), CONFIG)
    (tmp_path / "meta_000100.json").write_text(
        json.dumps({"model_config": CONFIG, "user_config": {"total_batch_size": 256}, "val_bpb": None})
    )
    model, _, metadata = load_checkpoint(tmp_path)
    assert (metadata.val_bpb, metadata.tokens, metadata.elapsed_seconds) == (None, 25_600, 0.0)
    assert model.config is not None
    assert not model.config.smear


def test_bfloat16_tables_are_widened_without_loss_unless_a_dtype_is_given(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, era=3)
    for name in ("transformer.wte.weight", "value_embeds.1.weight"):
        weights[name] = weights[name].bfloat16()
    write_folder(tmp_path, weights, CONFIG)
    model = load_checkpoint(tmp_path)[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.get_parameter("embedding.weight"), weights["transformer.wte.weight"].float())
    half = load_checkpoint(tmp_path, dtype=torch.bfloat16)[0]
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"dtype torch\.int64 is not a floating-point dtype"):
        load_checkpoint(tmp_path, dtype=torch.int64)


@pytest.mark.gpu
def test_bfloat16_tables_stay_on_a_gpu(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, era=3)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
    model = load_checkpoint(write_folder(tmp_path, weights, CONFIG), device="cuda")[0]
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert (dtypes["embedding.weight"], dtypes["head.weight"]) == (torch.bfloat16, torch.float32)


def test_the_model_does_not_change_with_its_file(folder: Path) -> None:
    model = load_checkpoint(folder)[0]
    before = model.get_parameter("head.weight").clone()
    path = folder / "model_000200.pt"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(model.get_parameter("head.weight"), before)


def test_constants_of_changed_code_are_handed_on(folder: Path) -> None:
    config = load_checkpoint(folder, soft_cap=20.0)[0].config
    assert config is not None
    assert config.soft_cap == 20.0
    with pytest.raises(ConfigError, match="depth cannot be given"):
        load_checkpoint(folder, depth=2)


def test_the_tokenizer_is_found_given_or_left_out(folder: Path, tmp_path: Path) -> None:
    text = "the weather in 1066, naïve 鯨\n\n  ok"
    expected = encoding().encode_ordinary(text)
    pickled = folder.parent.parent / "tokenizer"
    for given in ("auto", pickled, pickled / "tokenizer.pkl"):
        tokenizer = load_checkpoint(folder, tokenizer=given)[1]
        assert tokenizer is not None
        assert tokenizer.encode(text) == expected
    assert load_checkpoint(folder, tokenizer=None)[1] is None
    with pytest.raises(CheckpointError, match=r"holds neither tokenizer\.pkl nor tokenizer\.json"):
        load_checkpoint(folder, tokenizer=tmp_path)


def test_a_tokenizer_beside_the_weights_comes_first(folder: Path) -> None:
    (folder / "tokenizer.pkl").write_bytes(b"not a tokenizer")
    with pytest.raises(DataError, match=r"d2.tokenizer\.pkl"):
        load_checkpoint(folder)


def test_a_tokenizer_json_is_read_as_well(tmp_path: Path) -> None:
    saved = Path(__file__).parents[1] / "data_files" / "tokenizer" / "gpt2.json"
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(saved.read_text())["tokenizer"]))
    vocab_size = load_tokenizer_json(tmp_path / "tokenizer.json").vocab_size
    config = CONFIG | {"vocab_size": vocab_size}
    tokenizer = load_checkpoint(write_folder(tmp_path, random_weights(config, era=3), config))[1]
    assert tokenizer is not None
    assert tokenizer.vocab_size == vocab_size


def test_a_tokenizer_of_another_vocabulary_is_refused(folder: Path) -> None:
    config = CONFIG | {"vocab_size": 271}
    write_folder(folder, random_weights(config, era=3), config, step=300)
    with pytest.raises(CheckpointError, match="has 270 tokens, the model 271: it is another run's"):
        load_checkpoint(folder)


def test_a_folder_without_checkpoints_says_where_some_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no file named like model_N\.pt; its folders d2 do"):
        load_checkpoint(folder.parent)
    with pytest.raises(CheckpointError, match="there is no folder"):
        load_checkpoint(tmp_path / "nowhere")


class Touch:
    """Pickled, it asks for a command to be run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_hostile_model_file_runs_nothing(folder: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    torch.save({"lm_head.weight": Touch(touched)}, folder / "model_000200.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors, and was not loaded") as caught:
        load_checkpoint(folder)
    assert "weights_only=False" not in str(caught.value)
    (folder / "model_000200.pt").write_bytes(pickle.dumps(Touch(touched)))
    with pytest.raises(CheckpointError, match="was not loaded"):
        load_checkpoint(folder)
    assert not touched.exists()


def test_a_small_file_cannot_declare_a_large_model(folder: Path) -> None:
    weights = random_weights(CONFIG, era=3)
    spread = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in weights.items()}
    torch.save(spread, folder / "model_000200.pt")
    with pytest.raises(CheckpointError, match="would take more bytes than the file has"):
        load_checkpoint(folder)


@pytest.mark.parametrize("cut", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_model_file_is_refused(folder: Path, cut: float) -> None:
    path = folder / "model_000200.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(folder)


def test_a_flipped_bit_in_a_weight_is_refused(folder: Path) -> None:
    path = folder / "model_000200.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged.*the checksum of .*data/\d+ is wrong"):
        load_checkpoint(folder)


def test_a_compressed_model_file_is_refused(folder: Path) -> None:
    path = folder / "model_000200.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="its parts are compressed or overlap"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [[1, 2], {"lm_head.weight": 3}, torch.ones(3), None])
def test_a_model_file_of_something_else_is_refused(folder: Path, content: Any) -> None:
    torch.save(content, folder / "model_000200.pt")
    with pytest.raises(CheckpointError, match=r"weights of a model|state dict maps names"):
        load_checkpoint(folder)


def test_errors_name_the_file(folder: Path) -> None:
    weights: dict[str, Tensor] = random_weights(CONFIG, era=3)
    del weights["lm_head.weight"]
    torch.save(weights, folder / "model_000200.pt")
    with pytest.raises(CheckpointError, match=r"model_000200\.pt: .* lack lm_head\.weight"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is not a JSON object"),
        ("{}", "has no model_config"),
        ('{"model_config": 3}', "has no model_config"),
        ('{"model_config": {}, "step": 7}', "is of step 7 by its own account"),
        ('{"model_config": {}, "user_config": [1]}', "user_config is no JSON object"),
        ('{"model_config": {}, "loop_state": "x"}', "loop_state is no JSON object"),
        ('{"model_config": {}, "val_bpb": "low"}', "val_bpb is 'low' and not a number"),
        ('{"model_config": {}, "loop_state": {"total_training_time": []}}', "total_training_time is"),
        ('{"model_config": {}}', "model_config lacks sequence_len"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_metadata_that_is_wrong_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "meta_000200.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, tokenizer=None)


def test_missing_and_endless_metadata_are_refused(folder: Path) -> None:
    path = folder / "meta_000200.json"
    path.unlink()
    with pytest.raises(CheckpointError, match=r"meta_000200\.json is missing"):
        load_checkpoint(folder)
    path.write_text(" " * (33 << 20))
    with pytest.raises(CheckpointError, match="more than 33,554,432 are not read"):
        load_checkpoint(folder)


def test_wrong_devices_and_paths_say_what_to_do(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device='gpu' cannot be used here"):
        load_checkpoint(folder, device="gpu")
    with pytest.raises(CheckpointError, match=r"model_\d+\.pt; it is a file, give its folder"):
        load_checkpoint(next(folder.glob("model_*.pt")))
    with pytest.raises(CheckpointError, match="has no step '100'; it has 100"):
        load_checkpoint(folder, "100")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"is of nanochat; read it with tinygpt\.interop\.nanochat"):
        GPT.from_pretrained(folder)
