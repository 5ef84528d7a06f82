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
from verl_avar.objective import agto_counts, agto_terms
from verl_avar.reward import token_scores
from verl_avar.roles import ChatTokens, Role, query_mask, token_roles
from verl_avar.training.config import AvarConfig
from verl_avar.training.packing import full_length_mask, pack, pad_rows, unpack, within


@dataclass
class MicroBatch:
    """What a measuring pass knows of the micro-batch in the model."""

    roles: torch.Tensor  # uint8 [B, T]
    lengths: list[int] | None  # of the samples, where the model sees them packed into one row
    record: Record
    visual: torch.Tensor | None = None  # masses [L, B, H, T], once the model has run
    system: torch.Tensor | None = None


# Per-token entries of `model_output`, in the order of `reward.SCORES`.
OUTPUTS = ("visual_ratio", "visual_share", "visual_mass", "system_mass", "visual_vas")


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu", "cuda", "npu"], vendor="avar"
)
class AvarFSDPEngine(FSDPEngineWithLMHead):
    """FSDP engine for a language model with visual tokens.

    `model_output` gains, in passes that measure, nested entries of one value per token, at the query that produces the
    next token, as `log_probs` is aligned: those of `OUTPUTS` (mean over layers and heads; 0 at other queries).
    Metrics of a training step gain `agto/*` and `attention/*`, exact over the mini-batch.
    """

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        self.avar = AvarConfig.of(getattr(engine_config, "avar", None))
        if engine_config.strategy == "fsdp" and get_device_id() == torch.device("cpu"):
            raise ValueError("strategy=fsdp needs an accelerator (torch's FSDP1 broadcasts on it); use strategy=fsdp2")
        if engine_config.ulysses_sequence_parallel_size > 1:
            raise ValueError("the AVAR engine measures whole sequences; set ulysses_sequence_parallel_size=1")
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self.chat = ChatTokens.from_tokenizer(model_config.tokenizer, model_config.hf_config)
        self._open_probes = ExitStack()
        self._micro_batch: MicroBatch | None = None  # None in a pass that doesn't measure
        self._sums: dict[str, torch.Tensor] = {}  # of the mini-batch so far, on this rank

    def _build_module(self) -> torch.nn.Module:
        # verl's packed attention for Qwen2-VL calls flash-attn by itself, past transformers' attention registry,
        # where masses are measured; transformers' own attention handles packed rows through their position ids.
        packed, self.use_remove_padding = self.use_remove_padding, False
        try:
            module = super()._build_module()
        finally:
            self.use_remove_padding = packed
        stock = module.config._attn_implementation
        set_attention(module, f"avar_{stock}", vision=stock)
        return module

    def forward_backward_batch(self, data: TensorDict, loss_function, forward_only: bool = False) -> Any:
        """As verl's, with the roles of the batch found first and the objective's metrics added to the output."""
        if not self.avar.measures(training=not forward_only):
            return super().forward_backward_batch(data, loss_function, forward_only)
        data["roles"] = self._roles(data)
        self._totals, self._sums = (None if forward_only else self._count_samples(data["roles"])), {}
        # Gradient checkpointing runs the attention functions again in the backward pass, which verl calls after
        # `forward_step`: a probe stays open until the next micro-batch.
        with self._open_probes:
            output = super().forward_backward_batch(data, loss_function, forward_only)
        self._micro_batch = None
        if not forward_only:
            output["metrics"].update(self._metrics())
        return output

    def forward_step(self, micro_batch: TensorDict, loss_function, forward_only: bool):
        """As verl's, inside a probe, with AGTO added to the loss of a training pass."""
        self._open_probes.close()
        if micro_batch.get("roles", None) is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        self._micro_batch = self._open_probe(micro_batch, forward_only)
        loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if forward_only:
            return loss, output
        agto = self._objective(self._micro_batch)
        output["loss"] += agto.item()
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
        answers = query_mask(roles, "response")
        with torch.no_grad():
            scores = token_scores(measured.visual, measured.system, eps=self.avar.eps) * answers  # [5, B, T]
        ids = micro_batch["input_ids"]
        for name, score in zip(OUTPUTS, scores, strict=True):
            model_output[name] = torch.nested.nested_tensor_from_jagged(score[within(ids)], ids.offsets())
        has_system = (roles == Role.SYSTEM).any(dim=-1, keepdim=True)  # without one the ratio measures eps
        self._add("vas_response", scores[0], answers & has_system)
        self._add("visual_mass", scores[2], answers)
        self._add("system_mass", scores[3], answers)
        return model_output

    def _roles(self, data: TensorDict) -> torch.Tensor:
        """Roles of a batch, nested uint8 like its `input_ids`."""
        ids = data["input_ids"]
        written = full_length_mask(data["loss_mask"], ids.offsets().diff().tolist())
        padded, mask, written = pad_rows(ids), within(ids), pad_rows(written)
        # verl fills a batch with rows of end markers, without a turn to read (trainer/ppo/padding_utils.py)
        real = written.any(dim=-1) | (mask & (padded != padded[:, :1])).any(dim=-1)
        roles = torch.zeros_like(padded, dtype=torch.uint8)
        roles[real] = token_roles(padded[real], self.chat, attention_mask=mask[real], response_mask=written[real])
        return torch.nested.nested_tensor_from_jagged(roles[within(ids)], ids.offsets())

    def _open_probe(self, micro_batch: TensorDict, forward_only: bool) -> MicroBatch:
        """Opens a probe for the queries this pass needs: the answers', and those of the objective."""
        roles = pad_rows(micro_batch["roles"])
        queries = query_mask(roles, "response")
        if self.avar.active and not forward_only:
            queries = queries | query_mask(roles, self.avar.queries)
        seen, lengths = roles, None
        if tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True):
            lengths = micro_batch["input_ids"].offsets().diff().tolist()
            extra = self._get_packed_pad_size(sum(lengths))
            seen, queries = pack(roles, lengths, extra), pack(queries, lengths, extra)
        record = self._open_probes.enter_context(probe(seen, queries, self.avar.layer_list))
        return MicroBatch(roles, lengths, record)

    def _objective(self, measured: MicroBatch) -> torch.Tensor:
        """This micro-batch's part of AGTO, scaled as verl scales its losses: FSDP averages gradients over ranks."""
        config = self.avar
        terms = agto_terms(
            measured.visual,
            measured.system,
            measured.roles,
            queries=config.queries,
            eps=config.eps,
            system_floor=config.system_floor,
        )
        for name, value in (("enhance", terms.enhance_sum), ("suppress", terms.suppress_sum)):
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        return terms.loss(config.alpha, config.beta, *self._totals) * self.get_data_parallel_size()

    def _count_samples(self, roles: torch.Tensor) -> tuple[int, int]:
        """Samples of the mini-batch, over all ranks, that have the enhance and the suppress term."""
        counts = torch.tensor(agto_counts(pad_rows(roles), self.avar.queries), device=get_device_id())
        torch.distributed.all_reduce(counts, group=self.get_data_parallel_group())
        return tuple(counts.tolist())

    def _add(self, name: str, values: torch.Tensor, where: torch.Tensor) -> None:
        """Adds to the sum and the count behind the mean of `name` over queries."""
        for part, value in ((name, (values * where).sum()), (f"{name}/count", where.sum())):
            self._sums[part] = self._sums.get(part, 0.0) + value

    def _metrics(self) -> dict[str, list[float]]:
        """Figures of the mini-batch over all ranks, in the form of verl's metrics (a list per name)."""
        sums = torch.stack([value.double() for value in self._sums.values()])
        torch.distributed.all_reduce(sums, group=self.get_data_parallel_group())
        total = dict(zip(self._sums, sums.tolist(), strict=True))
        metrics = {
            f"agto/{name}": total[name] / max(1, count)
            for name, count in zip(("enhance", "suppress"), self._totals, strict=True)
        }
        metrics["agto/loss"] = self.avar.alpha * metrics["agto/enhance"] + self.avar.beta * metrics["agto/suppress"]
        for name in ("vas_response", "visual_mass", "system_mass"):
            metrics[f"attention/{name}"] = total[name] / max(1.0, total[f"{name}/count"])
        return {name: [value] for name, value in metrics.items()}


@EngineRegistry.register(
    model_type="value_model", backend=["fsdp", "fsdp2"], device=["cpu", "cuda", "npu"], vendor="avar"
)
class AvarFSDPCritic(FSDPEngineWithValueHead):
    """verl's critic unchanged; verl registers none for a CPU."""
