"""A checkpoint of transformers in our parts."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tinygpt import hub
from tinygpt.errors import CheckpointError, ConfigError, DataError
from tinygpt.interop.huggingface._export import MODEL_TYPE
from tinygpt.interop.huggingface._read import read_own_config, read_stock_config
from tinygpt.interop.huggingface._stock import qk_norm_names, stock_names
from tinygpt.interop.huggingface._structure import MLP_TYPES
from tinygpt.layers import RotaryEmbedding, SwiGLU
from tinygpt.manifest import read_json
from tinygpt.model import GPT, GPTConfig, check_device
from tinygpt.model._files import check_dtype
from tinygpt.tokenizer import BOS_TOKEN, BPETokenizer, load_tokenizer_json

_INDEX_FILE = "model.safetensors.index.json"
_OLD_BUFFER = ".rotary_emb.inv_freq"  # early Llamas saved this table, which follows from the config


class Imported(NamedTuple):
    """What `from_transformers` read.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer, `None` if it does not map exactly.
        tokenizer_problem: Why there is none.
    """

    model: GPT
    tokenizer: BPETokenizer | None
    tokenizer_problem: str | None


def llama_mlp(config: GPTConfig, layer: int) -> nn.Module:
    """Build the feed-forward layer of a Llama: `GPT.from_pretrained(folder, mlp=llama_mlp)` loads a saved import."""
    return SwiGLU(config.dim, config.hidden_dim or 4 * config.dim)


def from_transformers(
    source: str | Path | nn.Module,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Imported:
    """Read a checkpoint of transformers into our parts, with the same logits.

    These are read: Llama and what equals it (Mistral without a window), Arcee, Qwen3 whose query and key norms are one
    number, stripped NanoChat, and every folder that `export` wrote. Safetensors only: nothing is unpickled and no code
    of the checkpoint runs.

    Args:
        source: A folder, a Hub name, or a model of transformers in memory.
        revision: Branch, tag or commit of the repository.
        device: Where to put the weights.
        dtype: Cast the weights; `None` keeps what was saved, often bfloat16, which is slow on most CPUs.
        cache_dir: Where downloads are kept.
        local_files_only: Never ask the network.
        token: Access token for a private repository.

    Returns:
        The model, and the tokenizer where it maps exactly. A head tied to the embedding stays tied in memory; saved
        with `save_pretrained` it is two equal tables.

    Raises:
        HubError: If it is neither a folder nor a repository that can be read.
        CheckpointError: If the config has something without counterpart here, which the error names, or a file is
            missing or damaged, or names or shapes of weights do not fit.
        ConfigError: If `dtype` is no floating-point dtype, or torch has no such device here.

    Example:
        ```python no-run: needs the checkpoint
        import torch
        from tinygpt import GPT
        from tinygpt.interop.huggingface import from_transformers, llama_mlp

        model, tokenizer, problem = from_transformers("HuggingFaceTB/SmolLM2-135M", dtype=torch.float32)
        model.save_pretrained("smollm2")
        same = GPT.from_pretrained("smollm2", mlp=llama_mlp)
        ```
    """
    check_dtype(dtype)
    device = check_device(device)
    if isinstance(source, str | Path):
        folder = hub.resolve(
            source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        where, fields = str(folder / "config.json"), read_json(folder / "config.json")
        weights = _read_weights(folder)
        model = _build(fields, weights, where, device, dtype)
        return Imported(model, *_tokenizer(folder, fields["vocab_size"]))
    theirs: Any = getattr(source, "config", None)
    if not isinstance(source, nn.Module) or not hasattr(theirs, "to_dict"):
        raise ConfigError(f"give a folder, a Hub name or a model of transformers, not {type(source).__name__}.")
    weights = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    fields = theirs.to_dict()
    fields.pop("quantization_config", None)  # it may have been loaded into plain tensors; packed ones have other shapes
    model = _build(fields, weights, type(source).__name__, device, dtype)
    return Imported(model, None, "a model in memory comes without its tokenizer.")


def _build(
    fields: dict[str, Any],
    weights: dict[str, Tensor],
    where: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> GPT:
    tied = fields.get("tie_word_embeddings", False)
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(_OLD_BUFFER)}
    if fields.get("model_type") == MODEL_TYPE:
        config, mlp_types, hidden_dims = read_own_config(fields, where)
        names = None
    else:
        family, config, mlp_type = read_stock_config(fields, where)
        mlp_types, hidden_dims = [mlp_type] * config.num_layers, [fields["intermediate_size"]] * config.num_layers
        names = stock_names(family, config.num_layers, tied=tied, gated=mlp_type == "swiglu")
        if family.qk_norm == "weighted":
            config = config.replace(qk_scale=_take_qk_scale(weights, config, where))
    classes = {name: kind for kind, name in MLP_TYPES.items()}
    try:
        with torch.device("meta"):
            model = GPT.from_config(config, mlp=lambda config, i: classes[mlp_types[i]](config.dim, hidden_dims[i]))
    except (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} describes a model that cannot be built: {error}.") from None
    if names is None:
        names = {name: name for name in model.state_dict() if not (tied and name == "head.weight")}
    if tied:
        _drop_equal_head(weights, names, where)
    _check(weights, {theirs: model.state_dict()[ours].shape for theirs, ours in names.items()}, where)
    ours = {name: weights[theirs].to(device, dtype) for theirs, name in names.items()}
    if tied:
        ours["head.weight"] = ours["embedding.weight"]
    model.load_state_dict(ours, strict=True, assign=True)
    if tied:
        head: Any = model.head
        head.weight = model.embedding.weight
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.to_empty(device=device)  # which fills its tables
    return model


def _take_qk_scale(weights: dict[str, Tensor], config: GPTConfig, where: str) -> float:
    """Take the weights of Qwen3's query and key norms out and return the one number that they all are."""
    found = [weights.pop(name, None) for name in qk_norm_names(config.num_layers)]
    values = torch.cat([torch.full((1,), float("nan")) if t is None else t.float().flatten() for t in found])
    if not bool((values == values[0]).all()) or not values[0] > 0:
        raise CheckpointError(
            f"{where} cannot be mapped exactly: q_norm and k_norm have a weight for each channel, where qk_scale is "
            "one number for all."
        )
    return float(values[0])


