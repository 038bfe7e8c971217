"""Floating-point operations of a run, counted from shapes. A multiplication and an addition are two operations.

Training costs three forward passes: one forward, two backward. Attention's products with keys and values are counted
for the positions that a causal mask leaves, (s + 1) / 2 of s on average; implementations that do not skip the others
execute up to twice as many. Embedding lookups are free; the output layer is a product like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron_muon.config import MuonConfig
from megatron_muon.newton_schulz import newton_schulz_flops
from scaling_law.ladder import Ladder, Model, Run

# Per parameter and step: momentum, Nesterov, decay and update; and AdamW's two moments, root and division.
MUON_ELEMENTWISE = 8
ADAMW_ELEMENTWISE = 14
PFLOP_S_DAY = 1e15 * 86400


@dataclass(frozen=True)
class Flops:
    """Operations of a whole run.

    Attributes:
        matrices: Products with the layers' weight matrices.
        attention: Products of queries with keys and of probabilities with values.
        embeddings: The output layer.
        newton_schulz: Newton-Schulz iterations; 0 with AdamW.
        elementwise: The optimizer's element-wise work.
    """

    matrices: float
    attention: float
    embeddings: float
    newton_schulz: float
    elementwise: float

    @property
    def model(self) -> float:
        """Forward and backward passes without the output layer: what scaling laws are fitted against."""
        return self.matrices + self.attention

    @property
    def total(self) -> float:
        """Everything, the optimizer included."""
        return self.model + self.embeddings + self.newton_schulz + self.elementwise


def matrix_shapes(model: Model) -> list[tuple[int, int]]:
    """The logical matrices of one layer, as Muon orthogonalizes them: Q, K, V, output, gate, up, down."""
    d, f = model.hidden, model.ffn
    return [(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]


def count(ladder: Ladder, run: Run) -> Flops:
    """The operations of a run."""
    model, steps = ladder.model(run.model), ladder.steps(run)
    tokens = steps * run.batch_size * ladder.sequence_length
    per_layer = sum(rows * cols for rows, cols in matrix_shapes(model))
    matrices = 3 * 2 * per_layer * model.layers * tokens
    positions = (ladder.sequence_length + 1) / 2
    attention = 3 * 2 * 2 * positions * model.hidden * model.layers * tokens
    output = model.hidden * ladder.vocabulary
    if run.optimizer == "adamw":
        orthogonalized, elementwise = 0.0, ADAMW_ELEMENTWISE * (model.parameters + 2 * output)
    else:
        ns_steps = muon_settings(ladder, run).ns_steps
        once = sum(newton_schulz_flops(rows, cols, ns_steps, "standard") for rows, cols in matrix_shapes(model))
        orthogonalized = float(once * model.layers * steps)
        elementwise = MUON_ELEMENTWISE * per_layer * model.layers + ADAMW_ELEMENTWISE * 2 * output
    return Flops(matrices, attention, 3 * 2 * output * tokens, orthogonalized, float(elementwise * steps))


def muon_settings(ladder: Ladder, run: Run) -> MuonConfig:
    """Muon's settings as far as they change the number of operations: the number of Newton-Schulz steps."""
    words = [*ladder.muon_flags, *(ladder.variant(run.variant).flags if run.variant else ())]
    steps = MuonConfig().ns_steps
    for flag, value in pairwise(words):
        if flag == "--muon-num-ns-steps":
            steps = int(value)
    return MuonConfig(ns_steps=steps)
