"""config.json of Hugging Face's and the settings of a Megatron model: tables that export and import both read.

A setting that has no counterpart on the other side is refused by its name: a model that computes something else is
worse than none.

Sources: megatron-core 0.19.2 (`training/arguments.py`, `transformer/moe/moe_utils.py`,
`transformer/multi_latent_attention.py`); Transformers 5.24 (`models/*/configuration_*.py`, `modeling_*.py`).
"""

# More than 400 lines: tables of settings, each with its use beside it.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_muon.checkpoints.huggingface.names import Architecture, Heads

Settings = dict[str, Any]
# Setting or field -> the values that a model may have; the first is written on the other side.
Allowed = Mapping[str, tuple[Any, ...]]


_CLASSES: Mapping[Architecture, str] = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# model_type -> architecture. K2's own code is DeepSeek-V3's.
_MODEL_TYPES: Mapping[str, Architecture] = {**{name: name for name in _CLASSES}, "kimi_k2": "deepseek_v3"}
# Transformers' DeepseekV3RMSNorm of compressed queries, keys and values has this epsilon whatever `rms_norm_eps` says.
LATENT_EPSILON = 1e-6

# Megatron's setting -> config.json's field with the same value.
_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "init_method_std": "initializer_range",
    "layernorm_epsilon": "rms_norm_eps",
}
_EXPERT_FIELDS = {**_FIELDS, "moe_ffn_hidden_size": "moe_intermediate_size", "moe_router_topk": "num_experts_per_tok"}
_FIELDS_OF: Mapping[Architecture, Mapping[str, str]] = {
    "llama": _FIELDS,
    "qwen3": _FIELDS,
    "qwen3_moe": {**_EXPERT_FIELDS, "num_experts": "num_experts"},
    "deepseek_v3": {
        **_EXPERT_FIELDS,
        "num_experts": "n_routed_experts",
        "q_lora_rank": "q_lora_rank",
        "kv_lora_rank": "kv_lora_rank",
        "qk_head_dim": "qk_nope_head_dim",
        "qk_pos_emb_head_dim": "qk_rope_head_dim",
        "v_head_dim": "v_head_dim",
    },
}
# Fields that a config.json may leave out.
_DEFAULTS: Mapping[str, Any] = {"initializer_range": 0.02, "q_lora_rank": None}

# Megatron's settings that a model of any architecture must have.
_REQUIRED: Allowed = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "use_rope_scaling": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "no_rope_freq": (None,),
    "mtp_num_layers": (None, 0),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "use_mup": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_layer_pattern": (None,),
    "moe_latent_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_shared_expert_gate": (False,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "moe_router_force_load_balancing": (False,),
    "mla_down_proj_fusion": (False,),
}
# Those of `_REQUIRED` that an import writes; the others are Megatron's defaults.
_STATED = ("normalization", "swiglu", "add_bias_linear", "position_embedding_type", "rotary_percent")
_REQUIRED_OF: Mapping[Architecture, Allowed] = {
    "llama": {"qk_layernorm": (False, None)},
    "qwen3": {"qk_layernorm": (True,)},
    "qwen3_moe": {
        "qk_layernorm": (True,),
        "moe_router_score_function": ("softmax",),
        "moe_router_enable_expert_bias": (False,),
        "moe_router_topk_scaling_factor": (None, 1.0),
        "moe_router_num_groups": (None, 0),
        "moe_shared_expert_intermediate_size": (None, 0),
    },
    "deepseek_v3": {
        "qk_layernorm": (True,),
        "moe_router_score_function": ("sigmoid",),
        "moe_router_enable_expert_bias": (True,),
        "moe_router_pre_softmax": (False, None),
    },
}
# Fields that a config.json of any architecture must have, if they are there.
_REQUIRED_FIELDS: Allowed = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "num_nextn_predict_layers": (0, None),
    "quantization_config": (None,),
}
# Those of latent attention are read by vLLM and SGLang alone: without `topk_method` vLLM ignores the routers' biases.
_LATENT_FIELDS: Allowed = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
}
# Those of both that an export writes, beside `hidden_act` and `attention_bias`.
_WRITTEN: Mapping[Architecture, tuple[str, ...]] = {
    "llama": ("mlp_bias",),
    "qwen3": ("use_sliding_window",),
    "qwen3_moe": ("use_sliding_window",),
    "deepseek_v3": ("num_nextn_predict_layers", *_LATENT_FIELDS),
}
# YaRN's numbers for which Megatron has no flag: its own, which are DeepSeek-V3's. K2 has others.
_YARN: Mapping[str, float] = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
_ROPE = {"factor": "rotary_scaling_factor", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}
# Flags of settings that have another name.
_FLAGS = {
    "layernorm_epsilon": "--norm-epsilon",
    "add_bias_linear": "--disable-bias-linear",
    "apply_rope_fusion": "--no-rope-fusion",
}
_SPEC = ["megatron_muon.megatron.model.latent_attention", "layer_spec"]


