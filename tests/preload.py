"""Imported once by the fork server: what every test rank would otherwise spend seconds to import."""

import gc
import warnings

warnings.simplefilter("ignore")

import importlib.util  # noqa: E402

import torch  # noqa: E402

from megatron_muon import cpu  # noqa: E402

if importlib.util.find_spec("transformer_engine") is not None:
    from tests.te import cuda_stand_ins

    cuda_stand_ins.install()

torch.set_num_threads(1)
# Imports megatron.core and megatron.training; ranks start with the backend active.
cpu.install()

import megatron.core.models.gpt.gpt_layer_specs  # noqa: E402
import megatron.core.optimizer  # noqa: E402, F401

# Megatron collects garbage at every load of a checkpoint; what every rank inherits need not be looked at each time.
gc.freeze()
