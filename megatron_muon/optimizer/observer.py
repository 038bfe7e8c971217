"""What a step shows to whoever logs it: one protocol, and an observer that sees nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from megatron_muon.matrices.slice_elements import SliceElements


class StepObserver(Protocol):
    """Sees what one step computes on this rank. It changes nothing and issues no collective.

    Attributes:
        watches: Whether it looks at all; what costs time to show is not shown otherwise.
    """

    watches: bool

    def slices(self, quantity: str, values: Mapping[int, Tensor], elements: Mapping[int, SliceElements]) -> None:
        """Sees a quantity of this rank's slices: `momentum_sq`, `update_sq` or `weight_sq`.

        Args:
            quantity: What is squared and summed.
            values: Parameter index -> one number for each element of the slice; not mutated.
            elements: Parameter index -> what the slice is made of.
        """
        ...

    def learning_rates(self, rates: Mapping[int, float]) -> None:
        """Sees the learning rate of each slice, by parameter index."""
        ...

    def newton_schulz(self) -> AbstractContextManager[Any]:
        """Entered before a round's Newton-Schulz iterations and left after them."""
        ...

    def orthogonality(self, index: int, part: int, views: Sequence[Tensor]) -> None:
        """Sees the scaled updates of whole logical matrices that this rank made; not mutated."""
        ...


class Unobserved:
    """Sees nothing."""

    watches = False

    def slices(self, quantity: str, values: Mapping[int, Tensor], elements: Mapping[int, SliceElements]) -> None:
        pass

    def learning_rates(self, rates: Mapping[int, float]) -> None:
        pass

    def newton_schulz(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def orthogonality(self, index: int, part: int, views: Sequence[Tensor]) -> None:
        pass


UNOBSERVED = Unobserved()
