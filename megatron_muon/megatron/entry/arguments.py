"""Command-line flags of Distributed Muon, made from `MuonConfig`, on top of Megatron's own `--muon-*` flags.

An unset flag is `None` after parsing, which distinguishes it from a flag with the default value. `apply` then
either turns the arguments into a run with Distributed Muon or hands them back as stock Megatron would have parsed
them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from megatron_muon.config import PRESETS, Group, MuonConfig, Preset
from megatron_muon.matrices.user_rows import load_split_rows
from megatron_muon.megatron.entry.checks import check_arguments, check_mup
from megatron_muon.megatron.entry.fp8_checks import Fp8Machine, check_arguments_fp8, is_emulated
from megatron_muon.megatron.entry.messages import say, warn
from megatron_muon.megatron.model import expert_fp8
from megatron_muon.newton_schulz import ALIASES
from megatron_muon.plan.links_file import load_links

_METAVARS: Mapping[type, str] = MappingProxyType({int: "N", float: "X", str: "NAME"})
GROUP_TITLE = "distributed muon"
DEFAULT_PRESET: Preset = "moonlight"

# Settings that Megatron has under another flag: both spellings work.
_MEGATRON_SPELLINGS = MappingProxyType({"coefficients": "muon_coefficient_type", "ns_steps": "muon_num_ns_steps"})

_FIELDS = frozenset(setting.name for setting in fields(MuonConfig))

# What Megatron's values of --muon-tp-mode mean for the result. Its duplicated and distributed modes both
# orthogonalize the whole matrix and differ only in who computes it, which here is the plan's decision.
_TP_MODES = MappingProxyType({"duplicated": "exact", "distributed": "exact"})

# Megatron keeps Newton-Schulz in fp32 tensors and lowers the precision of their products.
_MATMUL_DTYPES = MappingProxyType({"low": ("bf16", "fp16"), "medium": ("bf16", "fp16"), "high": ("fp32",)})
# Settings that a flag of Megatron's with another meaning implies: its destination, and the settings' values that agree
# with each of the flag's values. The first one is taken where the setting is not given.
_IMPLIED: Mapping[str, tuple[str, Mapping[Any, tuple[str, ...]]]] = MappingProxyType(
    {"ns_dtype": ("muon_fp32_matmul_prec", _MATMUL_DTYPES), "qkv_split": ("muon_split_qkv", {False: ("none",)})}
)


@dataclass
class ParserChanges:
    """What `add_arguments` did to a parser.

    Attributes:
        added: Destinations of settings that only this package's flags have.
        defaults: Megatron's defaults of the flags that both use, by destination.
        values: The values that Megatron's own flags can give those destinations, where they are limited.
    """

    added: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    values: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def adopt(self, action: argparse.Action, choices: tuple[str, ...] = (), text: str | None = None) -> None:
        """Makes `None` the default of a flag of Megatron's, and lets it take `choices` too. Mutates `action`."""
        self.defaults[action.dest] = action.default
        if action.nargs == 0:  # store_true or store_false
            self.values[action.dest] = (action.const,)
        elif action.choices is not None:
            self.values[action.dest] = tuple(action.choices)
            action.choices = tuple(dict.fromkeys((*action.choices, *choices)))
        action.help = f"{text or action.help} [without --distributed-muon: {action.default}]"
        action.default = None


