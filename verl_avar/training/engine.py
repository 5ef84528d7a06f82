"""verl's FSDP engine with attention masses in its output and AGTO in its loss (AVAR §3.2).

`VERL_ENGINE_VENDOR=avar` selects it; settings come from the config block `avar` (`training/config.py`). Roles are
found once per batch, masses come from `attention.hf.probe` around the model's forward pass, and the objective is added
to whatever loss verl passes, normalised over the whole mini-batch of all ranks, so that neither micro-batching nor
the number of ranks changes it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

from verl_avar.attention.hf import Record, probe, set_attention
from verl_avar.objective import agto_terms
from verl_avar.reward import head_sums, layer_scores
from verl_avar.roles import ChatTokens, Role, query_mask
from verl_avar.training.config import AvarConfig
from verl_avar.training.figures import QUERIES, Figures
from verl_avar.training.measured_batch import MeasuredBatch
from verl_avar.training.packing import pack, pad_rows, unpack
from verl_avar.training.ulysses import set_ulysses_attention, whole_row


@dataclass
class MicroBatch:
    """What a measuring pass knows of the micro-batch in the model."""

    roles: torch.Tensor  # uint8 [B, T]
    lengths: list[int] | None  # of the samples, where the model sees them packed into one row
    record: Record
    visual: torch.Tensor | None = None  # masses [L, B, H, T], once the model has run
    system: torch.Tensor | None = None


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu", "cuda", "npu"], vendor="avar"
)
class AvarFSDPEngine(MeasuredBatch, FSDPEngineWithLMHead):
    """FSDP engine for a language model with visual tokens.

    `model_output` gains, in passes that measure, nested entries of one value per token, at the query that produces the
    next token, as `log_probs` is aligned: those of `OUTPUTS` (mean over layers and heads; 0 at other queries).
    Metrics of a training step gain `agto/*` and `attention/*`, exact over the mini-batch of all ranks (`figures.py`).
    """

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        self.avar = AvarConfig.of(getattr(engine_config, "avar", None))
        if engine_config.strategy == "fsdp" and get_device_id() == torch.device("cpu"):
            raise ValueError("strategy=fsdp needs an accelerator (torch's FSDP1 broadcasts on it); use strategy=fsdp2")
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self.chat = ChatTokens.from_tokenizer(model_config.tokenizer, model_config.hf_config)
        self._open = ExitStack()  # the probe of the micro-batch in the model, and its row under Ulysses
        self._micro_batch: MicroBatch | None = None  # None in a pass that doesn't measure
        self._now = self.avar  # the settings of this step
        self._figures: Figures | None = None  # of the mini-batch, in a training pass that measures

    def _build_module(self) -> torch.nn.Module:
        # verl's packed attention for Qwen2-VL calls flash-attn by itself, past transformers' attention registry,
        # where masses are measured; transformers' own attention handles packed rows through their position ids.
        # The same patch exchanges heads for sequence under Ulysses; `ulysses.py` does so around that registry.
        packed, self.use_remove_padding = self.use_remove_padding, False
        size, self.ulysses_sequence_parallel_size = self.ulysses_sequence_parallel_size, 1
        try:
            module = super()._build_module()
        finally:
            self.use_remove_padding, self.ulysses_sequence_parallel_size = packed, size
        stock = module.config._attn_implementation
        if self.use_ulysses_sp:
            set_ulysses_attention(module, stock, size)
        else:
            set_attention(module, f"avar_{stock}", vision=stock)
        return module

    def forward_backward_batch(self, data: TensorDict, loss_function, forward_only: bool = False) -> Any:
        """As verl's, with the roles of the batch found first and the objective's metrics added to the output."""
        # verl saves its learning-rate schedule with every checkpoint: ours resumes with it.
        self._now = self.avar if forward_only else self.avar.at(self.lr_scheduler.last_epoch)
        if not self._now.measures(training=not forward_only):
            data.pop("roles", None)  # an earlier pass over the same batch may have measured
            return self._pass(data, loss_function, forward_only)
        data["roles"] = self._roles(data)
        self._figures = None if forward_only else Figures(self._now, self._count_samples(data["roles"]))
        output = self._pass(data, loss_function, forward_only)
        self._micro_batch = None
        if not forward_only:
            # Ranks of one Ulysses group hold the same samples and share their heads.
            metrics = self._figures.metrics(copies=self.ulysses_sequence_parallel_size)
            output["metrics"].update({name: [value] for name, value in metrics.items()})
        return output

    def _pass(self, *args) -> Any:
        # Gradient checkpointing runs the attention functions again in the backward pass, which verl calls after
        # `forward_step`: what they need stays open until the next micro-batch.
        with self._open:
            return super().forward_backward_batch(*args)

    def forward_step(self, micro_batch: TensorDict, loss_function, forward_only: bool):
        """As verl's, inside a probe, with AGTO added to the loss of a training pass."""
        self._open.close()
        self._micro_batch = None
        micro_batch = micro_batch.to(get_device_id())
        lengths = self._packed_lengths(micro_batch)
        if self.use_ulysses_sp:
            self._open.enter_context(whole_row(self.ulysses_parallel_group, lengths, get_device_id()))
        if micro_batch.get("roles", None) is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        self._micro_batch = self._open_probe(micro_batch, lengths, forward_only)
        loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if forward_only:
            return loss, output
        agto = self._objective(self._micro_batch)
        output["loss"] += self._over_heads(agto.detach().clone()).item()
        return loss + agto, output

    def prepare_model_outputs(self, output, output_args, micro_batch: TensorDict, logits_processor_func):
        """verl's outputs and the per-token scores."""
        model_output = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if (measured := self._micro_batch) is None:
            return model_output
        roles, lengths = measured.roles, measured.lengths
        measured.visual, measured.system = (
            measured.record.mass(role) if lengths is None else unpack(measured.record.mass(role), lengths)
            for role in (Role.VISUAL, Role.SYSTEM)
        )
        with torch.no_grad():
            visual, system = (mass.transpose(1, 2) for mass in (measured.visual, measured.system))  # [L, H, B, T]
            means = self._over_heads(head_sums(visual, system, self.avar.eps) / visual.shape[1])
            scores = layer_scores(means, self.avar.eps)  # [5, B, T]
        if self._figures is not None:
            self._figures.add_scores(scores, roles)
        return model_output | self._token_outputs(scores, roles, micro_batch["input_ids"])

    def _over_heads(self, mean: torch.Tensor) -> torch.Tensor:
        """A mean over this rank's heads, in place to one over all heads; without gradients."""
        if self.use_ulysses_sp:
            torch.distributed.all_reduce(mean, group=self.ulysses_parallel_group)
            mean /= self.ulysses_sequence_parallel_size
        return mean

    def _packed_lengths(self, micro_batch: TensorDict) -> list[int] | None:
        """Lengths of the samples and of verl's paddings after them, where the model sees them as one row."""
        if not tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True):
            return None
        lengths = micro_batch["input_ids"].offsets().diff().tolist()
        lengths.append(self._get_packed_pad_size(sum(lengths)))
        lengths.append(-sum(lengths) % self.ulysses_sequence_parallel_size)
        return [length for length in lengths if length]

    def _open_probe(self, micro_batch: TensorDict, lengths: list[int] | None, forward_only: bool) -> MicroBatch:
        """Opens a probe for the queries this pass needs: the answers', or those of the objective and the figures."""
        roles = pad_rows(micro_batch["roles"])
        queries = query_mask(roles, "response" if forward_only else QUERIES)
        seen, samples = roles, None
        if lengths is not None:
            samples = micro_batch["input_ids"].offsets().diff().tolist()
            extra = sum(lengths) - sum(samples)
            seen, queries = pack(roles, samples, extra), pack(queries, samples, extra)
        record = self._open.enter_context(probe(seen, queries, self.avar.layer_list))
        return MicroBatch(roles, samples, record)

    def _objective(self, measured: MicroBatch) -> torch.Tensor:
        """This micro-batch's part of AGTO, scaled as verl scales its losses: FSDP averages gradients over ranks.

        Under Ulysses it is the mean over this rank's heads: averaged over the ranks, gradients are those of all heads.
        """
        config = self._now
        terms = agto_terms(
            measured.visual,
            measured.system,
            measured.roles,
            queries=config.queries,
            eps=config.eps,
            system_floor=config.system_floor,
        )
        self._figures.add_terms(terms.enhance_sum, terms.suppress_sum)
        return terms.loss(config.alpha, config.beta, *self._figures.counts) * self.get_data_parallel_size()


@EngineRegistry.register(
    model_type="value_model", backend=["fsdp", "fsdp2"], device=["cpu", "cuda", "npu"], vendor="avar"
)
class AvarFSDPCritic(FSDPEngineWithValueHead):
    """verl's critic unchanged; verl registers none for a CPU."""
