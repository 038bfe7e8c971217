"""The study's tables as rows of text, and the document that is made of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scaling_law import schedule
from scaling_law.flops import count
from scaling_law.ladder import Run
from scaling_law.study import FORMS, Study

Rows = list[tuple[str, ...]]
CURVES = {"muon": "AdamW's rate", "muon_tuned": "its own best rate"}
# Moonlight (arXiv 2502.16982), figure 3: C in PFLOP/s-days.
PAPER = {"adamw": (2.608, 0.054), "muon": (2.506, 0.052)}


def sizes(study: Study) -> Rows:
    """The models: their shapes, tokens and operations."""
    out: Rows = [("model", "layers", "width", "parameters", "tokens", "steps", "batch", "FLOPs", "Newton-Schulz %")]
    for model in study.ladder.models:
        run = study.ladder.base(model, "muon", study.ladder.learning_rate, study.ladder.seeds[0])
        steps, flops = study.ladder.steps(run), count(study.ladder, run)
        tokens = steps * model.batch_size * study.ladder.sequence_length
        out.append(
            (
                model.name,
                f"{model.layers}",
                f"{model.hidden}",
                f"{model.parameters:,}",
                f"{tokens:,}",
                f"{steps:,}",
                f"{model.batch_size}",
                f"{flops.model:.2e}",
                f"{100 * flops.newton_schulz / flops.total:.1f}",
            )
        )
    return out


def losses(study: Study) -> Rows:
    """Final validation losses at the best rates: mean over seeds and half of their range."""
    curves = schedule.curves(study.ladder, study.losses)
    out: Rows = [("model", "AdamW", "rate", "Muon, AdamW's rate", "Muon, own best", "rate")]
    for model in study.ladder.models:
        cells = {key: _mean(points.losses.get(model.name, ())) for key, points in curves.items()}
        rates = {key: points.rates.get(model.name) for key, points in curves.items()}
        out.append(
            (
                model.name,
                cells["adamw"],
                _rate(rates["adamw"]),
                cells["muon"],
                cells["muon_tuned"],
                _rate(rates["muon_tuned"]),
            )
        )
    return out


def laws(study: Study) -> Rows:
    """Both forms of law for each curve of Muon, and the ratio of FLOPs in the middle of the common range."""
    out: Rows = [("Muon at", "law", "FLOPs", "AdamW", "Muon", "Muon's FLOPs / AdamW's (95 % interval)")]
    for (key, form, total), found in study.comparisons.items():
        texts = []
        for law in (found.adamw, found.muon):
            floor = f"{law.irreducible:.3f} + " if law.irreducible else ""
            texts.append(f"{floor}{law.a:.3g} C^-{law.b:.3f}")
        out.append((CURVES[key], form, "all" if total else "model", *texts, str(found.middle)))
    return out


def effects(study: Study) -> Rows:
    """What batch size, weight decay and variants change: mean difference of paired runs, and its standard error."""
    ladder = study.ladder
    out: Rows = [("model", "change", "loss minus base", "standard error")]

    for model in ladder.models:
        rate = schedule.sweep(ladder, model, "adamw", study.losses).best
        pairs: dict[str, list[tuple[Run, Run]]] = {}
        for change, run, base in schedule.changes(ladder, model, rate) if rate is not None else ():
            pairs.setdefault(change, []).append((run, base))
        for change, found in pairs.items():
            effect = study.effect([run for run, _ in found], [base for _, base in found])
            if effect is not None:
                error = f"{effect[1]:.4f}" if math.isfinite(effect[1]) else "one seed"
                out.append((model.name, change, f"{effect[0]:+.4f}", error))
    return out


def headline(study: Study) -> str:
    """The ratio with its interval and its scale, in one sentence."""
    found = study.comparisons.get(("muon", "power", False))
    if found is None:
        return "No fit: the study has too few finished models, or its curves share no range of losses."
    names = study.curves()["muon"]
    parameters = [study.ladder.model(name).parameters for name in names]
    return (
        f"At equal loss Muon needs {found.middle} of AdamW's FLOPs (forward and backward passes; 95 % interval), in "
        f"the middle of the range of {len(names)} models of {min(parameters):,} to {max(parameters):,} parameters, "
        f"{len(study.ladder.seeds)} seeds; Moonlight found about 0.52 for 399M to 1.5B parameters."
    )


def markdown(rows: Rows) -> str:
    """A table for a document; the first column to the left, the others to the right."""
    head, *body = rows
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.3g}"


SECTIONS = (
    ("Models", sizes, "FLOPs are those of forward and backward passes without the output layer."),
    (
        "Losses",
        losses,
        "Final validation loss, mean over seeds ± half of their range, at each size's best learning rates.",
    ),
    (
        "Laws",
        laws,
        "C in PFLOP/s-days. *model* counts FLOPs as above; *all* includes output layer and optimizer. "
        f"Forms: {', '.join(FORMS)}.",
    ),
    (
        "What matters",
        effects,
        "Differences of final validation loss at AdamW's best rate; variants are of Muon, paired by seed.",
    ),
)
