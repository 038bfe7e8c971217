"""A scaling-law study of Muon and AdamW that runs at any scale: `python examples/scaling_law --help`."""