def _drop_equal_head(weights: dict[str, Tensor], names: dict[str, str], where: str) -> None:
    """Take out a second copy of a tied table.

    Raises:
        CheckpointError: If it is another table.
    """
    table = next(theirs for theirs, ours in names.items() if ours == "embedding.weight")
    for head in ("lm_head.weight", "head.weight"):
        copy = weights.pop(head, None)
        if copy is not None and table in weights and not torch.equal(copy, weights[table]):
            raise CheckpointError(f"{where} says tie_word_embeddings, but {head} and {table} differ.")


def _check(weights: dict[str, Tensor], expected: dict[str, torch.Size], where: str) -> None:
    problems = [f"it lacks {name}" for name in expected if name not in weights]
    problems += [f"{name} has no place in the model" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    problems += [f"{name} is of {tensor.dtype}" for name, tensor in weights.items() if not tensor.is_floating_point()]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"the weights of {where} do not fit its config: {', '.join(problems[:8])}{more}.")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of the one file or of all shards; on a CPU they stay mapped from the file."""
    files = ["model.safetensors"]
    if (folder / _INDEX_FILE).exists():
        listed = read_json(folder / _INDEX_FILE).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(f"{folder / _INDEX_FILE} is damaged: it has no weight_map.")
        files = sorted(set(listed.values()))
        if outside := [name for name in files if Path(name).name != name]:
            raise CheckpointError(f"{folder / _INDEX_FILE} names {outside[0]!r}, which lies outside the folder.")
    elif not (folder / files[0]).exists() and list(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds pickled weights only, which are not read because they can run code; load it with "
            "transformers once and save_pretrained writes safetensors."
        )
    weights: dict[str, Tensor] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name} is missing or damaged: {error}.") from None
    return weights


def _tokenizer(folder: Path, vocab_size: int) -> tuple[BPETokenizer | None, str | None]:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None, f"{folder} has no tokenizer.json."
    try:
        tokenizer = load_tokenizer_json(path)
    except DataError as error:
        return None, str(error)
    # The reader adds those of our special tokens that the file lacks; the model has never seen them.
    known = {token["content"] for token in read_json(path).get("added_tokens") or []}
    special = [text for text in tokenizer.special_tokens if text in known]
    if BOS_TOKEN not in special:
        return None, f"{path} has no {BOS_TOKEN}; encode with transformers' tokenizer and hand its ids to the model."
    tokenizer = BPETokenizer(tokenizer.ranks, pattern=tokenizer.pattern, special_tokens=special)
    if tokenizer.vocab_size > vocab_size:
        return None, f"{path} has {tokenizer.vocab_size} ids, more than the model's {vocab_size}."
    return tokenizer, None
