"""A model and a run pushed to a Hub and loaded from it, against a real HTTP server in fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import HubServer, serve_hub

EXAMPLE = Path(__file__).parents[2] / "examples" / "reproduce_rtx4070_d12.py"


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
loaded = GPT.from_pretrained("user/tiny")
assert torch.equal(loaded(torch.tensor([[256, 1]])), model(torch.tensor([[256, 1]])))
"""
    with serve_hub() as hub:
        done = run(hub, tmp_path, "-c", code)
        assert done.returncode == 0, done.stderr
        files = hub.repos["user/tiny"].commits[hub.repos["user/tiny"].branches["main"]]
        assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= files.keys()


@pytest.mark.parametrize("broken", [False, True])
def test_the_example_pushes_each_checkpoint_and_goes_on_without_a_hub(tmp_path: Path, broken: bool) -> None:
    with serve_hub() as hub:
        if broken:
            hub.fail("POST", "/api/repos/create", status=401)
        done = run(hub, tmp_path, str(EXAMPLE), "--scale", "smoke", "--out", "run", "--push-to-hub", "user/tiny")
        assert done.returncode == 0, done.stderr
        assert "loaded again" in done.stdout
        if broken:
            assert done.stderr.count("not uploaded:") == 3
            return
        repo = hub.repos["user/tiny"]
        assert len(repo.commits) >= 3
        files = repo.commits[repo.branches["main"]]
        local = tmp_path / "run" / "checkpoints" / "step-000012"
        assert {name for name in files if name != ".gitattributes"} == {
            "config.json",
            "model.safetensors",
            "tokenizer.tiktoken",
            "tokenizer_config.json",
        }
        assert files["model.safetensors"] == (local / "model.safetensors").read_bytes()
