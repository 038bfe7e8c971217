"""The ladder: which models are trained, on how many tokens, with which settings. Read from YAML.

A ladder is a list of model sizes and a list of parts. A part names what varies (learning rates, batch sizes, weight
decay, variants of Muon) and at which sizes. `Run` is one training run; it is a frozen value, and its `key` names the
directory in which its result is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

OptimizerName = Literal["adamw", "muon"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
MUON_FLAGS = ("--distributed-muon",)


@dataclass(frozen=True)
class Model:
    """A dense decoder: SwiGLU, RMSNorm, rotary positions, no biases, output weights of its own.

    Attributes:
        name: Name in tables and directories.
        layers: Number of layers.
        hidden: Width.
        heads: Number of attention heads.
        ffn: Width inside the gated MLP.
        batch_size: Sequences in a batch.
        tokens: Number of training tokens; None takes `tokens_per_parameter` of the ladder.
        learning_rate: Where the learning-rate sweep begins; None takes the ladder's.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    batch_size: int
    tokens: int | None = None
    learning_rate: float | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters without embedding and output weights: matrices and norms."""
        d = self.hidden
        return self.layers * (4 * d * d + 3 * d * self.ffn + 2 * d) + d


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        model: Name of the model.
        optimizer: `adamw`, or `muon` with AdamW for what is not a matrix.
        learning_rate: Peak learning rate.
        batch_size: Sequences in a batch.
        weight_decay: Decoupled weight decay.
        seed: Seed of initial weights and of the order of the data.
        variant: Name of the variant of Muon; "" for the ladder's own settings.
    """

    model: str
    optimizer: OptimizerName
    learning_rate: float
    batch_size: int
    weight_decay: float
    seed: int
    variant: str = ""

    @property
    def key(self) -> str:
        """Directory name: readable, and different for different runs."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:6]
        name = self.variant or self.optimizer
        return f"{self.model}-{name}-lr{self.learning_rate:.3g}-seed{self.seed}-{digest}"


@dataclass(frozen=True)
class Variant:
    """A variant of Muon: extra flags, compared with Muon's base runs at the same seeds.

    Attributes:
        name: Name in tables.
        flags: Words that follow Muon's flags.
        weight_decay: Weight decay; None takes the ladder's.
    """

    name: str
    flags: tuple[str, ...] = ()
    weight_decay: float | None = None


@dataclass(frozen=True)
class Ladder:
    """Everything that a study depends on.

    Attributes:
        name: Name of the study.
        models: Models from small to large.
        seeds: Seeds; the sweeps use the first.
        learning_rate: Where sweeps begin; neighbours differ by `factor`.
        factor: Ratio of neighbouring learning rates.
        tokens_per_parameter: Training tokens for each parameter without embeddings.
        sequence_length: Tokens in a sequence.
        micro_batch_size: Sequences in one forward pass; the largest divisor of the batch up to it is used.
        vocabulary: Number of tokens that the tokenizer has.
        weight_decay: Weight decay of all parameters that Megatron decays.
        warmup: Warm-up's share of the steps.
        final_rate: Learning rate at the end as a share of the peak; cosine decay to the last step.
        validation_sequences: Sequences of the final evaluation, from files that training does not see.
        flags: Words for Megatron that all runs share.
        muon_flags: Words for Muon's runs.
        batch_models: Models at which the batch size is halved and doubled.
        decay_models: Models at which AdamW's weight decay is varied.
        decays: Weight decays that are tried there.
        variant_models: Models at which the variants run.
        variants: Variants of Muon.
        process: How to start one run: words of a command; empty runs on this machine's CPU.
    """

    name: str
    models: tuple[Model, ...]
    seeds: tuple[int, ...]
    learning_rate: float
    factor: float = 2.0
    tokens_per_parameter: float = 20.0
    sequence_length: int = 256
    micro_batch_size: int = 32
    vocabulary: int = 256
    weight_decay: float = 0.1
    warmup: float = 0.05
    final_rate: float = 0.1
    validation_sequences: int = 512
    flags: tuple[str, ...] = ()
    muon_flags: tuple[str, ...] = ()
    batch_models: tuple[str, ...] = ()
    decay_models: tuple[str, ...] = ()
    decays: tuple[float, ...] = ()
    variant_models: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    process: tuple[str, ...] = ()
    _by_name: Mapping[str, Model] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {model.name: model for model in self.models})
        if len(self._by_name) != len(self.models) or not self.models:
            raise ValueError(f"models: got {[m.name for m in self.models]}, expected at least one, of different names")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: got {list(self.seeds)}, expected at least one, all different")
        for name in ("learning_rate", "tokens_per_parameter", "sequence_length", "micro_batch_size", "vocabulary"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number")
        if not 1 < self.factor < math.inf:
            raise ValueError(f"factor: got {self.factor}, expected a number above 1, such as 2")
        for name in ("batch_models", "decay_models", "variant_models"):
            unknown = [model for model in getattr(self, name) if model not in self._by_name]
            if unknown:
                raise ValueError(f"{name}: got {unknown}, expected names among {list(self._by_name)}")
        for model in self.models:
            if model.hidden % model.heads or model.batch_size < 1:
                raise ValueError(
                    f"model {model.name}: got hidden {model.hidden}, heads {model.heads}, batch_size "
                    f"{model.batch_size}, expected a width that the heads divide and a positive batch"
                )

    def model(self, name: str) -> Model:
        """The model of a name."""
        return self._by_name[name]

    def variant(self, name: str) -> Variant:
        """The variant of a name."""
        return next(variant for variant in self.variants if variant.name == name)

    def steps(self, run: Run) -> int:
        """Training steps of a run: as many as its tokens fill batches, at least 2."""
        model = self.model(run.model)
        tokens = model.tokens or self.tokens_per_parameter * model.parameters
        return max(2, round(tokens / (run.batch_size * self.sequence_length)))

    def base(self, model: Model, optimizer: OptimizerName, learning_rate: float, seed: int) -> Run:
        """A run with the ladder's own settings."""
        return Run(model.name, optimizer, learning_rate, model.batch_size, self.weight_decay, seed)

    def megatron_flags(self, run: Run) -> list[str]:
        """Megatron's flags for a run, without data and output directories."""
        model, steps = self.model(run.model), self.steps(run)
        micro = max(n for n in range(1, self.micro_batch_size + 1) if run.batch_size % n == 0)
        evaluation = max(n for n in range(1, self.micro_batch_size + 1) if self.validation_sequences % n == 0)
        values = {
            "--num-layers": model.layers,
            "--hidden-size": model.hidden,
            "--num-attention-heads": model.heads,
            "--ffn-hidden-size": model.ffn,
            "--seq-length": self.sequence_length,
            "--max-position-embeddings": self.sequence_length,
            "--micro-batch-size": micro,
            "--global-batch-size": run.batch_size,
            "--train-iters": steps,
            "--lr": run.learning_rate,
            "--min-lr": run.learning_rate * self.final_rate,
            "--lr-decay-style": "cosine",
            "--lr-warmup-iters": max(1, round(self.warmup * steps)),
            "--weight-decay": run.weight_decay,
            "--seed": run.seed,
            "--eval-interval": steps,
            "--eval-iters": 1,
            "--eval-global-batch-size": self.validation_sequences,
            "--eval-micro-batch-size": evaluation,
            "--log-interval": max(1, steps // 100),
        }
        words = [*self.flags, *(str(word) for pair in values.items() for word in pair)]
        if run.optimizer == "muon":
            words += [*MUON_FLAGS, *self.muon_flags]
        if run.variant:
            words += self.variant(run.variant).flags
        return words


def load_ladder(path: Path) -> Ladder:
    """Reads a ladder.

    Raises:
        ValueError: If a key is unknown or missing, or a value is out of range; names the file and the key.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: got {type(content).__name__}, expected a mapping of settings")
    try:
        values = dict(content)
        values["models"] = tuple(_made(Model, row) for row in values.get("models") or ())
        values["variants"] = tuple(_made(Variant, row) for row in values.get("variants") or ())
        return _made(Ladder, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _made(kind: Any, row: Mapping[str, Any]) -> Any:
    known = {f.name for f in fields(kind) if f.init and not f.name.startswith("_")}
    unknown = sorted(set(row) - known)
    if unknown:
        raise ValueError(f"{kind.__name__}: got {', '.join(unknown)}, expected keys among {', '.join(sorted(known))}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})


def neighbours(rate: float, factor: float) -> tuple[float, float]:
    """The two learning rates beside a rate, rounded so that steps up and down lead back to the same number."""
    return rounded(rate / factor), rounded(rate * factor)


def rounded(rate: float) -> float:
    """A learning rate with four significant digits."""
    return float(f"{rate:.4g}")
