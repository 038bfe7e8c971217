"""The CPU backend's patches: what they do, what they leave alone, and how they refuse."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.package_info import __version__ as INSTALLED

from megatron_muon import cpu
from megatron_muon.megatron.entry.patching import Patch, apply_patches, undo
from tests.distributed import run_ranks

# --- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def victim() -> Iterator[types.ModuleType]:
    """A module to patch, so that no test replaces anything real."""
    module = types.ModuleType("victim")
    exec(
        "def greet(name, loudly=False):\n    return f'hello {name}'\n"
        "class Thing:\n    size = 1\n    @staticmethod\n    def make(size):\n        return size\n"
        "    @classmethod\n    def count(cls, size):\n        return size\n"
        "class Child(Thing):\n    pass\n",
        module.__dict__,
    )
    sys.modules["victim"] = module
    yield module
    del sys.modules["victim"]


def shouting(original: Any, name: str, loudly: bool = False) -> str:
    return str(original(name)).upper()


def doubled(original: Any, size: int) -> int:
    return 2 * int(original(size))


def counted(original: Any, cls: Any, size: int) -> tuple[str, int]:
    return cls.__name__, original(cls, size) + 1


def apply(*patches: Patch) -> Any:
    return apply_patches(patches, "a test", "mend it")


def test_patches_replace_functions_and_methods_of_each_kind_and_can_be_undone(victim: Any) -> None:
    holder: Any = types.ModuleType("holder")
    holder.under_another_name, holder.own = victim.greet, 5
    sys.modules["holder"] = holder
    before = {name: vars(victim.Thing)[name] for name in ("make", "count")}
    greet = victim.greet
    applied = apply(
        Patch("victim:greet", shouting, "a test", ("name",), by_name=True),
        Patch("victim:Thing.make", doubled, "a test", ("size",), exact=True),
        Patch("victim:Thing.count", counted, "a test", ("size",)),
        Patch("victim:Child.size", 9, "a test", is_value=True),
    )
    del sys.modules["holder"]
    assert victim.greet("ann") == holder.under_another_name("ann") == "HELLO ANN"
    assert victim.greet.__name__ == "greet"
    assert (victim.Thing.make(3), victim.Thing().make(3)) == (6, 6)
    assert (victim.Thing.count(3), victim.Child().count(3)) == (("Thing", 4), ("Child", 4))
    assert (victim.Thing.size, victim.Child.size) == (1, 9)
    # What somebody has replaced since is left alone.
    victim.Thing.make = staticmethod(abs)
    undo(applied)
    assert victim.greet is holder.under_another_name is greet
    assert vars(victim.Thing)["count"] is before["count"] and victim.Thing.make(-1) == 1
    assert victim.Child.size == 1 and "size" not in vars(victim.Child)


@pytest.mark.parametrize(
    ("target", "parameters", "problem"),
    [
        ("victim:absent", (), "victim:absent: there is no absent in victim"),
        ("victim:Thing.absent", (), "there is no Thing.absent in victim"),
        ("victim:Absent.make", (), "there is no Absent.make in victim"),
        ("victim.absent:make", (), "there is no module victim.absent"),
        (
            "victim:greet",
            ("name", "softly"),
            "got parameters (name, loudly), expected to begin with (name, softly)",
        ),
    ],
)
def test_a_missing_or_changed_target_is_refused_and_nothing_replaced(
    victim: Any, target: str, parameters: tuple[str, ...], problem: str
) -> None:
    original = victim.greet
    with pytest.raises(RuntimeError) as raised:
        apply(Patch("victim:greet", shouting, "a test"), Patch(target, shouting, "a test", parameters))
    message = str(raised.value)
    assert problem in message
    assert message.startswith(f"a test does not fit megatron-core {INSTALLED} with torch")
    assert victim.greet is original


def test_all_parameters_or_the_first_ones(victim: Any) -> None:
    apply(Patch("victim:greet", shouting, "a test", ("name",)))
    with pytest.raises(RuntimeError, match=r"got parameters \(name, loudly\), expected \(name\)"):
        apply(Patch("victim:greet", shouting, "a test", ("name",), exact=True))


def test_install_refuses_a_machine_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(cpu, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(RuntimeError, match=r"finds 4 CUDA device.*CUDA_VISIBLE_DEVICES="):
        cpu.install()
    assert torch.zeros is zeros
    assert not cpu.is_installed()


def test_install_refuses_a_megatron_that_lacks_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def table() -> list[Patch]:
        raise ModuleNotFoundError("No module named 'megatron.core.gone'", name="megatron.core.gone")

    monkeypatch.setattr(cpu, "_installed", False)
    monkeypatch.setattr(cpu, "all_patches", table)
    with pytest.raises(RuntimeError, match=r"does not fit megatron-core 0\.\d+.*No module named 'megatron.core.gone'"):
        cpu.install()


def test_flags_come_as_command_line_words() -> None:
    words = cpu.cpu_arguments()
    assert words[words.index("--distributed-backend") + 1] == "gloo"
    assert "--use-cpu-initialization" in words
    assert None not in words
    assert len(words) == sum(1 if value is None else 2 for _, value in cpu.REQUIRED_FLAGS)


NEUTRAL = """
import sys, torch
from megatron_muon import cpu
assert not cpu.is_installed()
assert not any(name.startswith("megatron.") for name in sys.modules), "importing the backend imported Megatron"
assert torch.zeros is torch._C._VariableFunctions.zeros
"""


def test_importing_the_package_changes_nothing() -> None:
    subprocess.run([sys.executable, "-c", NEUTRAL], check=True, timeout=120)


# --- torch without CUDA ----------------------------------------------------------------------------------------------


class MakesTensorsInBackward(torch.autograd.Function):
    """Where a TorchFunctionMode would be off."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.full((3,), 2.0, device="cuda") * grad.to(torch.cuda.current_device())


