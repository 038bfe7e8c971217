"""QK-Clip on sharded main parameters: reads the attention's largest logits, and scales this rank's fp32 slices.

The core attention records the logits: Transformer Engine's, or the CPU backend's. Settings are Megatron's own, with
its flags: `qk_clip`, `qk_clip_threshold`, `qk_clip_alpha`, and `log_max_attention_logit` to look only.
"""

# More than 400 lines: QK-Clip for three kinds of attention, read beside each other.

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn
from torch.profiler import record_function

from megatron_muon.exchange.phases import label
from megatron_muon.megatron.model.identity import unwrapped
from megatron_muon.rule.qk_clip import (
    ClipRule,
    FactorTable,
    HeadRows,
    gammas,
    grouped_rows,
    mla_key_rows,
    mla_query_rows,
    range_of_row,
    scale_rows,
)

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_muon.megatron.checkpoint.sharded_states import CheckpointedOptimizer

_LOG = logging.getLogger(__name__)

# The attribute of a core attention in which it keeps each head's largest logit until it is set to None.
RECORD = "current_max_attn_logits"


@dataclass(frozen=True)
class _Attention:
    """An attention module whose logits are read.

    Attributes:
        name: Of the module in the whole model.
        core: The core attention.
        num_heads: Heads that this rank's core attention attends with.
        rule: How to clip; None where logits are only logged, or weights are frozen.
        rows: Parameter -> the rows of it that QK-Clip may scale.
    """

    name: str
    core: Any
    num_heads: int
    rule: ClipRule | None
    rows: Mapping[nn.Parameter, tuple[HeadRows, ...]]