def architecture_of(args: Any, *, any_epsilon: bool = False) -> Architecture:
    """The architecture of Hugging Face's that computes what a run's model does.

    Args:
        args: Megatron's arguments, from the checkpoint.
        any_epsilon: Whether the norms of latent attention may have another epsilon than Transformers gives them.

    Raises:
        ValueError: If there is none; the message names the setting.
    """
    architecture: Architecture = "qwen3" if args.qk_layernorm else "llama"
    if getattr(args, "multi_latent_attention", False):
        architecture = "deepseek_v3"
    elif getattr(args, "num_experts", None):
        architecture = "qwen3_moe"
    for name, allowed in (*_REQUIRED.items(), *_REQUIRED_OF[architecture].items()):
        got = getattr(args, name, allowed[0])
        _need(args, name, got in allowed, f"{allowed[0]} in a {_CLASSES[architecture]}")
    if architecture == "deepseek_v3":
        _check_latent(args, any_epsilon)
    return architecture


def _check_latent(args: Any, any_epsilon: bool) -> None:
    _need(args, "num_experts", args.num_experts, "experts: DeepseekV3ForCausalLM has them")
    spec = list(getattr(args, "spec", None) or [])
    own = bool(args.q_lora_rank) or spec[:1] == _SPEC[:1]
    _need(args, "spec", own, f"{' '.join(_SPEC)}: without --q-lora-rank Megatron's own layers norm the queries")
    _need(args, "rope_type", args.rope_type in ("rope", "yarn"), "rope or yarn")
    unscaled = args.rope_type == "yarn" or args.rotary_scaling_factor == 1 or not args.mscale_all_dim
    _need(args, "rotary_scaling_factor", unscaled, "1: with --mscale-all-dim it changes the scale of the softmax")
    _need(
        args,
        "layernorm_epsilon",
        any_epsilon or args.layernorm_epsilon == LATENT_EPSILON,
        f"{LATENT_EPSILON}, which Transformers gives the norms of compressed states whatever rms_norm_eps is; train "
        f"with --norm-epsilon {LATENT_EPSILON}, or add --any-epsilon for an export that differs by about 5e-5",
    )
    shared, width = args.moe_shared_expert_intermediate_size or 0, args.moe_ffn_hidden_size
    _need(args, "moe_shared_expert_intermediate_size", shared and shared % width == 0, f"a multiple of {width}")
    _dense_layers(args)


def _layer_pattern(args: Any) -> list[int]:
    """For each layer 1 if it has experts, else 0."""
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return [int(layer % frequency == 0) for layer in range(args.num_layers)]
    return list(frequency)


def _dense_layers(args: Any) -> int:
    """How many layers at the start have no experts, when all others do."""
    pattern = _layer_pattern(args)
    count = pattern.index(1) if 1 in pattern else 0
    expected = [0] * count + [1] * (len(pattern) - count)
    _need(args, "moe_layer_freq", pattern == expected, "dense layers first, then layers with experts")
    return count


