"""Scripts that tests train with, away from `tests/megatron`: beside it, a script's directory would hide Megatron."""
