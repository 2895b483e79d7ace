"""An exported folder gives transformers the same logits, the same greedy text, and needs no tinygpt.

The reference is the installed transformers: its stock classes, its cache and its `generate`.
"""

import ast
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinygpt.interop.huggingface as interop
from tinygpt import GPT, GPTConfig
from tinygpt.errors import CheckpointError, ConfigError, DataError, HubError
from tinygpt.generate import generate
from tinygpt.interop.huggingface import export, from_transformers, stock_architecture
from tinygpt.layers import GeluMLP, Linear, ReluSquaredMLP, SwiGLU
from tinygpt.tokenizer import ByteTokenizer, train_bpe

BOS = ByteTokenizer().bos_token_id
SHAPE = {"num_layers": 3, "dim": 32, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 257, "max_seq_len": 64}
PLAIN = dict.fromkeys(("value_embeddings", "residual_scales", "x0_scales", "smear", "backout"), False)
LLAMA = {**SHAPE, **PLAIN, "qk_norm": False, "soft_cap": None, "embedding_norm": False}
SWITCHES = (*PLAIN, "rotary", "rope_clockwise", "qk_norm", "norm_weight", "embedding_norm")
WINDOWS = {"window_pattern": "SL", "short_window_tokens": 5}


@dataclasses.dataclass(frozen=True)
class Case:
    config: GPTConfig
    mlp: type[ReluSquaredMLP] | type[GeluMLP] | type[SwiGLU]
    architecture: str | None


CASES = {
    "everything": Case(GPTConfig(**SHAPE, **WINDOWS), ReluSquaredMLP, None),
    "everything off": Case(GPTConfig(**LLAMA, rotary=False, norm_weight=True, norm_eps=1e-3), GeluMLP, None),
    "windows": Case(GPTConfig(**LLAMA, **WINDOWS), SwiGLU, None),
    "llama": Case(
        GPTConfig(**LLAMA, norm_weight=True, norm_eps=1e-3, rope_clockwise=False), SwiGLU, "LlamaForCausalLM"
    ),
    "llama, clockwise": Case(GPTConfig(**LLAMA), SwiGLU, "LlamaForCausalLM"),
    "arcee": Case(GPTConfig(**LLAMA), ReluSquaredMLP, "ArceeForCausalLM"),
    "arcee, gelu": Case(GPTConfig(**LLAMA, rope_base=500.0), GeluMLP, "ArceeForCausalLM"),
    "qwen3": Case(GPTConfig(**{**LLAMA, **WINDOWS, "qk_norm": True, "norm_eps": 1e-3}), SwiGLU, "Qwen3ForCausalLM"),
    "nanochat": Case(GPTConfig(**SHAPE, **PLAIN, qk_scale=1.0), ReluSquaredMLP, "NanoChatForCausalLM"),
    "nanochat, other way round": Case(
        GPTConfig(**SHAPE, **PLAIN, qk_scale=1.0, rope_clockwise=False, soft_cap=None), GeluMLP, "NanoChatForCausalLM"
    ),
}


def make(config: GPTConfig, mlp: Callable[..., nn.Module] = ReluSquaredMLP) -> GPT:
    """Build a model in which every weight matters: none is zero, as fresh ones are, and logits are far from even."""
    torch.manual_seed(0)
    model = GPT.from_config(config, mlp=lambda config, layer: mlp(config.dim, 3 * config.dim))
    with torch.no_grad():
        for parameter in model.parameters():
            around = 0.5 if parameter.numel() == 1 else float(parameter.ndim == 1)
            parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    return model.eval()


