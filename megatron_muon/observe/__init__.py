"""What people see of a step: metrics, times of phases, findings, counters of the device, and pages.

In: what the optimizer shows its observer and its watch. Out: numbers, tables, traces and HTML.
Nothing here changes what is computed, and nothing here imports Megatron.
"""
