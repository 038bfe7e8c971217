"""Export to and import from Hugging Face: logits against Megatron's, tensors bitwise, refusals by name."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_muon.checkpoints.huggingface.architecture import config_of, flags_of, settings_from_config
from megatron_muon.checkpoints.huggingface.export import ExportOptions, export
from megatron_muon.checkpoints.huggingface.import_model import FLAGS, import_model
from megatron_muon.checkpoints.huggingface.names import shapes_of
from megatron_muon.checkpoints.reader import TRACKER, Checkpoint
from megatron_muon.cli import main
from tests.checkpoints.huggingface_models import LATENT, MODELS, logits, make_model, megatron_side
from tests.checkpoints.test_convert import resident
from tests.distributed import run_ranks

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

# Of logits of up to about 5: the same numbers, added up in another order.
TOLERANCE = 2e-5
# Moonlight-16B-A3B's config.json, as published, but for what only Transformers reads.
MOONLIGHT_16B = dict(
    LATENT,
    vocab_size=163840,
    hidden_size=2048,
    intermediate_size=11264,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    num_experts_per_tok=6,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
)


@dataclass
class Case:
    """A model in its four forms.

    Attributes:
        root: Holds `hf`, the import `run`, Megatron's own save of it `saved`, and the export of that `exported`.
        model: Transformers' model.
        megatron: Megatron's logits.
    """

    root: Path
    model: Any
    megatron: Tensor


@dataclass
class Cases:
    """All models, and the keys and whole shapes that Megatron asks for with Moonlight-16B's flags."""

    by_name: dict[str, Case]
    moonlight_16b: dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    root = tmp_path_factory.mktemp("huggingface")
    models = {name: make_model(name) for name in MODELS}
    runs = {}
    for name, model in models.items():
        model.save_pretrained(root / name / "hf", max_shard_size="200KB")
        import_model(root / name / "hf", root / name / "run", None)
        runs[name] = (root / name / "run", root / name / "saved", model_flags(root / name / "run"))
    moonlight = [
        word
        for words in flags_of(settings_from_config({**MOONLIGHT_16B, "model_type": "deepseek_v3"}))
        for word in words
    ]
    found = run_ranks(megatron_side, 2, runs, moonlight)[0]
    by_name = {name: Case(root / name, models[name], found[0][name]) for name in MODELS}
    for case in by_name.values():
        export(case.root / "saved", case.root / "exported", ExportOptions(max_shard_bytes=200_000))
    yield Cases(by_name, found[1])


def model_flags(run: Path) -> list[str]:
    words = shlex.split((run / FLAGS).read_text(), comments=True)
    assert words[words.index("--load") :] == [
        *("--load", str(run), "--finetune", "--dist-ckpt-strictness", "log_unexpected")
    ]
    return words[: words.index("--load")]


