"""Finds a model: built in, a Hugging Face config.json, or a file of shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_muon.estimate.huggingface import model_from_config
from megatron_muon.estimate.models import BUILT_IN, Layer, MatrixShape, Model
from megatron_muon.matrices.fused import WHOLE, FusedQkv, GatedMlp, WeightKind

_SPLITS: Mapping[str | None, int | None] = {"rows": 0, "columns": 1, "none": None, None: None}
_MATRIX_KEYS = {"name", "shape", "split", "unit", "parts", "gated", "router", "experts"}
_LAYER_KEYS = {"repeat", "matrices"}
_MODEL_KEYS = {"name", "layers", "other_parameters"}


def load_model(name_or_path: str) -> Model:
    """The model of a built-in name, or of a file.

    Args:
        name_or_path: A key of `BUILT_IN`; or a path to a Hugging Face config.json, or to a YAML or JSON file of shapes
            (docs/planning.md has the format).

    Raises:
        ValueError: If there is no such model or file, or the file's content is bad.
    """
    if name_or_path in BUILT_IN:
        built_in = BUILT_IN[name_or_path]
        return model_from_config(name_or_path, built_in.config, built_in.source)
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"model: got {name_or_path!r}, which is no file and no built-in model; expected one of "
            f"{', '.join(BUILT_IN)}, a Hugging Face config.json or a YAML of shapes"
        )
    content = _parse(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__} at the top, expected a mapping")
    if "layers" in content:
        return model_from_shapes(path.stem, content, str(path))
    return model_from_config(path.parent.name if path.stem == "config" else path.stem, content, str(path))


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: no valid JSON: {error}") from error
    try:
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        if error.name != "yaml":
            raise
        raise ValueError(f"{path}: reading YAML needs PyYAML; run pip install pyyaml, or write JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no valid YAML: {error}") from error


def model_from_shapes(name: str, content: Mapping[str, Any], source: str) -> Model:
    """Makes a Model from a description of its matrices.

    Args:
        name: Used if the description has none.
        content: `layers`, each with `matrices` and how often the layer repeats; optional `name`, `other_parameters`.
        source: Where it is from, for messages.

    Raises:
        ValueError: If a key is unknown or a value is bad.
    """
    _check_keys(source, content, _MODEL_KEYS)
    groups = content["layers"]
    if not isinstance(groups, list) or not groups:
        raise ValueError(f"{source}: layers: got {groups!r}, expected a list of layers")
    layers: list[Layer] = []
    for index, group in enumerate(groups):
        where = f"{source}: layers[{index}]"
        _check_keys(where, group, _LAYER_KEYS)
        matrices = group.get("matrices")
        if not isinstance(matrices, list) or not matrices:
            raise ValueError(f"{where}: matrices: got {matrices!r}, expected a list of matrices")
        layer = tuple(_matrix(f"{where}.matrices[{i}]", matrix) for i, matrix in enumerate(matrices))
        names = [m.name for m in layer]
        if len(set(names)) < len(names):
            raise ValueError(f"{where}: got the names {names}, expected each once")
        layers += [layer] * _size(where, group, "repeat", 1)
    other = content.get("other_parameters", 0)
    if isinstance(other, bool) or not isinstance(other, int) or other < 0:
        raise ValueError(f"{source}: other_parameters: got {other!r}, expected a count")
    return Model(str(content.get("name", name)), tuple(layers), other, source)


def _matrix(where: str, content: Any) -> MatrixShape:
    _check_keys(where, content, _MATRIX_KEYS)
    name, shape, split = content.get("name"), content.get("shape"), content.get("split")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: name: got {name!r}, expected a name")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"{where}: shape: got {shape!r}, expected [rows, columns]")
    if split not in _SPLITS:
        raise ValueError(f"{where}: split: got {split!r}, expected rows, columns or none")
    parts = content.get("parts", {})
    if not isinstance(parts, dict) or not all(type(n) is int and n > 0 for n in parts.values()):
        raise ValueError(f"{where}: parts: got {parts!r}, expected label: rows in one repetition")
    pattern = tuple((str(label), rows) for label, rows in parts.items())
    gated = _flag(where, content, "gated")
    if gated and pattern:
        raise ValueError(f"{where}: got parts and gated, expected one or the other")
    kind: WeightKind = GatedMlp() if gated else WHOLE
    if pattern:
        # A head has as many rows as the smallest part, or divides all parts alike.
        kind = FusedQkv(pattern, math.gcd(*parts.values()))
    period = sum(rows for _, rows in pattern) or (2 if gated else 1)
    return MatrixShape(
        name=name,
        rows=shape[0],
        cols=shape[1],
        tp_dim=_SPLITS[split],
        unit=_size(where, content, "unit", period),
        unit_name=f"units of {period}" if period > 1 else "rows or columns",
        kind=kind,
        router=_flag(where, content, "router"),
        experts=_size(where, content, "experts", 1) if content.get("experts") else 0,
    )


def _check_keys(where: str, content: Any, known: set[str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: got {content!r}, expected a mapping with {', '.join(sorted(known))}")
    unknown = sorted(str(key) for key in set(content) - known)
    if unknown:
        raise ValueError(f"{where}: got unknown {', '.join(unknown)}, expected {', '.join(sorted(known))}")


def _size(where: str, content: Mapping[str, Any], key: str, default: int) -> int:
    value = content.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}: {key}: got {value!r}, expected a positive integer")
    return value


def _flag(where: str, content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key}: got {value!r}, expected true or false")
    return value
