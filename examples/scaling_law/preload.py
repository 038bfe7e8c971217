"""Imported once by the server that runs are forked from: what each run would otherwise take seconds to import."""

import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402

from megatron_muon import cpu  # noqa: E402

torch.set_num_threads(1)
cpu.install()

import megatron.core.optimizer  # noqa: E402
import megatron.training.training  # noqa: E402, F401