def token_ids(rows: int = 2, seq: int = 40) -> Tensor:
    return torch.randint(0, BOS, (rows, seq), generator=torch.Generator().manual_seed(1))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[GPT, Path]]:
    """Return a model and its export, each made once."""
    made: dict[str, tuple[GPT, Path]] = {}

    def get(name: str) -> tuple[GPT, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("exported") / "model"
            model = make(CASES[name].config, CASES[name].mlp)
            assert export(model, folder, tokenizer=ByteTokenizer()).architecture == CASES[name].architecture
            made[name] = model, folder
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_transformers_gives_the_same_logits_and_the_same_greedy_text(name: str, exported: Any) -> None:
    model, folder = exported(name)
    theirs = load(folder)
    assert type(theirs).__name__ == (CASES[name].architecture or "TinyGPTForCausalLM")
    assert (folder / "modeling_tinygpt.py").exists() == (CASES[name].architecture is None)
    ids = token_ids()
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-4)

    prompt = [BOS, *b"whale"]
    ours = generate(model, prompt, max_new_tokens=30, temperature=0, stop_tokens=[BOS])
    read = torch.tensor([prompt])
    written = theirs.generate(read, attention_mask=read.ge(0), max_new_tokens=30, do_sample=False)[0, len(prompt) :]
    assert written.tolist() == (ours if len(ours) == 30 else [*ours, BOS])


@settings(max_examples=12)
@given(
    numbers=st.fixed_dictionaries(
        {
            "vocab_size": st.sampled_from([7, 64, 257]),
            "max_seq_len": st.sampled_from([8, 33, 130]),
            "num_layers": st.integers(1, 3),
            "num_kv_heads": st.sampled_from([None, 1, 2, 4]),
            "vocab_multiple": st.sampled_from([1, 3, 64]),
            "window_pattern": st.text("SL", min_size=1, max_size=3),
            "short_window_tokens": st.sampled_from([None, 1, 15]),
            "rope_base": st.sampled_from([10.0, 100_000.0]),
            "qk_scale": st.sampled_from([0.3, 1.0, 1.2]),
            "norm_eps": st.sampled_from([None, 1e-2]),
            "soft_cap": st.sampled_from([None, 0.5, 15.0]),
            "value_gate_channels": st.sampled_from([1, 12, 32]),
            "value_gate_scale": st.sampled_from([2.0, 3.0]),
        }
    ),
    switches=st.fixed_dictionaries(dict.fromkeys(SWITCHES, st.booleans())),
    mlp=st.sampled_from([ReluSquaredMLP, GeluMLP, SwiGLU]),
)
def test_any_config_gives_the_same_logits_there_and_the_same_model_back(
    numbers: dict[str, Any], switches: dict[str, bool], mlp: type[nn.Module]
) -> None:
    config = GPTConfig(dim=32, num_heads=4, **numbers, **switches)
    model, ids = make(config, mlp), token_ids(seq=config.max_seq_len) % config.vocab_size
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export(model, folder)
        expected = model(ids)
        for logits in (load(Path(folder))(ids).logits, from_transformers(folder).model(ids)):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", ["everything", "windows", "llama"])
@torch.no_grad()
def test_padded_rows_are_continued_as_if_they_were_alone(name: str, exported: Any) -> None:
    theirs, tokenizer = (
        load(exported(name)[1]),
        AutoTokenizer.from_pretrained(exported(name)[1], trust_remote_code=True),
    )
    texts = ["<|bos|>a", "<|bos|>the whale, the whale"]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = theirs.generate(**tokenizer(texts, padding=True, return_tensors="pt"), **options)
    for row, text in zip(together, texts, strict=True):
        alone = theirs.generate(**tokenizer(text, return_tensors="pt"), **options)
        assert row[-12:].tolist() == alone[0, -12:].tolist()