def devices(rank: int, world_size: int) -> None:
    assert cpu.is_installed()
    assert not torch.cuda.is_available()
    everywhere: list[Any] = ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 1), "cpu", None]
    x = torch.arange(3.0)
    for device in everywhere:
        made = [
            torch.zeros(3, device=device),
            torch.tensor([1, 2], device=device),
            torch.empty(2, dtype=torch.bfloat16, device=device, pin_memory=True),
            torch.randint(0, 5, (2,), device=device),
            torch.full((2,), 7, device=device),
            torch.ones_like(x, device=device),
            x.new_zeros(2, device=device),
        ]
        assert {t.device.type for t in made} == {"cpu"}
        if device is not None:
            assert x.to(device) is x
            assert x.to(device=device, dtype=torch.float64).dtype is torch.float64
            assert x.to(device, torch.bfloat16).dtype is torch.bfloat16
            copy = x.to(device, copy=True)
            assert copy is not x and torch.equal(copy, x)
    # What does not name CUDA goes through.
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert x.to(torch.float16).dtype is torch.float16
    assert x.to(torch.zeros(1, dtype=torch.int32)).dtype is torch.int32
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="xpu")
    assert torch.nn.Linear(2, 2).cuda().to("cuda").weight.device.type == "cpu"
    assert x.cuda(non_blocking=True) is x

    leaf = torch.ones(3, requires_grad=True)
    MakesTensorsInBackward.apply(leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [2.0, 2.0, 2.0]

    names = {dtype: torch.zeros(1, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16, torch.int64)}
    assert names[torch.float32] == "torch.cuda.FloatTensor"
    assert names[torch.bfloat16] == "torch.cuda.BFloat16Tensor"
    assert names[torch.int64] == "torch.LongTensor"
    assert x.type(torch.int32).dtype is torch.int32
    assert torch.cuda.get_device_properties(0).major >= 10
    assert torch.cuda.device_count() == world_size


def test_tensors_of_cuda_devices_are_made_on_the_cpu() -> None:
    run_ranks(devices, 1)


def idempotence(rank: int, world_size: int) -> None:
    before = (torch.zeros, torch.Tensor.to, dist.all_gather, torch.cuda.Stream)
    cpu.install()
    assert (torch.zeros, torch.Tensor.to, dist.all_gather, torch.cuda.Stream) == before
    table = cpu.all_patches()
    assert len({patch.target for patch in table}) == len(table)
    assert all(patch.why for patch in table)


def test_a_second_install_does_nothing() -> None:
    run_ranks(idempotence, 1)


def streams_and_events(rank: int, world_size: int) -> tuple[float, float]:
    default, side, other = torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()
    assert torch.cuda.current_stream() is default
    context = torch.cuda.stream(side)
    for _ in range(2):  # DistributedDataParallel enters one context twice
        with context:
            assert torch.cuda.current_stream() is side
            with torch.cuda.stream(None), torch.cuda.stream(other):
                with context:
                    assert torch.cuda.current_stream() is side
                assert torch.cuda.current_stream() is other
        assert torch.cuda.current_stream() is default
    side.wait_stream(default)
    assert side != default

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="recorded"):
        start.elapsed_time(end)
    began = time.perf_counter()
    start.record()
    while time.perf_counter() < began + 5e-3:
        pass
    side.record_event(end)
    taken_ms = (time.perf_counter() - began) * 1e3
    with pytest.raises(RuntimeError, match="enable_timing"):
        start.elapsed_time(default.record_event())
    return start.elapsed_time(end), taken_ms


