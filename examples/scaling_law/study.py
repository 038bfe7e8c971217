"""A study's raw results in one JSON file, and the numbers that tables and figures are made of."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from scaling_law import schedule
from scaling_law.fit import Comparison, Curve, Form, NoCommonLoss, compare
from scaling_law.flops import PFLOP_S_DAY, count
from scaling_law.ladder import Ladder, Run
from scaling_law.runner import Result, result_from, saved_form

RAW = "results.json"
FORMS: tuple[Form, ...] = ("power", "irreducible")


@dataclass(frozen=True)
class Study:
    """A ladder and the results that it has.

    Attributes:
        ladder: The ladder.
        results: Results by run.
    """

    ladder: Ladder
    results: Mapping[Run, Result]

    @property
    def losses(self) -> dict[Run, float]:
        """Final validation losses."""
        return {run: result.loss for run, result in self.results.items()}

    def curves(self, *, total: bool = False) -> dict[str, Curve]:
        """The points of `adamw`, `muon` and `muon_tuned`: FLOPs in PFLOP/s-days, and losses by seed.

        Args:
            total: Counts the output layer and the optimizer's own operations as well.
        """
        out: dict[str, Curve] = {}
        for key, points in schedule.curves(self.ladder, self.losses).items():
            optimizer = "adamw" if key == "adamw" else "muon"
            curve = {}
            for name, losses in points.losses.items():
                model = self.ladder.model(name)
                flops = count(self.ladder, self.ladder.base(model, optimizer, points.rates[name], self.ladder.seeds[0]))
                curve[name] = ((flops.total if total else flops.model) / PFLOP_S_DAY, losses)
            out[key] = curve
        return out

    @cached_property
    def comparisons(self) -> dict[tuple[str, Form, bool], Comparison]:
        """By curve of Muon, form of the law and whether all FLOPs count.

        Left out: forms that have too few models, and curves that share no range of losses with AdamW's.
        """
        out = {}
        for total in (False, True):
            curves = self.curves(total=total)
            for key in ("muon", "muon_tuned"):
                names = [name for name in curves["adamw"] if name in curves[key]]
                adamw, muon = ({name: curve[name] for name in names} for curve in (curves["adamw"], curves[key]))
                for form in FORMS:
                    # An irreducible part is one more parameter: it needs a size more than a power law does.
                    if len(names) >= (2 if form == "power" else 4):
                        with suppress(NoCommonLoss):
                            out[key, form, total] = compare(adamw, muon, form)
        return out

    def effect(self, runs: Sequence[Run], base: Sequence[Run]) -> tuple[float, float] | None:
        """Mean difference of paired losses and its standard error, NaN for one pair; None if a run is missing."""
        pairs = [(self.losses.get(run), self.losses.get(other)) for run, other in zip(runs, base, strict=True)]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if len(differences) < len(pairs) or not pairs:
            return None
        error = math.nan
        if len(differences) > 1:
            error = statistics.stdev(differences) / math.sqrt(len(differences))
        return statistics.fmean(differences), error


def write(study: Study, path: Path) -> None:
    """Writes the raw results, sorted by run, each with the FLOPs counted for it."""
    rows = [
        saved_form(result) | {"flops": vars(count(study.ladder, run))}
        for run, result in sorted(study.results.items(), key=lambda item: item[0].key)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"ladder": {json.dumps(study.ladder.name)}, "runs": [\n{text}\n]}}\n', encoding="utf-8")


def read(ladder: Ladder, path: Path) -> Study:
    """Reads raw results.

    Raises:
        ValueError: If the file does not exist or belongs to another ladder.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; make it with `run`")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["ladder"] != ladder.name:
        raise ValueError(f"{path}: got results of the ladder {content['ladder']!r}, expected {ladder.name!r}")
    results = [result_from(row) for row in content["runs"]]
    return Study(ladder, {result.run: result for result in results})
