"""A model and a run pushed to a Hub and loaded from it, against a real HTTP server in fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import HubServer, serve_hub
from tinygpt import GPT, GPTConfig
from tinygpt.errors import CheckpointError, ConfigError, HubError
from tinygpt.manifest import write_manifest
from tinygpt.tokenizer import ByteTokenizer, load_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "reproduce_rtx4070_d12.py"


def tiny() -> GPT:
    return GPT.from_config(GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=16))


def run(hub: HubServer, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=home, capture_output=True, text=True, timeout=120
    )


def test_a_pushed_model_loads_by_its_name_with_the_same_logits(tmp_path: Path) -> None:
    code = """
import torch
from tinygpt import GPT, GPTConfig
from tinygpt.tokenizer import ByteTokenizer, load_tokenizer
model = GPT.from_config(GPTConfig.from_depth(2, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=16))
ByteTokenizer().save("model")
print(model.push_to_hub("user/tiny", folder="model", private=True, commit_message="first"))
print(model.push_to_hub("user/tiny", tokenizer=ByteTokenizer(), card="---\\nlicense: mit\\n---\\n", tags="v1"))
loaded = GPT.from_pretrained("user/tiny", revision="v1")
assert torch.equal(loaded(torch.tensor([[256, 1]])), model(torch.tensor([[256, 1]])))
"""
    with serve_hub() as hub:
        done = run(hub, tmp_path, "-c", code)
        assert done.returncode == 0, done.stderr
        files = hub.repos["user/tiny"].commits[hub.repos["user/tiny"].branches["main"]]
        assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= files.keys()
        assert hub.repos["user/tiny"].files("v1")["README.md"] == b"---\nlicense: mit\n---\n"


@pytest.mark.parametrize("broken", [False, True])
def test_the_example_pushes_each_checkpoint_and_goes_on_without_a_hub(tmp_path: Path, broken: bool) -> None:
    with serve_hub() as hub:
        if broken:
            hub.fail("POST", "/api/repos/create", status=401)
        done = run(hub, tmp_path, str(EXAMPLE), "--scale", "smoke", "--out", "run", "--push-to-hub", "user/tiny")
        assert done.returncode == 0, done.stderr
        assert "loaded again" in done.stdout
        if broken:
            assert "checkpoints are not pushed yet" in done.stderr
            hub.heal()
            done = run(hub, tmp_path, "-m", "tinygpt", "push", "run")
            assert done.returncode == 0, done.stderr
        repo = hub.repos["user/tiny"]
        assert {"step-4", "step-8", "step-12"} <= set(repo.tags)
        files = repo.commits[repo.branches["main"]]
        local = tmp_path / "run" / "checkpoints" / "step-000012"
        assert {"README.md", "config.json", "model.safetensors", "tokenizer_config.json"} <= set(files)
        assert files["model.safetensors"] == (local / "model.safetensors").read_bytes()


def test_a_saved_model_takes_its_tokenizer_along(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model", ByteTokenizer())
    assert load_tokenizer(tmp_path / "model").fingerprint() == ByteTokenizer().fingerprint()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    model = GPT.from_config(GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=256, max_seq_len=16))
    with pytest.raises(ConfigError, match="the tokenizer has 257 ids, more than the model's vocab_size=256"):
        model.save_pretrained(tmp_path / "model", ByteTokenizer())
    assert not (tmp_path / "model").exists()


def test_a_model_is_not_saved_over_the_one_in_a_checkpoint(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    write_manifest(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="is a checkpoint, which is written as a whole; choose another folder"):
        tiny().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_devices_and_dtypes_that_are_none_are_refused_first() -> None:
    for device in ("gpu", "cuda:99", 3.5):
        with pytest.raises(ConfigError, match=r"device=.* cannot be used here .*; take 'cpu', or 'cuda' with a GPU"):
            GPT.from_pretrained("user/never-asked-for", device=device)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"dtype 'bfloat16' is not a floating-point dtype; use torch\.bfloat16"):
        GPT.from_pretrained("user/never-asked-for", dtype="bfloat16")  # type: ignore[arg-type]


def test_a_model_is_not_pushed_under_no_name_nor_without_a_config() -> None:
    with pytest.raises(HubError, match="'tiny' is not a Hub name"):
        tiny().push_to_hub("tiny")
    own = tiny()
    own.config = None
    with pytest.raises(ConfigError, match="assembled without a config"):
        own.push_to_hub("user/tiny")


def test_what_is_no_tokenizer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=r"tokenizer=.gpt2. is no tinygpt\.tokenizer\.Tokenizer"):
        model.save_pretrained(tmp_path / "model", "gpt2")  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


def test_an_argument_of_another_library_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(ConfigError, match="from_pretrained has no argument 'torch_dtype'; besides revision, device"):
        GPT.from_pretrained("user/never-asked-for", torch_dtype="bfloat16")  # type: ignore[arg-type]