def heads_of(args: Any) -> Heads | None:
    """The rows of the fused QKV weight; None for latent attention."""
    if getattr(args, "multi_latent_attention", False):
        return None
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    return Heads(groups, args.num_attention_heads // groups, dim)


def config_of(
    args: Any,
    vocab_size: int,
    dtype: str,
    bos: int | None,
    eos: int | Sequence[int] | None,
    *,
    any_epsilon: bool = False,
) -> Settings:
    """The content of config.json for a run's model.

    Args:
        args: Megatron's arguments, from the checkpoint.
        vocab_size: Rows of the exported embedding.
        dtype: Of the exported weights, as `bfloat16`.
        bos: Id of the token that begins a text, if there is one.
        eos: Ids of the tokens that end one.
        any_epsilon: As for `architecture_of`.

    Raises:
        ValueError: As `architecture_of`.
    """
    architecture = architecture_of(args, any_epsilon=any_epsilon)
    theta = float(args.rotary_base)
    rope: Settings = {"rope_type": "default", "rope_theta": theta}
    scaling: Settings | None = None
    if architecture == "deepseek_v3" and args.rope_type == "yarn":
        scaling = {name: float(getattr(args, setting)) for name, setting in _ROPE.items()} | dict(_YARN)
        rope = {**rope, "rope_type": "yarn", **scaling}
    heads, required = heads_of(args), {**_REQUIRED_FIELDS, **_LATENT_FIELDS}
    out: Settings = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        **{field: getattr(args, setting) for setting, field in _FIELDS_OF[architecture].items()},
        "num_key_value_heads": heads.groups if heads else args.num_attention_heads,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        # Transformers 4 reads the first, 5 the second.
        "rope_theta": theta,
        "rope_parameters": rope,
        "rope_scaling": scaling and {"type": "yarn", **scaling},
        **{name: required[name][0] for name in ("hidden_act", "attention_bias", *_WRITTEN[architecture])},
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": list(eos) if isinstance(eos, Sequence) else eos,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if heads is not None:
        out["head_dim"] = heads.dim
    if architecture in ("qwen3", "qwen3_moe"):
        out["sliding_window"] = None
    if architecture == "qwen3_moe":
        out |= {
            "norm_topk_prob": not args.moe_router_pre_softmax,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, experts in enumerate(_layer_pattern(args)) if not experts],
        }
    if architecture == "deepseek_v3":
        out |= {
            "q_lora_rank": args.q_lora_rank or None,
            "n_shared_experts": args.moe_shared_expert_intermediate_size // args.moe_ffn_hidden_size,
            # Megatron normalizes sigmoid scores only among several experts.
            "norm_topk_prob": args.moe_router_topk > 1,
            "routed_scaling_factor": float(args.moe_router_topk_scaling_factor or 1.0),
            "n_group": args.moe_router_num_groups or 1,
            "topk_group": args.moe_router_group_topk or 1,
            "first_k_dense_replace": _dense_layers(args),
        }
    return out


def settings_from_config(config: Mapping[str, Any]) -> Settings:
    """Megatron's settings for a config.json: names and values as in Megatron's arguments.

    Raises:
        ValueError: If Megatron does not compute this model, or a field is missing; the message names the field.
    """
    architecture = _MODEL_TYPES.get(str(config.get("model_type")))
    if architecture is None:
        raise ValueError(
            f"config.json: model_type: got {config.get('model_type')!r}, expected one of {', '.join(_MODEL_TYPES)}"
        )
    try:
        return _settings(architecture, config)
    except KeyError as error:
        raise ValueError(f"config.json: {error.args[0]}: missing, expected in a {architecture} model") from error


