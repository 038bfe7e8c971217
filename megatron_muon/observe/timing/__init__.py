"""When the phases of a step began and ended on each rank, and what follows from it. Knows no Megatron."""
