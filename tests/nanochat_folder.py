"""Folders as nanochat writes them, and its model in a few lines, both written without tinygpt.interop."""

import json
import pickle
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

# nanochat's split pattern, and its special tokens.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL = ["bos", "user_start", "user_end", "assistant_start", "assistant_end"]
SPECIAL += ["python_start", "python_end", "output_start", "output_end"]
MERGES = [b"th", b"the", b" w", b" the", b"10"]


def encoding() -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *MERGES])}
    special = {f"<|{name}|>": len(ranks) + index for index, name in enumerate(SPECIAL)}
    return tiktoken.Encoding("rustbpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def write_folder(
    folder: Path,
    weights: dict[str, Tensor],
    config: dict[str, Any],
    *,
    step: int = 100,
    optimizers: list[Any] | None = None,
    **fields: Any,
) -> Path:
    """Write a checkpoint as nanochat's `save_checkpoint` does, one optimizer file a rank."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / f"model_{step:06d}.pt")
    for rank, state in enumerate(optimizers or []):
        torch.save(state, folder / f"optim_{step:06d}_rank{rank}.pt")
    meta = {
        "step": step,
        "val_bpb": 1.25,
        "model_config": config,
        "user_config": {"depth": config.get("n_layer"), "total_batch_size": -1},
        "total_batch_size": 512,
        "loop_state": {"min_val_bpb": 1.25, "smooth_train_loss": 3.5, "total_training_time": 60.5},
    }
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta | fields, indent=2))
    return folder


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding()))
    return path


def random_weights(
    config: dict[str, Any], *, era: int, rows: int | None = None, gate_channels: int = 12
) -> dict[str, Tensor]:
    """The tensors of a model with the parts of 2025 (era 0), with lambdas (1), value embeddings (2) and smear (3)."""
    dim, heads, kv_heads, layers = (config[key] for key in ("n_embd", "n_head", "n_kv_head", "n_layer"))
    rows, kv_dim = rows or -(-config["vocab_size"] // 64) * 64, dim // heads * kv_heads
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    weights = {"transformer.wte.weight": draw(rows, dim), "lm_head.weight": draw(rows, dim)}
    for layer in range(layers):
        attention, mlp = (f"transformer.h.{layer}.{part}" for part in ("attn", "mlp"))
        weights |= {f"{attention}.{name}.weight": draw(dim, dim) for name in ("c_q", "c_proj")}
        weights |= {f"{attention}.{name}.weight": draw(kv_dim, dim) for name in ("c_k", "c_v")}
        weights |= {f"{mlp}.c_fc.weight": draw(4 * dim, dim), f"{mlp}.c_proj.weight": draw(dim, 4 * dim)}
        if era >= 2 and (layers - 1 - layer) % 2 == 0:
            weights |= {
                f"value_embeds.{layer}.weight": draw(rows, kv_dim),
                f"{attention}.ve_gate.weight": draw(kv_heads, gate_channels),
            }
    if era >= 1:
        weights |= {"resid_lambdas": 1 + 0.1 * draw(layers), "x0_lambdas": draw(layers)}
    if era >= 3:
        weights |= {"smear_gate.weight": draw(1, 24), "smear_lambda": draw(1), "backout_lambda": draw(1)}
    return weights


def logits_of(
    weights: dict[str, Tensor],
    config: dict[str, Any],
    ids: Tensor,
    *,
    base: float,
    scale: float,
    window: int,
    cap: float = 15.0,
) -> Tensor:
    """What nanochat computes, `(batch, seq)` to `(batch, seq, vocab)`: the same steps, written plainly."""
    heads, kv_heads, layers = config["n_head"], config["n_kv_head"], config["n_layer"]
    seq, head_dim = ids.shape[1], config["n_embd"] // heads
    frequencies = torch.tensor([base ** (-2 * pair / head_dim) for pair in range(head_dim // 2)])
    turn = torch.polar(torch.ones(()), -torch.outer(torch.arange(seq).float(), frequencies))
    distance = torch.arange(seq)[:, None] - torch.arange(seq)[None, :]

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    def split(x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:2], count, head_dim).transpose(1, 2)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :]) * turn
        return norm(torch.cat((pairs.real, pairs.imag), -1)) * scale

    x = norm(weights["transformer.wte.weight"][ids])
    if "smear_lambda" in weights:
        gate = weights["smear_lambda"] * torch.sigmoid(x[:, 1:, :24] @ weights["smear_gate.weight"].T)
        x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), 1)
    first = middle = x
    for layer in range(layers):
        if "resid_lambdas" in weights:
            x = weights["resid_lambdas"][layer] * x + weights["x0_lambdas"][layer] * first
        matrix = {
            name: weights[f"transformer.h.{layer}.{name}.weight"]
            for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        }
        y = norm(x)
        q, k = (rotated(split(y @ matrix[f"attn.c_{name}"].T, n)) for name, n in (("q", heads), ("k", kv_heads)))
        v = split(y @ matrix["attn.c_v"].T, kv_heads)
        if f"value_embeds.{layer}.weight" in weights:
            gate_weight = weights[f"transformer.h.{layer}.attn.ve_gate.weight"]
            channels = gate_weight.shape[1]
            gate = {12: 3, 32: 2}[channels] * torch.sigmoid(y[..., :channels] @ gate_weight.T)
            extra = split(weights[f"value_embeds.{layer}.weight"][ids], kv_heads)
            v = v + gate.transpose(1, 2)[..., None] * extra
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        pattern = config.get("window_pattern", "L")
        short = pattern[layer % len(pattern)] == "S" and layer < layers - 1
        hidden = (distance < 0) | (distance > (window if short else seq))
        scores = (q @ k.mT / head_dim**0.5).masked_fill(hidden, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ matrix["attn.c_proj"].T
        x = x + F.relu(norm(x) @ matrix["mlp.c_fc"].T).square() @ matrix["mlp.c_proj"].T
        if layer == layers // 2:
            middle = x
    if "backout_lambda" in weights:
        x = x - weights["backout_lambda"] * middle
    logits = (norm(x) @ weights["lm_head.weight"].T)[..., : config["vocab_size"]]
    return cap * torch.tanh(logits / cap)


def optimizer_state(weights: dict[str, Tensor]) -> dict[str, Any]:
    """A state of one process in nanochat's layout, with moments of an invented past."""
    matrices = [name for name in weights if name.startswith("transformer.h.")]
    # nanochat makes gates after the four projections of an attention, and the MLP after those.
    parts = ["c_q", "c_k", "c_v", "attn.c_proj", "ve_gate", "c_fc", "mlp.c_proj"]
    matrices.sort(key=lambda name: (int(name.split(".")[2]), next(i for i, part in enumerate(parts) if part in name)))
    adamw = {
        0.004: ["lm_head.weight"],
        0.2: ["transformer.wte.weight"],
        0.1: [name for name in weights if name.startswith("value_embeds.")],
        0.005: ["resid_lambdas"],
        0.5: ["x0_lambdas"],
        0.21: ["smear_gate.weight", "smear_lambda", "backout_lambda"],
    }
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for lr, names in adamw.items():
        ids = list(range(len(state), len(state) + len(names)))
        options = {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        groups.append({"params": ids, "lr": lr, "initial_lr": lr, **options})
        for place, name in zip(ids, names, strict=True):
            moment = 1e-3 * torch.ones_like(weights[name])
            state[place] = {"step": 100, "exp_avg": moment, "exp_avg_sq": moment.square()}
    place = len(state)
    for rows, cols in sorted({tuple(weights[name].shape) for name in matrices}):
        count = sum(tuple(weights[name].shape) == (rows, cols) for name in matrices)
        options = {"kind": "muon", "momentum": 0.97, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.05}
        groups.append({"params": list(range(place, place + count)), "lr": 0.02, "initial_lr": 0.02, **options})
        factored = (rows, 1) if rows >= cols else (1, cols)
        state[place] = {
            "momentum_buffer": 1e-3 * torch.randn(count, rows, cols, generator=torch.Generator().manual_seed(place)),
            "second_momentum_buffer": torch.full((count, *factored), 1 / max(rows, cols)),
        }
        place += count
    return {"state": state, "param_groups": groups}


def write_example(base: Path) -> None:
    """Write what the guide "From nanochat" reads: a small model at step 100, its optimizer and its tokenizer."""
    config = {"sequence_len": 64, "vocab_size": 270, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    weights = random_weights(config, era=3)
    write_tokenizer(base / "tokenizer")
    folder = base / "base_checkpoints" / "d12"
    write_folder(folder, weights, config | {"window_pattern": "SSSL"}, optimizers=[optimizer_state(weights)])