@torch.no_grad()
def test_the_cache_can_be_reordered_cropped_and_read_in_pieces(exported: Any) -> None:
    theirs = load(exported("everything")[1])
    ids = token_ids(1, 12)
    options = {"attention_mask": ids.ge(0), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    beams = [theirs.generate(ids, num_beams=3, use_cache=cache, **options).tolist() for cache in (True, False)]
    assert beams[0] == beams[1]
    greedy = theirs.generate(ids, **options).tolist()
    assert theirs.generate(ids, prompt_lookup_num_tokens=3, **options).tolist() == greedy

    whole = theirs(ids, use_cache=False)
    assert whole.past_key_values is None
    first = theirs(ids[:, :5], use_cache=True)
    rest = theirs(ids[:, 5:], past_key_values=first.past_key_values)
    pieces = torch.cat((first.logits, rest.logits), dim=1)
    torch.testing.assert_close(pieces, whole.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs(ids, logits_to_keep=2).logits, whole.logits[:, -2:], rtol=0, atol=1e-5)
    assert torch.equal(theirs(ids, return_dict=False)[0], whole.logits)


def test_labels_give_the_loss_of_next_tokens(exported: Any) -> None:
    model, folder = exported("everything")
    ids = token_ids()
    total, count = model.loss(ids[:, :-1], ids[:, 1:])
    loss = load(folder)(ids, labels=ids).loss
    torch.testing.assert_close(loss, total / count, rtol=0, atol=1e-5)
    loss.backward()


@torch.no_grad()
def test_what_the_code_does_not_do_is_refused(exported: Any) -> None:
    theirs = load(exported("everything")[1])
    ids = token_ids(1, 4)
    with pytest.raises(ValueError, match="neither attentions nor hidden states"):
        theirs(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, 4\), got \(1, 3\)"):
        theirs(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="takes a DynamicCache only"):
        theirs.generate(ids, attention_mask=ids.ge(0), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(NotImplementedError, match="cannot be resized"):
        theirs.resize_token_embeddings(300)


@pytest.mark.parametrize("name", ["everything", "everything off", "qwen3", "nanochat"])
@torch.no_grad()
def test_a_folder_that_transformers_saved_again_is_the_same_model(name: str, exported: Any, tmp_path: Path) -> None:
    model, folder = exported(name)
    theirs = load(folder)
    theirs.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    ids = token_ids()
    assert torch.equal(load(tmp_path)(ids).logits, theirs(ids).logits)
    torch.testing.assert_close(from_transformers(tmp_path).model(ids), model(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_export_and_import_give_the_model_and_its_tokenizer_back(name: str, exported: Any) -> None:
    model, folder = exported(name)
    back, tokenizer, problem = from_transformers(folder)
    ids = token_ids()
    torch.testing.assert_close(back(ids), model(ids), rtol=0, atol=1e-4)
    assert problem is None
    assert tokenizer is not None
    assert tokenizer.encode("a wh€le") == ByteTokenizer().encode("a wh€le")
    assert (tokenizer.vocab_size, tokenizer.bos_token_id) == (257, BOS)
    if CASES[name].architecture is None:
        assert back.config == model.config
        assert torch.equal(back(ids), model(ids))


@torch.no_grad()
def test_a_head_tied_to_the_embedding_stays_tied(tmp_path: Path) -> None:
    ids = token_ids()
    for name in ("everything", "llama"):
        model = make(CASES[name].config, CASES[name].mlp)
        model.get_submodule("head").weight = model.get_submodule("embedding").weight  # type: ignore[assignment]
        export(model, tmp_path / name)
        theirs, back = load(tmp_path / name), from_transformers(tmp_path / name).model
        assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
        assert back.get_submodule("head").weight is back.get_submodule("embedding").weight
        for other in (theirs(ids).logits, back(ids)):
            torch.testing.assert_close(other, model(ids), rtol=0, atol=1e-4)
        assert len([t for t in load_file(tmp_path / name / "model.safetensors").values() if t.shape[0] >= 257]) == (
            1 + 2 * (name == "everything")  # value embeddings of two layers
        )


def test_a_folder_is_exported_with_its_tokenizer_whichever_layers_it_has(tmp_path: Path) -> None:
    tokenizer = train_bpe(["the whale, the ship"] * 4, vocab_size=270)
    config = GPTConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size})
    model = make(config, lambda dim, width: SwiGLU(dim, width + 1))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save(tmp_path / "saved")
    export(str(tmp_path / "saved"), tmp_path / "out")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("the whale's ship")]])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert theirs("<|bos|>the whale's ship", return_tensors="pt").input_ids.tolist() == ids.tolist()
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out")(ids).logits, model(ids), rtol=0, atol=1e-4)


