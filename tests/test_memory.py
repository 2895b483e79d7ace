import subprocess
import sys

import pytest
import torch

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError
from tinygpt.layers import Linear, TokenEmbedding
from tinygpt.memory import training_memory
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups

MEASURE = """
import itertools, torch
from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.data import Batch
from tinygpt.memory import training_memory
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups

def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(status.read().split("VmHWM:")[1].split()[0])

def train(config, rows, seq_len):
    model = GPT.from_config(config)
    optimizer = MuonAdamW(param_groups(model, nanochat_rules(model_dim=config.dim)))
    ids = torch.randint(config.vocab_size, (rows, seq_len))
    list(Trainer(model, optimizer, itertools.repeat(Batch(ids, ids)), TrainerConfig(num_steps=2)))
    return training_memory(model, optimizer, rows=rows, seq_len=seq_len).total

train(GPTConfig.from_depth(1, vocab_size=64, max_seq_len=16), 1, 16)  # what torch takes once
before = peak()
print(train(GPTConfig.from_depth(4, vocab_size=8192, max_seq_len=512), 8, 512) / (peak() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_estimate_is_near_the_peak_of_a_real_run() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.75 < float(done.stdout) < 1.25


def test_the_documented_run_fits_its_card_and_parts_are_exact() -> None:
    with torch.device("meta"):
        model = GPT.from_config(GPTConfig.from_depth(12)).set_compute_dtype(torch.bfloat16, embeddings=True)
        optimizer = MuonAdamW(param_groups(model, nanochat_rules(model_dim=768)))
    memory = training_memory(model, optimizer, rows=8, seq_len=2048)
    tables = 25_165_824 + 150_994_944
    others = 286_261_730 - tables
    assert memory.weights == memory.gradients == 2 * tables + 4 * others
    assert memory.optimizer == 4 * (84_935_088 + 2 * (286_261_730 - 84_935_088))
    assert memory.total < 12 * 2**30


def test_a_model_without_config_is_refused() -> None:
    model = GPT(embedding=TokenEmbedding(4, 4), blocks=[Linear(4, 4)], head=Linear(4, 4))
    with pytest.raises(ConfigError, match="needs a model with a config"):
        training_memory(model, torch.optim.SGD(model.parameters()), rows=1, seq_len=4)
