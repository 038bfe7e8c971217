"""Imported once by the fork server: what every test rank would otherwise spend seconds to import."""

import gc
import inspect
import os
import pkgutil
import warnings

warnings.simplefilter("ignore")

import importlib.util  # noqa: E402

import torch  # noqa: E402

from megatron_muon import cpu  # noqa: E402
from tests.distributed import PRELOADED  # noqa: E402

if importlib.util.find_spec("transformer_engine") is not None:
    from tests.te import cuda_stand_ins

    cuda_stand_ins.install()

torch.set_num_threads(1)
# Imports megatron.core and megatron.training; ranks start with the backend active.
cpu.install()

import megatron.core.datasets.gpt_dataset  # noqa: E402
import megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader  # noqa: E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.tokenizers.text.models  # noqa: E402, F401
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

# Megatron's writer gives its results to a server process. Spawned, that process imports torch and Megatron again, which
# costs each rank that saves more than its whole training; forked, it costs nothing.
inspect.unwrap(filesystem_async.get_write_results_queue).__defaults__ = ("fork",)

import megatron_muon  # noqa: E402

# The package and the tests are compiled at each import where Python may not write byte code.
for module in pkgutil.walk_packages(megatron_muon.__path__, "megatron_muon."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in ["tests.checkpoint_runs", "tests.training_runs", *os.environ.get(PRELOADED, "").split()]:
    try:
        importlib.import_module(name)
    except BaseException as error:  # a module that skips itself; the rank that needs it tells why
        warnings.warn(f"{name} is not preloaded: {error!r}", stacklevel=1)

# Megatron collects garbage at every load of a checkpoint; what every rank inherits need not be looked at each time.
gc.freeze()