class QKClip:
    """MuonClip's second half, for all attention modules of a rank's model chunks, wherever they are in them.

    A step that updates goes through `collect` (one MAX all-reduce), then the inner optimizers, each followed by
    `apply`, then Megatron's cast of main parameters to model parameters, so that both are clipped alike. `reset`
    forgets what was recorded: before a forward pass, since evaluations record as well, and after every step.

    None of these waits for the device: factors stay there, and all rows are multiplied, most of them by 1. The host
    reads logits when somebody asks: `largest`, `maxima` and `counts`.

    Where tensor-parallel ranks share a query group, each of them stores rows of any head: the maxima of all heads are
    then exchanged over the tensor-parallel ranks too.

    Attributes:
        largest: 0-d tensor: the largest finite logit of this rank's attention modules in the last step; 0 if it was
            skipped.
        asked: Whether a chunk's config asks to clip.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        names: Mapping[nn.Parameter, str],
        dp_cp_group: dist.ProcessGroup,
        parallel: ProcessGroupCollection,
    ) -> None:
        """Finds the attention modules. Issues no collective.

        Args:
            chunks: May be wrapped.
            names: Trainable parameter -> name in the whole model. Attention without any is left alone.
            dp_cp_group: All ranks that have the same weights and other tokens.
            parallel: Must have `tp` and, for shared query groups, `tp_dp_cp`.

        Raises:
            ValueError: If a setting is bad, or queries and keys are normalized.
            NotImplementedError: If attention of another kind is to be clipped, or logits cannot be recorded.
        """
        modules = [m for chunk in chunks for m in unwrapped(chunk).modules() if isinstance(m, Attention)]
        found = [(name, m) for m in modules if _is_recorded(m) and (name := _whole_name(m, names))]
        self.asked = any(getattr(chunk.config, "qk_clip", False) for chunk in chunks)
        self._tp_size, self._tp_rank = parallel.tp.size(), parallel.tp.rank()
        self._shares_groups = any(m.config.num_query_groups < self._tp_size for _, m in found)
        self._group = parallel.tp_dp_cp if self._shares_groups else dp_cp_group
        # Data-parallel ranks have clipped the same heads: one of them reports.
        self._reports = dp_cp_group.rank() == 0
        self._attentions = [self._attention(name, module) for name, module in found]
        self._sizes = [a.num_heads * (self._tp_size if self._shares_groups else 1) for a in self._attentions]
        self._factors: dict[nn.Parameter, Tensor] = {}
        self._tensors: _OnDevice | None = None
        self.largest = torch.zeros(())
        _CLIPS[chunks[0]] = ref(self)

    def _attention(self, name: str, module: Any) -> _Attention:
        config = module.config
        if not hasattr(module.core_attention, RECORD):
            raise NotImplementedError(
                f"{name}: got core attention {type(module.core_attention).__name__}, which records no logits, with "
                "--qk-clip or --log-max-attention-logit; expected Transformer Engine's from 2.9 on: use "
                "--transformer-impl transformer_engine, or omit the flag"
            )
        if config.cuda_graph_impl != "none":
            raise NotImplementedError(
                f"--cuda-graph-impl: got {config.cuda_graph_impl!r}, expected 'none' with --qk-clip or "
                "--log-max-attention-logit: a graph that is replayed does not record logits; omit one of them"
            )
        # Of grouped queries this rank's parts; with shared groups, the whole model's.
        pieces = 1 if self._shares_groups else self._tp_size
        rows = _rows(name, module, pieces) if config.qk_clip else {}
        rule = ClipRule(config.qk_clip_threshold, config.qk_clip_alpha) if config.qk_clip else None
        heads = config.num_attention_heads // self._tp_size
        return _Attention(name, module.core_attention, heads, rule if rows else None, rows)

    @property
    def clips(self) -> bool:
        """Whether there is anything on this rank that may be scaled."""
        return any(attention.rows for attention in self._attentions)

    @property
    def records(self) -> bool:
        """Whether there is attention on this rank whose logits are read."""
        return bool(self._attentions)

    def reset(self) -> None:
        """Forgets recorded logits and what was to be scaled."""
        for attention in self._attentions:
            setattr(attention.core, RECORD, None)
        self._factors = {}

    @torch.no_grad()
    def collect(self) -> None:
        """Takes the largest logits of the step over all ranks, and decides what is scaled.

        Collective: one all-reduce over the data- and context-parallel ranks (and the tensor-parallel ones if they
        share query groups), all of which have the same attention modules; none if there are no such modules.

        Raises:
            RuntimeError: If no attention module has recorded logits, or one recorded those of other heads.
        """
        if not self._attentions:
            return
        flat = self._recorded()
        # Which of two NaNs a maximum keeps differs between backends; infinity is the same on all ranks.
        flat.masked_fill_(flat.isnan(), math.inf)
        with record_function(label("qk_clip")):
            dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=self._group)
        self._decide(flat)

    def _own(self, at: int) -> slice:
        """The part of an attention module's heads in the vector that are this rank's."""
        heads = self._attentions[at].num_heads
        start = heads * self._tp_rank if self._shares_groups else 0
        return slice(start, start + heads)

    def _recorded(self) -> Tensor:
        """(heads of all attention modules,) fp32; -inf where nothing was recorded."""
        recorded = [getattr(attention.core, RECORD) for attention in self._attentions]
        first = next((tensor for tensor in recorded if tensor is not None), None)
        if first is None:
            raise RuntimeError(
                f"{self._attentions[0].name}: got no attention logits in this step, expected some with --qk-clip or "
                "--log-max-attention-logit; run forward passes between zero_grad and step, or omit the flag"
            )
        flat = torch.full((sum(self._sizes),), -math.inf, dtype=torch.float32, device=first.device)
        parts = torch.split(flat, self._sizes)
        for at, (attention, part, tensor) in enumerate(zip(self._attentions, parts, recorded, strict=True)):
            if tensor is None:
                continue
            if tensor.numel() != attention.num_heads:
                raise RuntimeError(
                    f"{attention.name}: got logits of {tensor.numel()} heads, expected {attention.num_heads}, those of "
                    "this tensor-parallel rank; omit --qk-clip, which this attention does not support"
                )
            part[self._own(at)] = tensor.view(-1)
        return flat

    def _decide(self, flat: Tensor) -> None:
        """From the heads' largest logits to the factors of all rows, on the device."""
        if self._tensors is None:
            self._tensors = self._on_device(flat.device)
        tensors = self._tensors
        finite = torch.where(flat.isfinite(), flat, -math.inf)
        largest = finite.amax()
        self.largest = torch.where(largest.isfinite(), largest, 0.0)
        tensors.logged = torch.maximum(tensors.logged, finite)
        tensors.nonfinite += (flat == math.inf) & tensors.own
        head_gammas = gammas(flat, tensors.thresholds)
        tensors.clipped += ((head_gammas < 1) & tensors.own).sum()
        factors = torch.cat((tensors.table.factors(head_gammas).float(), torch.ones(1, device=flat.device)))
        self._factors = {parameter: factors[index] for parameter, index in tensors.range_of_row.items()}

    def _on_device(self, device: torch.device) -> _OnDevice:
        """What `_decide` needs of the attention modules, which does not change."""
        heads = sum(self._sizes)
        thresholds = torch.full((heads,), math.inf, dtype=torch.float64)
        own = torch.zeros(heads, dtype=torch.bool)
        parts: list[tuple[Sequence[HeadRows], int, float]] = []
        pieces = self._tp_size if self._shares_groups else 1
        num_ranges = sum(len(rows) for attention in self._attentions for rows in attention.rows.values())
        range_of: dict[nn.Parameter, Tensor] = {}
        first_head, first_range = 0, 0
        for at, (attention, size) in enumerate(zip(self._attentions, self._sizes, strict=True)):
            own[first_head : first_head + size][self._own(at)] = True
            if attention.rule is not None:
                thresholds[first_head : first_head + size] = attention.rule.threshold
                for parameter, rows in attention.rows.items():
                    parts.append((rows, first_head, attention.rule.alpha))
                    local = torch.tensor(range_of_row(rows, parameter.size(0) * pieces))
                    index = torch.where(local < len(rows), local + first_range, num_ranges)
                    range_of[parameter] = index.to(device)
                    first_range += len(rows)
            first_head += size
        return _OnDevice(
            thresholds=thresholds.to(device),
            own=own.to(device),
            table=FactorTable.of(parts, device),
            range_of_row=range_of,
            logged=torch.full((heads,), -math.inf, device=device),
            clipped=torch.zeros((), dtype=torch.long, device=device),
            nonfinite=torch.zeros(heads, dtype=torch.long, device=device),
        )

    @torch.no_grad()
    def apply(self, optimizer: CheckpointedOptimizer) -> None:
        """Scales what an optimizer stores of the rows that `collect` chose. Issues no collective."""
        for parameter, factors in self._factors.items():
            if parameter not in optimizer.model_param_gbuf_map:
                continue
            group, order = optimizer.model_param_group_index_map[parameter]
            main = optimizer.optimizer.param_groups[group]["params"][order]
            first = optimizer._get_model_param_range_map(parameter)["param"].start
            if self._shares_groups:
                first += self._tp_rank * parameter.numel()
            scale_rows(main.view(-1), first, parameter.numel() // parameter.size(0), factors)

    def skipped(self) -> None:
        """Notes that a step did not update."""
        self.largest = torch.zeros(())

    def maxima(self) -> dict[str, float]:
        """The largest finite logit since the last call, of each attention module and of all; the ranks' maximum.

        Waits for the device.
        """
        if self._tensors is None:
            return {}
        of_each = torch.stack([part.amax() for part in torch.split(self._tensors.logged, self._sizes)]).tolist()
        self._tensors.logged.fill_(-math.inf)
        names = [f"max_attention_logit/{attention.name}" for attention in self._attentions]
        logged = {name: value for name, value in zip(names, of_each, strict=True) if math.isfinite(value)}
        return {**({"max_attention_logit": max(logged.values())} if logged else {}), **logged}

    def counts(self) -> dict[str, float]:
        """Heads clipped, and heads with logits that are not finite, since the last call; the sum over ranks.

        Waits for the device, and warns of heads that are not finite.
        """
        clipped, nonfinite = 0, 0
        if self._tensors is not None:
            parts = torch.split(self._tensors.nonfinite, self._sizes)
            clipped, *broken = torch.stack([self._tensors.clipped, *(part.sum() for part in parts)]).tolist()
            self._tensors.clipped.zero_()
            self._tensors.nonfinite.zero_()
            nonfinite = sum(broken)
            for attention, count in zip(self._attentions, broken, strict=True):
                if count and self._reports:
                    _LOG.warning(
                        "%s: logits of heads were NaN or infinite %d times; QK-Clip left these heads alone",
                        attention.name,
                        count,
                    )
        reported = {"qk_clipped_heads": clipped, "qk_nonfinite_heads": nonfinite}
        return {name: count if self._reports else 0 for name, count in reported.items()}


@dataclass
class _OnDevice:
    """Tensors that `QKClip` keeps on the device.

    Attributes:
        thresholds: (heads,) fp64; infinity where logits are only logged.
        own: (heads,): which of them are this rank's.
        table: From gammas to the factors of row ranges.
        range_of_row: Parameter -> for each of its rows, the range with its factor; the last, of factor 1, for others.
        logged: (heads,): the largest finite logits since they were last logged.
        clipped: Heads of this rank clipped since then.
        nonfinite: (heads,): how often a head of this rank was not finite since then.
    """

    thresholds: Tensor
    own: Tensor
    table: FactorTable
    range_of_row: dict[nn.Parameter, Tensor]
    logged: Tensor
    clipped: Tensor
    nonfinite: Tensor


def _is_recorded(module: Any) -> bool:
    return bool(module.config.qk_clip or module.config.log_max_attention_logit)


def _whole_name(module: nn.Module, names: Mapping[nn.Parameter, str]) -> str | None:
    """The module's name in the whole model, taken from a trainable parameter's; None if it has none."""
    for local, parameter in module.named_parameters():
        if parameter in names:
            return names[parameter].removesuffix(f".{local}")
    return None


def _rows(name: str, module: Any, pieces: int) -> dict[nn.Parameter, tuple[HeadRows, ...]]:
    """What QK-Clip may scale of an attention module; nothing where a part of it is frozen.

    Args:
        name: Of the module.
        module: The module.
        pieces: Into how many tensor-parallel pieces heads and groups are counted.
    """
    config = module.config
    heads = config.num_attention_heads // pieces
    if isinstance(module, MLASelfAttention):
        query = module.linear_q_proj if config.q_lora_rank is None else module.linear_q_up_proj
        layers = {
            query: mla_query_rows(heads, config.qk_head_dim, config.qk_pos_emb_head_dim),
            module.linear_kv_up_proj: mla_key_rows(heads, config.qk_head_dim, config.v_head_dim),
        }
    elif isinstance(module, SelfAttention):
        norms = (module.q_layernorm, module.k_layernorm)
        if any(norm is not None and not isinstance(norm, IdentityOp) for norm in norms):
            raise ValueError(
                f"{name}: got --qk-clip with queries and keys that are normalized, expected one of the two: scaling "
                "weights does not change normalized logits; omit --qk-clip, or --qk-layernorm and --qk-l2-norm"
            )
        layers = {
            module.linear_qkv: grouped_rows(
                heads, config.num_query_groups // pieces, config.kv_channels, gated=config.attention_output_gate
            )
        }
    else:
        raise NotImplementedError(
            f"{name}: got {type(module).__name__}, expected SelfAttention or MLASelfAttention with --qk-clip; omit it"
        )
    out = {p: rows for layer, rows in layers.items() for p in _weight_and_bias(layer)}
    return out if all(parameter.requires_grad for parameter in out) else {}


def _weight_and_bias(layer: nn.Module) -> Iterator[nn.Parameter]:
    for parameter in (layer.weight, getattr(layer, "bias", None)):
        # Transformer Engine has an empty tensor where there is no bias.
        if isinstance(parameter, nn.Parameter) and parameter.numel():
            yield parameter


# So that Megatron's clip_qk, which is given the model alone, finds what has clipped it.
_CLIPS: WeakKeyDictionary[nn.Module, ref[QKClip]] = WeakKeyDictionary()


def is_clip_needed(ranks: Iterable[tuple[bool, bool, bool]]) -> bool:
    """Whether any rank has attention with logits that are read; then all ranks go through `QKClip`.

    Args:
        ranks: Of each rank, whether clipping is asked for, and `QKClip.clips` and `.records`: a pipeline stage may have
            no attention.

    Raises:
        ValueError: If clipping is asked for, and no rank has anything to clip.
    """
    asks, clips, records = zip(*ranks, strict=True)
    if any(asks) and not any(clips):
        raise ValueError(
            "--qk-clip: got a model without attention whose query and key weights are trained, expected some; omit it"
        )
    return any(records)


def clip_of(model: Sequence[nn.Module]) -> QKClip | None:
    """What clips a model, given as the chunks that its optimizer was built for."""
    found = _CLIPS.get(model[0])
    return None if found is None else found()