def add_arguments(parser: argparse.ArgumentParser) -> ParserChanges:
    """Adds the flags of Distributed Muon to a parser; unset `--muon-*` flags of Megatron's become `None`.

    Flags that the parser has already keep their names and meaning; their default becomes `None`. On a parser that has
    none of them (the launcher's `--help`) all are created.

    Args:
        parser: Megatron's parser. Mutated.

    Returns:
        What was changed, for `apply`.
    """
    main = parser.add_argument_group(
        GROUP_TITLE,
        "Muon inside Megatron's DistributedOptimizer, for matrices; all other parameters get AdamW with Megatron's "
        f"--adam-* flags. A setting left unset takes the preset's value, {DEFAULT_PRESET}'s where none is chosen.",
    )
    main.add_argument("--distributed-muon", action="store_true", help="train matrices with Distributed Muon")
    main.add_argument("--muon-preset", choices=get_args(Preset), help="settings to start from")
    groups = {name: parser.add_argument_group(f"{GROUP_TITLE}: {name}") for name in get_args(Group)}
    changes = ParserChanges(added=["muon_preset"])

    # argparse has no public way to look up an action or the option strings in use.
    actions = {action.dest: action for action in parser._actions}
    for setting, option, kwargs in _flags():
        upstream = actions.get(kwargs["dest"])
        if upstream is not None and kwargs["dest"] not in changes.defaults:
            same = option in upstream.option_strings
            changes.adopt(upstream, kwargs.get("choices", ()), kwargs["help"] if same else None)
        if option not in parser._option_string_actions:
            groups[setting.metadata["group"]].add_argument(option, **kwargs)
            if upstream is None and kwargs["dest"] not in changes.added:
                changes.added.append(kwargs["dest"])
        other = actions.get(_MEGATRON_SPELLINGS.get(setting.name, ""))
        if other is not None:
            changes.adopt(other, text=f"as {option}")
    # Megatron's flags that are no setting here: `config_from_args` translates or refuses them.
    for dest in ("muon_scalar_optimizer", *(dest for dest, _ in _IMPLIED.values())):
        if dest in actions:
            changes.adopt(actions[dest])
    _repair_help(parser)
    return changes