def test_events_measure_time() -> None:
    [(measured_ms, taken_ms)] = run_ranks(streams_and_events, 1)
    # From the first record, after `began`, to the second, before the outer clock was read.
    assert 4.0 < measured_ms <= taken_ms


def random_states(rank: int, world_size: int) -> tuple[list[list[float]], list[str]]:
    import logging

    from megatron.core import parallel_state, tensor_parallel

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(Keep())
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    draws = [torch.rand(2, device="cuda").tolist()]
    with tracker.fork():
        draws.append(torch.rand(2, device="cuda").tolist())
    draws.append(torch.rand(2, device="cuda").tolist())
    with tracker.fork():
        draws.append(torch.rand(2, device="cuda").tolist())
    with pytest.raises(NotImplementedError, match="CUDA graphs"):
        tensor_parallel.random._get_cuda_rng_state(graph_safe=True)
    return draws, messages


def test_forked_random_states_are_separate_streams() -> None:
    (first, messages), (second, _) = run_ranks(random_states, 2)
    generator = torch.Generator().manual_seed(7)
    expected = [torch.rand(2, generator=generator).tolist() for _ in range(2)]
    assert [first[0], first[2]] == [second[0], second[2]] == expected  # the fork leaves the outer stream alone
    assert first[1] != first[3]  # the forked one goes on
    assert first[1] != second[1]  # and differs between tensor-parallel ranks
    assert messages == []


def compiled(rank: int, world_size: int) -> int:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu  # decorated with torch.compile, on import
    from torch._dynamo.utils import counters

    bias_swiglu(torch.ones(2, 4), torch.ones(4))
    assert torch.compile(lambda x: x + 1)(torch.ones(1)).item() == 2
    return int(counters["frames"]["total"])


def test_nothing_is_compiled() -> None:
    assert run_ranks(compiled, 1) == [0]


def helpers(rank: int, world_size: int) -> None:
    import megatron.core.datasets.utils as utils

    utils.compile_helpers()  # ends the process where it runs make and fails
    from megatron.core.datasets import helpers_cpp

    assert callable(helpers_cpp.build_sample_idx_int32)


def test_dataset_helpers_need_no_build() -> None:
    run_ranks(helpers, 1)


# --- torch.distributed over Gloo -------------------------------------------------------------------------------------

DTYPES = (torch.bfloat16, torch.uint8, torch.float32, torch.bfloat16, torch.int64)