def _settings(architecture: Architecture, config: Mapping[str, Any]) -> Settings:
    latent = architecture == "deepseek_v3"
    for name, allowed in {**_REQUIRED_FIELDS, **(_LATENT_FIELDS if latent else {})}.items():
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"config.json: {name}: got {config[name]!r}, expected {allowed[0]!r}; Megatron's "
                "counterpart is not supported"
            )
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] != "default":
        yarn = latent and rope["rope_type"] == "yarn" and all(rope.get(name, n) == n for name, n in _YARN.items())
        if not yarn:
            raise ValueError(
                f"config.json: rope_parameters: got {rope}, expected 'default', or with latent attention 'yarn' with "
                f"{dict(_YARN)}; Megatron has no flags for others"
            )
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if theta != int(theta):
        raise ValueError(f"config.json: rope_theta: got {theta}, expected a whole number, as --rotary-base takes")
    if not config.get("num_experts") and "num_local_experts" in config:
        config = {**config, "num_experts": config["num_local_experts"]}
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if latent and groups != heads:
        raise ValueError(f"config.json: num_key_value_heads: got {groups}, expected {heads} with latent attention")
    out: Settings = {
        "num_experts": None,
        **{setting: {**_DEFAULTS, **config}[field] for setting, field in _FIELDS_OF[architecture].items()},
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"],
        **{name: _REQUIRED[name][0] for name in _STATED},
        **{name: allowed[0] for name, allowed in _REQUIRED_OF[architecture].items()},
        "rotary_base": int(theta),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "multi_latent_attention": latent,
        "group_query_attention": groups != heads,
    }
    if not latent:
        out["num_query_groups"] = groups if groups != heads else 1
        out["kv_channels"] = config.get("head_dim") or config["hidden_size"] // heads
    if out["num_experts"]:
        out |= {"moe_router_dtype": "fp32"} | (_latent_settings if latent else _softmax_settings)(config, rope)
    return out


def _softmax_settings(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Settings:
    dense, step = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step", 1)
    layers = range(config["num_hidden_layers"])
    return {
        "moe_layer_freq": [int(layer not in dense and (layer + 1) % step == 0) for layer in layers],
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
    }


def _latent_settings(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Settings:
    topk = config["num_experts_per_tok"]
    if bool(config.get("norm_topk_prob", True)) != (topk > 1):
        raise ValueError(
            f"config.json: norm_topk_prob: got {config.get('norm_topk_prob')}, expected {topk > 1}: Megatron "
            "normalizes sigmoid scores among several experts"
        )
    dense, groups = config["first_k_dense_replace"], config.get("n_group") or 1
    return {
        "rope_type": "yarn" if rope["rope_type"] == "yarn" else "rope",
        "rotary_scaling_factor": float(rope.get("factor", 1.0)),
        "mscale": float(rope.get("mscale", 1.0)),
        "mscale_all_dim": float(rope.get("mscale_all_dim", 0.0)),
        "apply_rope_fusion": False,
        "spec": None if config.get("q_lora_rank") else _SPEC,
        "moe_layer_freq": [0] * dense + [1] * (config["num_hidden_layers"] - dense),
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"] * config["n_shared_experts"],
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": config["topk_group"] if groups > 1 else None,
    }


# What Megatron computes from other settings, or has as its default under the flags that are written.
_NO_FLAG = ("padded_vocab_size", "rotary_percent")


def flags_of(settings: Settings) -> list[list[str]]:
    """Settings as Megatron's command-line flags, one list of words for each."""
    out = []
    for name, value in settings.items():
        if name in _NO_FLAG or value is None or (value is False and name not in _FLAGS):
            continue
        flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
        if name == "num_query_groups" and not settings["group_query_attention"]:
            continue
        if isinstance(value, bool):
            out.append([flag])
        elif name == "moe_layer_freq":
            out.append([flag, f"({value})".replace(" ", "")])
        else:
            out.append([flag, *([str(word) for word in value] if isinstance(value, list) else [str(value)])])
    return out


def _need(args: Any, name: str, holds: Any, expected: str) -> None:
    if not holds:
        raise ValueError(
            f"{name}: got {getattr(args, name, None)!r}, expected {expected}; no model of Hugging Face's that is known "
            "here computes it, so it cannot be exported"
        )