def _repair_help(parser: argparse.ArgumentParser) -> None:
    """Escapes the percent signs of help texts that argparse cannot print: Megatron 0.19.2's --help fails on one."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action) if action.help else None
        except (KeyError, TypeError, ValueError):
            action.help = str(action.help).replace("%", "%%")


def _flags() -> Iterator[tuple[dataclasses.Field[Any], str, dict[str, Any]]]:
    """Yields each flag that `MuonConfig` asks for: setting, option string, arguments of `add_argument`."""
    hints = get_type_hints(MuonConfig)
    for setting in fields(MuonConfig):
        name = setting.name.replace("_", "-")
        default = repr(setting.default) if setting.default == "" else setting.default
        # argparse expands % in help texts.
        text = f"{setting.metadata['help']} (default: {default}, or the preset's)".replace("%", "%%")
        common = {"dest": f"muon_{setting.name}", "default": None}
        if hints[setting.name] is bool:
            yield setting, f"--muon-{name}", {**common, "action": "store_true", "help": text}
            text = f"turn --muon-{name} off"
            yield setting, f"--muon-no-{name}", {**common, "action": "store_false", "help": text}
        elif choices := get_args(hints[setting.name]):
            yield setting, f"--muon-{name}", {**common, "choices": choices, "help": text}
        else:
            hint = hints[setting.name]
            yield setting, f"--muon-{name}", {**common, "type": hint, "metavar": _METAVARS[hint], "help": text}


def apply(
    args: argparse.Namespace, changes: ParserChanges, *, cpu: bool = False, machine: Fp8Machine | None = None
) -> MuonConfig | None:
    """Completes parsed arguments: for Distributed Muon, or exactly as stock Megatron would have parsed them.

    Runs before Megatron's `validate_args`. With `--distributed-muon` the optimizer becomes adam, since `validate_args`
    turns any other into the layer-wise optimizer, and every setting is written back to `args`, so that what Megatron
    prints and stores is what is used.

    Args:
        args: Parsed by a parser that `add_arguments` extended. Mutated.
        changes: What `add_arguments` returned for that parser.
        cpu: Whether the CPU backend is active. Newton-Schulz then runs in fp32 unless a flag says otherwise.
        machine: Machine that FP8 is checked against; None: this one.

    Returns:
        The settings, or None without `--distributed-muon`.

    Raises:
        ValueError: If a value is bad, --muon-splits or --muon-links names a bad file, flags contradict each other, or
            flags of this package are given without `--distributed-muon`.
        NotImplementedError: If something is asked for that Distributed Muon does not support.
        RuntimeError: If FP8 is asked for and this machine cannot run it.
    """
    if not args.distributed_muon:
        _warn_of_flags_without_switch(args, changes)
        _restore_upstream(args, changes)
        return None
    check_arguments(args)
    if args.optimizer != "adam":
        say(f"--optimizer {args.optimizer} becomes adam, for the parameters that --distributed-muon leaves to AdamW")
        args.optimizer = "adam"
    own = settings_for_cpu(args.muon_preset or DEFAULT_PRESET, _given(args)) if cpu else {}
    config = config_from_args(args, own)
    check_mup(getattr(args, "use_mup", False), config.scale_mode)
    if config.splits:
        load_split_rows(config.splits)  # raises for bad rows before anything starts
    if config.links:
        load_links(config.links)  # raises for a bad file
    _apply_fp8(args, config, cpu=cpu, machine=machine)
    _write_back(args, config)
    return config


def _apply_fp8(args: argparse.Namespace, config: MuonConfig, *, cpu: bool, machine: Fp8Machine | None) -> None:
    """Checks what is asked of FP8, and sets the flags of Megatron that `--muon-moe-fp8` implies; says which."""
    check_arguments_fp8(args, config.moe_fp8, cpu=cpu, machine=machine)
    if config.moe_fp8 == "off":
        return
    if is_emulated(args, config.moe_fp8, cpu=cpu):
        say(f"--muon-moe-fp8 {config.moe_fp8}: the experts' products are emulated in fp32 on this CPU")
        return
    for dest, value in expert_fp8.implied_arguments(config.moe_fp8).items():
        setattr(args, dest, value)
        say(f"--muon-moe-fp8 {config.moe_fp8} sets {expert_fp8.spell(dest, value)}")


def config_from_args(args: argparse.Namespace, defaults: Mapping[str, Any] = MappingProxyType({})) -> MuonConfig:
    """The settings that parsed arguments ask for: the preset's, on top of them `defaults`, and those given by flags.

    Raises:
        ValueError: If a value is bad or two flags contradict each other; the message names the flags.
        NotImplementedError: If `--muon-scalar-optimizer` is not adam.
    """
    given = _given(args)
    preset = getattr(args, "muon_preset", None)
    try:
        return MuonConfig.from_preset(preset or DEFAULT_PRESET, **{**defaults, **given})
    except ValueError as error:
        words = {name: _words(args, name) for name in given}
        text = str(error).removeprefix("MuonConfig.")
        name, colon, problem = text.partition(": ")
        if colon and name in words:
            text = f"{words.pop(name).split()[0]}: {problem}"
        elif colon and name in _FIELDS:
            text = f"{_option(f'muon_{name}')} (not given): {problem}"
        if preset is not None:
            words["preset"] = _spell("muon_preset", preset)
        together = f"; given with it: {' '.join(words.values())}" if words else ""
        raise ValueError(f"{text}; correct or omit it{together}") from None


def settings_for_cpu(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the CPU backend changes of a preset's settings, unless the user or the preset chose it; says so.

    Args:
        preset: Name of the preset.
        given: The settings that the user gave.
    """
    if "ns_dtype" in {**PRESETS.get(preset, {}), **given}:
        return {}
    say("Newton-Schulz runs in fp32, since bf16 products are slow on a CPU; setting ns_dtype overrides this")
    return {"ns_dtype": "fp32"}


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags give, in `MuonConfig`'s terms."""
    scalar = getattr(args, "muon_scalar_optimizer", None)
    if scalar not in (None, "adam"):
        raise NotImplementedError(
            f"--muon-scalar-optimizer: got {scalar!r}, expected 'adam', since Distributed Muon trains all other "
            "parameters with AdamW; omit the flag"
        )
    given = {s.name: v for s in fields(MuonConfig) if (v := getattr(args, f"muon_{s.name}", None)) is not None}
    for setting, dest in _MEGATRON_SPELLINGS.items():
        both = [value for value in (given.get(setting), getattr(args, dest, None)) if value is not None]
        both = [ALIASES.get(value, value) for value in both]
        if len(set(both)) > 1:
            raise ValueError(
                f"{_option(f'muon_{setting}')}: got {both[0]!r}, expected {both[1]!r}, which its other spelling "
                f"{_option(dest)} gives; give only one of the two"
            )
        if both:
            given[setting] = both[0]
    for setting, (dest, agreeing) in _IMPLIED.items():
        values = agreeing.get(getattr(args, dest, None), ())
        if values and given.setdefault(setting, values[0]) not in values:
            raise ValueError(
                f"{_option(f'muon_{setting}')}: got {given[setting]!r}, expected {' or '.join(map(repr, values))}, "
                f"which is what {_spell(dest, getattr(args, dest))} means; give only one of the two"
            )
    if "tp_mode" in given:
        given["tp_mode"] = _TP_MODES.get(given["tp_mode"], given["tp_mode"])
    return given