def values(rank: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    return (torch.arange(count) + 100 * rank).remainder(251).to(dtype)


def coalesced(rank: int, world_size: int, async_ops: bool) -> None:
    from megatron.core.distributed.param_and_grad_buffer import _coalescing_manager

    counts = [3 + i for i in range(len(DTYPES))]
    shards = [values(rank, dtype, n) for dtype, n in zip(DTYPES, counts)]
    outputs = [torch.empty(world_size * n, dtype=dtype) for dtype, n in zip(DTYPES, counts)]
    with _coalescing_manager(dist.group.WORLD, async_ops=async_ops) as handle:
        for output, shard in zip(outputs, shards):
            dist.all_gather_into_tensor(output, shard, async_op=async_ops)
    if async_ops:
        handle.wait()
    for output, dtype, n in zip(outputs, DTYPES, counts):
        assert torch.equal(output, torch.cat([values(r, dtype, n) for r in range(world_size)]))

    sums = [values(rank, dtype, n) for dtype, n in zip(DTYPES, counts) if dtype is not torch.uint8]
    expected = [sum(values(r, t.dtype, t.numel()) for r in range(world_size)) for t in sums]
    parts = [torch.empty(n, dtype=t.dtype) for n, t in zip(counts, sums)]
    wholes = [values(rank, t.dtype, world_size * n) for n, t in zip(counts, sums)]
    with dist._coalescing_manager(async_ops=async_ops) as handle:
        for tensor in sums:
            dist.all_reduce(tensor, async_op=async_ops)
    if async_ops:
        handle.wait()
    with dist._coalescing_manager(async_ops=async_ops) as handle:
        for part, whole in zip(parts, wholes):
            dist.reduce_scatter_tensor(part, whole, async_op=async_ops)
    if async_ops:
        handle.wait()
    for tensor, value in zip(sums, expected):
        assert torch.equal(tensor, value)
    for part, whole in zip(parts, wholes):
        total = sum(values(r, whole.dtype, whole.numel()) for r in range(world_size))
        assert torch.equal(part, total.chunk(world_size)[rank])


@pytest.mark.parametrize("async_ops", [False, True])
def test_coalesced_collectives_of_mixed_dtypes(async_ops: bool) -> None:
    run_ranks(coalesced, 2, async_ops)


def failed_block(rank: int, world_size: int) -> None:
    before = torch.full((2,), 5.0)
    with pytest.raises(KeyError), dist._coalescing_manager():
        dist.all_reduce(before)
        raise KeyError
    after = torch.full((3,), 1.0)
    dist.all_reduce(after)  # would only be noted down, were the block still open
    assert after.tolist() == [world_size] * 3
    with dist._coalescing_manager():
        dist.all_reduce(after)
        with pytest.raises(RuntimeError, match="open already"), dist._coalescing_manager():
            pass
    assert after.tolist() == [world_size**2] * 3
    assert before.tolist() == [5.0, 5.0]  # the failed block's reduction was never issued
    with pytest.raises(NotImplementedError, match="device"), dist._coalescing_manager(device=torch.device("cpu")):
        pass


def test_a_failed_coalescing_block_leaves_nothing_behind() -> None:
    run_ranks(failed_block, 2)


def uneven(rank: int, world_size: int) -> None:
    # Rank r sends r + d + 1 rows to rank d, except nothing from 1 to 0.
    rows = [[0 if (r, d) == (1, 0) else r + d + 1 for d in range(world_size)] for r in range(world_size)]
    sent = torch.arange(sum(rows[rank]) * 2.0).view(-1, 2) + 1000 * rank
    received = torch.empty(sum(rows[r][rank] for r in range(world_size)), 2)
    from_each = torch.tensor([rows[r][rank] for r in range(world_size)])
    dist.all_to_all_single(received, sent, from_each, torch.tensor(rows[rank]))
    expected = []
    for source in range(world_size):
        whole = torch.arange(sum(rows[source]) * 2.0).view(-1, 2) + 1000 * source
        expected.append(whole.split(rows[source])[rank])
    assert torch.equal(received, torch.cat(expected))

    sizes = [3, 0, 5][:world_size]
    for async_op in (False, True):
        gathered = [torch.full((n,), -1.0) for n in sizes]
        work = dist.all_gather(gathered, torch.full((sizes[rank],), float(rank)), async_op=async_op)
        if async_op:
            assert work.wait() and work.is_completed()
        assert [g.tolist() for g in gathered] == [[float(r)] * n for r, n in enumerate(sizes)]
    with pytest.raises(ValueError, match=r"tensor_list\[\d\] has shape \(\d,\), but this rank's tensor has \(9,\)"):
        dist.all_gather([torch.empty(n) for n in sizes], torch.empty(9))


def test_uneven_exchanges() -> None:
    run_ranks(uneven, 3)