def test_tables_in_another_dtype_are_written_in_the_most_precise_or_the_one_asked_for(tmp_path: Path) -> None:
    model = make(CASES["everything"].config)
    model.set_compute_dtype(torch.bfloat16, embeddings=True)
    export(model, tmp_path / "mixed")
    assert {t.dtype for t in load_file(tmp_path / "mixed" / "model.safetensors").values()} == {torch.float32}
    assert load(tmp_path / "mixed").dtype == torch.float32
    export(model, tmp_path / "half", dtype=torch.bfloat16)
    half = load(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(half(ids).logits, model.to(torch.bfloat16)(ids), rtol=0, atol=1e-2)
    with pytest.raises(ConfigError, match=r"dtype torch\.int8 is not a floating-point dtype"):
        export(model, tmp_path / "int", dtype=torch.int8)


def test_code_can_be_asked_for_where_a_class_would_do(exported: Any, tmp_path: Path) -> None:
    model, _ = exported("llama")
    assert export(model, tmp_path / "code", stock=False).architecture is None
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "code")(ids).logits, model(ids), rtol=0, atol=1e-4)


def test_the_folder_works_without_tinygpt_and_is_made_without_transformers(exported: Any, tmp_path: Path) -> None:
    model, folder = exported("everything")
    save_file({"logits": model(token_ids()).detach(), "ids": token_ids()}, tmp_path / "expected.safetensors")
    script = f"""
import sys
sys.modules["tinygpt"] = None  # any import of it fails
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file({str(tmp_path / "expected.safetensors")!r})
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert (model(expected["ids"]).logits - expected["logits"]).abs().max() < 1e-4
print("same")
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "same", done.stderr

    sources = Path(interop.__file__).parent.glob("*.py")
    importers = {path.name for path in sources if "transformers" in imported_by(path)}
    assert importers == {"_modeling.py"}  # which is copied and never imported


def imported_by(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


# Which class, and why not.


def test_the_predicate_says_which_class_fits_and_why_others_do_not() -> None:
    for case in CASES.values():
        found = stock_architecture(case.config, mlp=case.mlp)
        assert found.architecture == case.architecture
        assert all(found.reasons.values())
        assert found.architecture not in found.reasons
    why = stock_architecture(GPTConfig()).reasons
    assert set(why) == {"LlamaForCausalLM", "Qwen3ForCausalLM", "ArceeForCausalLM", "NanoChatForCausalLM"}
    assert "it has no value_embeddings" in why["NanoChatForCausalLM"]
    assert "it has no qk_scale, which is 1.2" in why["NanoChatForCausalLM"]
    assert "its feed-forward layers cannot be relu_squared" in why["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"smear": True}, "it has no smear"),
        ({"rotary": False}, "rotary=False"),
        ({"embedding_norm": True}, "it has no embedding_norm"),
        ({"soft_cap": 15.0}, "it has no soft_cap"),
        ({"qk_norm": True}, "it has no qk_norm"),
        (WINDOWS, "its layers have no window"),
    ],
)
def test_each_feature_beyond_llama_is_named(change: dict[str, Any], reason: str) -> None:
    found = stock_architecture(GPTConfig(**{**LLAMA, **change}), mlp=SwiGLU)
    assert any(reason in why for why in found.reasons["LlamaForCausalLM"])


def test_a_window_over_the_whole_context_is_none() -> None:
    wide = GPTConfig(**LLAMA, window_pattern="SL", short_window_tokens=63)
    assert stock_architecture(wide, mlp=SwiGLU).architecture == "LlamaForCausalLM"


def test_the_predicate_refuses_a_layer_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="mlp='Linear' is not one of ReluSquaredMLP, GeluMLP, SwiGLU"):
        stock_architecture(GPTConfig(), mlp=Linear)


# What is refused.


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_parts_that_are_not_ours_are_refused_by_name(tmp_path: Path) -> None:
    def refused(change: Callable[[Any], None], text: str) -> None:
        model = make(CASES["everything"].config)
        change(model)
        with pytest.raises(ConfigError, match=text):
            export(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def attribute(path: str, value: Any) -> Callable[[Any], None]:
        owner, _, name = path.rpartition(".")
        return lambda model: setattr(model.get_submodule(owner), name, value)

    refused(attribute("blocks.1.mlp", Doubling()), r"blocks\.1\.mlp is not the part .*\(Doubling\)")
    refused(attribute("head", nn.Linear(32, 257)), r"head is not the part .*\(Linear\)")
    refused(attribute("backout", None), r"backout is not the part .*\(missing\)")
    refused(attribute("blocks.0.attention.window_tokens", 7), r"CausalSelfAttention with window_tokens=7")
    refused(attribute("blocks.0.attention.q_proj", Linear(32, 32, bias=True)), r"Linear with bias=\(32,\)")
    refused(attribute("head.soft_cap", 3.0), r"LMHead with soft_cap=3\.0")
    refused(attribute("config", None), "assembled without a config")
    refused(attribute("blocks", make(CASES["everything"].config).blocks[:2]), "the model has 2 blocks")
    with pytest.raises(ConfigError, match="got Doubling"):
        export(Doubling(), tmp_path / "out")  # type: ignore[arg-type]


def test_a_mixture_of_our_layers_and_compiled_blocks_are_exported(tmp_path: Path) -> None:
    model = make(CASES["everything"].config)
    model.blocks[0].mlp = GeluMLP(32, 50)
    nn.init.normal_(model.blocks[0].mlp.down_proj.weight)
    ids = token_ids()
    expected = model(ids).detach()
    model.blocks[1] = torch.compile(model.blocks[1])  # type: ignore[assignment]
    assert export(model, tmp_path / "out").architecture is None
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, expected, rtol=0, atol=1e-4)


def test_a_saved_model_with_a_foreign_part_is_refused_by_name(tmp_path: Path) -> None:
    GPT.from_config(CASES["everything"].config, mlp=lambda config, layer: Doubling()).save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"blocks\.0\.mlp is not the part .*\(Doubling\)"):
        export(tmp_path / "a", tmp_path / "out")
    with pytest.raises(HubError, match="neither an existing folder"):
        export(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        export(tmp_path, tmp_path / "out")
    make(CASES["everything"].config).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or damaged"):
        export(tmp_path / "a", tmp_path / "out")
    (tmp_path / "a" / "config.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match="is damaged"):
        export(tmp_path / "a", tmp_path / "out")


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    class Words(ByteTokenizer):
        pass

    model = make(CASES["everything"].config)
    with pytest.raises(ConfigError, match="the tokenizer has 265 ids, more than the model's vocab_size=257"):
        export(model, tmp_path / "out", tokenizer=train_bpe(["a"], vocab_size=265))
    with pytest.raises(DataError, match=r"a Words has no exact tokenizer\.json"):
        export(model, tmp_path / "out", tokenizer=Words())
    assert not list(tmp_path.iterdir())


# Files.


def test_only_an_earlier_export_is_replaced_and_nothing_else_is_touched(exported: Any, tmp_path: Path) -> None:
    model, _ = exported("everything")
    llama, _ = exported("llama")
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("about", "utf-8")
    export(model, out, tokenizer=ByteTokenizer())
    with pytest.raises(ConfigError, match=r"holds an earlier export; .*overwrite=True"):
        export(llama, out)
    export(llama, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert (out / "README.md").read_text("utf-8") == "about"

    (out / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(ConfigError, match=r"holds files that no export wrote, such as notes\.txt"):
        export(llama, out, overwrite=True)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ConfigError, match="holds files that no export wrote"):
        export(saved, saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ConfigError, match="is not a folder"):
        export(llama, tmp_path / "file")


def test_an_export_that_fails_leaves_everything_as_it_was(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    whole = tmp_path / "whole"
    export(exported("llama")[0], whole)
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    monkeypatch.setattr("tinygpt.interop.huggingface._export.save_file", fail)
    with pytest.raises(CheckpointError, match=r"could not be written into .*No space left"):
        export(exported("llama")[0], tmp_path / "out")
    with pytest.raises(CheckpointError, match="could not be written into"):
        export(exported("everything")[0], whole, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_the_config_names_no_padding_token_that_would_freeze_a_row(exported: Any) -> None:
    _, folder = exported("llama")
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    assert (fields["pad_token_id"], fields["bos_token_id"], fields["eos_token_id"]) == (None, BOS, BOS)
    assert load(folder).model.embed_tokens.padding_idx is None