def _words(args: argparse.Namespace, setting: str) -> str:
    """The words on the command line that gave a setting, in Megatron's spelling where that was used."""
    dests = (f"muon_{setting}", _MEGATRON_SPELLINGS.get(setting, ""), _IMPLIED.get(setting, ("",))[0])
    return next(_spell(dest, value) for dest in dests if (value := getattr(args, dest, None)) is not None)


def _option(dest: str) -> str:
    return f"--{dest.replace('_', '-')}"


def _spell(dest: str, value: Any) -> str:
    """The words on the command line that give `dest` this value."""
    if isinstance(value, bool):
        return _option(dest if value else dest.replace("muon_", "muon_no_", 1))
    return f"{_option(dest)} {value}"


def _write_back(args: argparse.Namespace, config: MuonConfig) -> None:
    """Stores the settings in `args`, for what Megatron prints and saves; `config_from_args` reads them again."""
    for name, value in dataclasses.asdict(config).items():
        setattr(args, f"muon_{name}", value)
        if name in _MEGATRON_SPELLINGS:
            setattr(args, _MEGATRON_SPELLINGS[name], value)
    args.muon_preset = args.muon_preset or DEFAULT_PRESET
    args.muon_scalar_optimizer = "adam"
    args.muon_split_qkv = config.qkv_split != "none"
    args.muon_fp32_matmul_prec = next(p for p in ("medium", "high") if config.ns_dtype in _MATMUL_DTYPES[p])


def _warn_of_flags_without_switch(args: argparse.Namespace, changes: ParserChanges) -> None:
    """Warns once if Megatron's flags of Muon are given without a flag that gives them an effect."""
    given = [_spell(dest, value) for dest in changes.defaults if (value := getattr(args, dest)) is not None]
    if given and args.optimizer not in ("muon", "dist_muon", "adaptive_muon"):
        warn(
            f"{', '.join(given)}: no effect with --optimizer {args.optimizer}; add --distributed-muon, or --optimizer "
            "muon for Megatron's own Muon"
        )


def _restore_upstream(args: argparse.Namespace, changes: ParserChanges) -> None:
    """Leaves in `args` what stock Megatron would have parsed, and refuses what it would not have accepted."""
    delattr(args, "distributed_muon")
    given = [_spell(dest, value) for dest in changes.added if (value := getattr(args, dest)) is not None]
    for dest, values in changes.values.items():
        if (value := getattr(args, dest)) is not None and value not in values:
            given.append(_spell(dest, value))
    if given:
        raise ValueError(
            f"{', '.join(given)}: given without --distributed-muon, expected only with it; add --distributed-muon or "
            "omit what belongs to it"
        )
    for dest in changes.added:
        delattr(args, dest)
    for dest, default in changes.defaults.items():
        if getattr(args, dest) is None:
            setattr(args, dest, default)
