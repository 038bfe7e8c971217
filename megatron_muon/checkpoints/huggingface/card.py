"""The model card that an export gets: what was trained, how far, and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def model_card(name: str, facts: Mapping[str, object], notes: Iterable[str], args: Any, iteration: int) -> str:
    """README.md of an export.

    Args:
        name: The model's.
        facts: What to say about the weights.
        notes: What a user should know besides.
        args: Megatron's arguments, for what was trained.
        iteration: How many steps it was trained.
    """
    optimizer = "Distributed Muon" if getattr(args, "distributed_muon", False) else str(getattr(args, "optimizer", ""))
    samples = getattr(args, "consumed_train_samples", 0) or 0
    rows = {
        **facts,
        "layers, width": f"{args.num_layers}, {args.hidden_size}",
        "context length": f"{args.max_position_embeddings:,}",
        "iteration": f"{iteration:,}",
        "training tokens": f"{samples * (getattr(args, 'seq_length', 0) or 0):,}",
        "optimizer": optimizer or "unknown",
        "learning rate, weight decay": f"{getattr(args, 'lr', None)}, {getattr(args, 'weight_decay', None)}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    remarks = "".join(f"\n- {note}" for note in notes)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

Exported by megatron_muon from a Megatron-Core checkpoint. Weights were read back after writing.

| | |
|---|---|
{table}
{remarks}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
```
"""