def weights(directory: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        out |= safetensors_torch.load_file(path)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_megatrons(cases: Cases, name: str) -> None:
    """Of the original, and of what is exported from Megatron's save at TP2 x EP2."""
    case = cases.by_name[name]
    torch.testing.assert_close(logits(case.model), case.megatron, rtol=0, atol=TOLERANCE)
    exported, info = transformers.AutoModelForCausalLM.from_pretrained(case.root / "exported", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(exported) is type(case.model)
    assert torch.equal(logits(exported.eval()), logits(case.model))


@pytest.mark.parametrize("name", MODELS)
def test_tensors_come_back_bitwise(cases: Cases, name: str) -> None:
    """Hugging Face -> Megatron's load and save -> Hugging Face, in several files with an index."""
    root = cases.by_name[name].root
    before, after = weights(root / "hf"), weights(root / "exported")
    assert before.keys() == after.keys() and len(list((root / "exported").glob("*.safetensors"))) > 1
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    index = json.loads((root / "exported" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    # Import alone, without Megatron, gives the same.
    export(root / "run", root / "direct", ExportOptions())
    direct = weights(root / "direct")
    assert direct.keys() == before.keys() and all(torch.equal(value, direct[key]) for key, value in before.items())
    shutil.rmtree(root / "direct")


def rotary(theta: float) -> Callable[[Any], None]:
    return lambda config: config.rope_parameters.update(rope_theta=theta)


def set_field(name: str, value: Any) -> Callable[[Any], None]:
    return lambda config: setattr(config, name, value)


def zero(part: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(state: dict[str, Tensor]) -> None:
        found = [value for key, value in state.items() if part in key]
        assert found
        for value in found:
            value.zero_()

    return edit


def swap_gate_and_up(of: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(state: dict[str, Tensor]) -> None:
        for key, value in list(state.items()):
            if of in key and "gate_up_proj" in key:
                value.copy_(torch.cat(value.chunk(2, 1)[::-1], 1))
            elif of in key and "gate_proj" in key:
                up = state[key.replace("gate_proj", "up_proj")]
                gate = value.clone()
                value.copy_(up)
                up.copy_(gate)
                return

    return edit


CONFIGS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "rotary interleaving": ("moonlight", set_field("rope_interleave", False)),
    "rotary base": ("moonlight", rotary(10000.0)),
    "mscale": ("yarn", lambda config: config.rope_parameters.update(mscale=0.7)),
    "mscale of all": ("yarn", lambda config: config.rope_parameters.update(mscale_all_dim=0.7)),
    "factor": ("yarn", lambda config: config.rope_parameters.update(factor=20.0)),
    "rotary base of halves": ("llama groups", rotary(10000.0)),
    "scaling factor": ("k2", set_field("routed_scaling_factor", 2.0)),
    "normalized scores": ("k2", set_field("norm_topk_prob", False)),
    "normalized softmax": ("qwen3 moe", set_field("norm_topk_prob", False)),
    "raw softmax": ("qwen3 moe raw", set_field("norm_topk_prob", True)),
    "groups of experts": ("k2", set_field("topk_group", 1)),
    "epsilon": ("moonlight", set_field("rms_norm_eps", 1e-5)),
    "epsilon of plain attention": ("qwen3", set_field("rms_norm_eps", 1e-5)),
}
STATES: dict[str, tuple[str, Callable[[dict[str, Tensor]], None]]] = {
    "router bias": ("moonlight", zero("e_score_correction_bias")),
    "shared experts": ("moonlight", zero("shared_experts.down_proj")),
    "gate and up of experts": ("moonlight", swap_gate_and_up("mlp.experts")),
    "gate and up of softmax experts": ("qwen3 moe", swap_gate_and_up("mlp.experts")),
    "gate and up of a dense MLP": ("llama", swap_gate_and_up("layers.0.mlp")),
    "norm of compressed states": ("moonlight", zero("kv_a_layernorm")),
    "norm of queries": ("qwen3", zero("q_norm")),
}


@pytest.mark.parametrize("convention", [*CONFIGS, *STATES])
def test_each_convention_matters(cases: Cases, convention: str) -> None:
    """With one convention changed, logits differ by more than the comparison allows: it would be noticed."""
    name = (CONFIGS.get(convention) or STATES[convention])[0]
    case = cases.by_name[name]
    config = transformers.AutoConfig.from_pretrained(case.root / "exported")
    if convention in CONFIGS:
        CONFIGS[convention][1](config)
    model = transformers.AutoModelForCausalLM.from_pretrained(case.root / "exported", config=config).eval()
    if convention in STATES:
        with torch.no_grad():
            STATES[convention][1](model.state_dict())
    assert (logits(model) - case.megatron).abs().max() > 1.5 * TOLERANCE


def test_moonlight_16b_on_the_meta_device(cases: Cases) -> None:
    """Names, shapes and 15,960,110,208 parameters: Megatron's, Transformers', and those that an import expects."""
    from megatron_muon.checkpoints.huggingface.names import blocks_of, generic, keys_of

    fields = {**MOONLIGHT_16B, "model_type": "deepseek_v3"}
    settings = settings_from_config(fields)
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**MOONLIGHT_16B))
    theirs: dict[str, tuple[int, ...]] = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for number, expert in enumerate(value):
                for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                    theirs[name.replace("gate_up_proj", f"{number}.{part}.weight")] = tuple(half.shape)
        elif name.endswith("experts.down_proj"):
            for number, expert in enumerate(value):
                theirs[name.replace("down_proj", f"{number}.down_proj.weight")] = tuple(expert.shape)
        else:
            theirs[name] = tuple(value.shape)
    ours, shapes = {}, shapes_of(settings, None)
    keys = {}
    for key, _ in keys_of(settings, "deepseek_v3"):
        blocks = list(blocks_of(key, [64], "deepseek_v3"))
        ours |= {name: shapes[generic(name)] for block in blocks for name in block.names}
        first = [shapes[generic(name)] for name in blocks[0].names]
        keys[key] = (*([64] if "experts.experts" in key else []), sum(s[0] for s in first), *first[0][1:])
    assert ours == theirs and len(ours) == 5317
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == 15_960_110_208
    # An import writes norms under the names of Transformer Engine's layers too.
    assert cases.moonlight_16b.items() <= keys.items() and len(cases.moonlight_16b) == 350
    assert all("layer_norm_weight" in key for key in keys.keys() - cases.moonlight_16b.keys())
    args = Namespace(**settings)
    back = config_of(args, 163840, "bfloat16", None, None, any_epsilon=True)
    assert {name: back[name] for name in fields} == fields
    with pytest.raises(ValueError, match=r"layernorm_epsilon: got 1e-05.*--norm-epsilon 1e-06, or add --any-epsilon"):
        config_of(args, 163840, "bfloat16", None, None)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "normalization": ("llama", {"normalization": "LayerNorm"}),
    "add_bias_linear": ("llama", {"add_bias_linear": True}),
    "add_qkv_bias": ("qwen3", {"add_qkv_bias": True}),
    "swiglu": ("llama", {"swiglu": False}),
    "mtp_num_layers": ("moonlight", {"mtp_num_layers": 1}),
    "use_rope_scaling": ("llama", {"use_rope_scaling": True}),
    "rope_type": ("moonlight", {"rope_type": "mrope"}),
    "rotary_scaling_factor": ("moonlight", {"rotary_scaling_factor": 40.0, "mscale_all_dim": 1.0}),
    "rotary_percent": ("llama", {"rotary_percent": 0.5}),
    "position_embedding_type": ("llama", {"position_embedding_type": "learned_absolute"}),
    "layernorm_epsilon": ("moonlight", {"layernorm_epsilon": 1e-5}),
    "layernorm_zero_centered_gamma": ("llama", {"layernorm_zero_centered_gamma": True}),
    "moe_layer_freq": ("moonlight", {"moe_layer_freq": [1, 0, 1]}),
    "qk_layernorm": ("moonlight", {"qk_layernorm": False}),
    "spec": ("moonlight", {"spec": None}),
    "moe_router_score_function": ("moonlight", {"moe_router_score_function": "softmax"}),
    "moe_router_enable_expert_bias": ("qwen3 moe", {"moe_router_enable_expert_bias": True}),
    "moe_shared_expert_intermediate_size": ("qwen3 moe", {"moe_shared_expert_intermediate_size": 48}),
    "window_size": ("llama", {"window_size": (16, 0)}),
    "attention_output_gate": ("qwen3", {"attention_output_gate": True}),
}


def settings_of_model(name: str) -> dict[str, Any]:
    family, fields = MODELS[name]
    kinds = {"Llama": "llama", "Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe", "DeepseekV3": "deepseek_v3"}
    return settings_from_config({**fields, "model_type": kinds[family]})


@pytest.mark.parametrize("setting", REFUSED)
def test_export_refuses_what_has_no_counterpart(setting: str) -> None:
    name, change = REFUSED[setting]
    args = settings_of_model(name)
    config_of(Namespace(**args), 128, "bfloat16", None, None)
    with pytest.raises(ValueError, match=f"^{setting}: got .*, expected .*cannot be exported"):
        config_of(Namespace(**{**args, **change}), 128, "bfloat16", None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma"},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "beta_fast": 1.0}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"num_nextn_predict_layers": 1},
        {"topk_method": "greedy"},
        {"scoring_func": "softmax"},
        {"rope_interleave": False},
        {"norm_topk_prob": False},
        {"quantization_config": {"quant_method": "fp8"}},
        {"num_key_value_heads": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_import_refuses_what_has_no_counterpart(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"config.json: {name}: got .*, expected"):
        settings_from_config({**LATENT, "model_type": "deepseek_v3", **change})


def test_missing_field() -> None:
    fields = {key: value for key, value in LATENT.items() if key != "kv_lora_rank"}
    with pytest.raises(ValueError, match=r"config.json: kv_lora_rank: missing, expected in a deepseek_v3 model"):
        settings_from_config({**fields, "model_type": "deepseek_v3"})


def write_tokenizer(directory: Path, tokens: int) -> Path:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    directory.mkdir()
    tokenizer = Tokenizer(models.WordLevel({f"w{at}": at for at in range(tokens - 1)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_export_with_tokenizer_and_template(cases: Cases, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By command, in bf16: what a user loads with Transformers, and what the card says."""
    run = cases.by_name["moonlight"].root / "saved"
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 100)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}w1 {{ m['content'] }} <end>{% endfor %}")
    words = ["export", str(run), "--to", "huggingface", str(tmp_path / "out"), "--dtype", "bf16"]
    assert main([*words, "--tokenizer", str(tokenizer), "--chat-template", str(template)]) == 0
    said = capsys.readouterr().out
    assert "DeepseekV3ForCausalLM" in said and "--vocab-size 100 leaves out the padding" in said
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.apply_chat_template([{"role": "user", "content": "w2"}], tokenize=False) == "w1 w2 <end>"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 99 == loaded.eos_token_id
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape[1] > 2
    written = weights(tmp_path / "out")
    biases = {name for name in written if "correction" in name}
    assert biases and all(written[name].dtype == torch.float32 for name in biases)
    exact = weights(cases.by_name["moonlight"].root / "exported")
    assert all(torch.equal(v, exact[n] if n in biases else exact[n].bfloat16()) for n, v in written.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| iteration | 7 |" in card and "library_name: transformers" in card
    words[4] = str(tmp_path / "cut")
    assert main([*words, "--tokenizer", str(tokenizer), "--vocab-size", "100"]) == 0
    assert weights(tmp_path / "cut")["lm_head.weight"].shape[0] == 100


def test_fp32_takes_the_main_parameters(tmp_path: Path, cases: Cases) -> None:
    """Where a bf16 run keeps fp32 parameters, an export in fp32 has their bits."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    from megatron_muon.checkpoints.reader import COMMON
    from megatron_muon.checkpoints.writer import CheckpointWriter
    from megatron_muon.state_keys import PARAM, state_key

    source = Checkpoint(cases.by_name["llama groups"].root / "run")
    writer = CheckpointWriter(tmp_path / "iter_0000001")
    for key, entry in source.tensors.items():
        value = source.region(key, [0] * len(entry.size), entry.size)
        at = torch.Size([0] * value.dim())
        writer.add(MetadataIndex(key, at), value.bfloat16(), entry.size)
        writer.add(MetadataIndex(state_key(PARAM, key), at), value, entry.size)
    writer.add_object(COMMON, source.common)
    writer.finish(b'{"sharded_backend": "torch_dist"}')
    for dtype in (None, "fp32"):
        export(tmp_path / "iter_0000001", tmp_path / str(dtype), ExportOptions(dtype=dtype))
    exact = weights(cases.by_name["llama groups"].root / "hf")
    assert all(torch.equal(value, exact[name]) for name, value in weights(tmp_path / "fp32").items())
    assert all(torch.equal(value, exact[name].bfloat16()) for name, value in weights(tmp_path / "None").items())


@dataclass
class Bad:
    """What a command is given, and what it says."""

    change: Callable[[Path], Any]
    words: Callable[[Path], list[str]]
    message: str


def importing(root: Path) -> list[str]:
    return ["import", str(root / "hf"), "--from", "huggingface", "--to", str(root / "new")]


def exporting(root: Path, *words: str) -> list[str]:
    return ["export", str(root / "saved"), "--to", "huggingface", str(root / "new"), *words]


def edit_config(root: Path, **changes: Any) -> None:
    path = root / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def first_shard(root: Path) -> Path:
    return min((root / "hf").glob("model-*.safetensors"))


BAD = {
    "no model": Bad(
        lambda r: (r / "hf" / "config.json").unlink(), importing, "without config.json, expected a Hugging Face model"
    ),
    "no JSON": Bad(lambda r: (r / "hf" / "config.json").write_text("{"), importing, "config.json: cannot be read"),
    "missing shard": Bad(lambda r: first_shard(r).unlink(), importing, "missing, expected the model's weights; downl"),
    "damaged shard": Bad(lambda r: os.truncate(first_shard(r), 1000), importing, "cannot be read"),
    "fewer tensors": Bad(lambda r: edit_config(r, num_hidden_layers=4), importing, "more: missing, expected from conf"),
    "more tensors": Bad(lambda r: edit_config(r, num_hidden_layers=2), importing, "got a tensor that Megatron's model"),
    "other shapes": Bad(lambda r: edit_config(r, vocab_size=256), importing, "got shape (128, 64), expected (256, 64)"),
    "import exists": Bad(lambda r: (r / "new").mkdir(), importing, "which exists, expected a new directory"),
    "export exists": Bad(lambda r: (r / "new").mkdir(), exporting, "which exists, expected a new directory"),
    "unfinished save": Bad(
        lambda r: (r / "saved" / "metadata.json").unlink(), exporting, "an unfinished save has only some of them"
    ),
    "damaged save": Bad(lambda r: os.truncate(r / "saved" / "__0_0.distcp", 4000), exporting, "the file is truncated"),
    "no iteration": Bad(
        lambda r: None, lambda r: exporting(r, "--iteration", "3"), "iter_0000003: got no directory of this name"
    ),
    "no tokenizer": Bad(
        lambda r: None, lambda r: exporting(r, "--tokenizer", str(r)), "expected a tokenizer.json, tokenizer.model"
    ),
    "large tokenizer": Bad(
        lambda r: write_tokenizer(r / "tokenizer", 129),
        lambda r: exporting(r, "--tokenizer", str(r / "tokenizer")),
        "has 129 tokens, expected at most 128, the rows of the model's vocabulary",
    ),
    "rows": Bad(lambda r: None, lambda r: exporting(r, "--vocab-size", "999"), "--vocab-size: got 999, expected 1 to"),
    "no space to export": Bad(lambda r: None, exporting, "got 1000 bytes free on the disk, expected"),
    "no space to import": Bad(lambda r: None, importing, "got 1000 bytes free on the disk, expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    cases: Cases, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One line with the remedy, and nothing under the final name."""
    source = cases.by_name["moonlight"].root
    for part in ("hf", "saved"):
        shutil.copytree(source / part, tmp_path / part)
    bad = BAD[name]
    bad.change(tmp_path)
    if "space" in name:
        usage = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(bad.words(tmp_path)) == 2
    said = capsys.readouterr().err
    assert bad.message in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_import_is_a_release(cases: Cases) -> None:
    """What Megatron's --load expects: a tracker, a manifest, arguments."""
    run = cases.by_name["moonlight"].root / "run"
    assert (run / TRACKER).read_text() == "release"
    assert (run / "release" / "muon_manifest.json").is_file()
    assert Checkpoint(run).common["args"].kv_lora_rank == 32


def peak_growth_bytes(rank: int, world_size: int, work: str, root: Path) -> int:
    """How far memory that belongs to no file rises during an import or an export: a mapped file costs nothing."""
    done, before = threading.Event(), resident("RssAnon")
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    if work == "export":
        export(root / "run", root / "out", ExportOptions())
    else:
        import_model(root / "hf", root / "run", None)
    done.set()
    thread.join()
    return peak - before


def test_memory_holds_a_few_tensors(tmp_path: Path) -> None:
    """Neither direction holds the model: 8 layers, in stacks, with gate and up of 16 MiB together."""
    fields = {**MODELS["llama groups"][1], "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    block, whole = 2 * 4096 * 512 * 4, sum(p.nbytes for p in model.parameters())
    assert whole > 12 * block
    model.save_pretrained(tmp_path / "hf")
    del model
    for work in ("import", "export"):
        (growth,) = run_ranks(peak_growth_bytes, 1, work, tmp_path)
        assert block < growth < 8 * block, work
