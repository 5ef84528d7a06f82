"""verl's Megatron engine with attention masses in its output and AGTO in its loss (AVAR §3.2).

What `training/engine.py` is for FSDP, for `strategy: megatron`; settings come from the block `avar`
(`megatron/config.py`). Importing this module registers the engine; it needs megatron-core.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead, MegatronEngineWithValueHead

from verl_avar.attention.record import Record, probe
from verl_avar.objective import agto_terms
from verl_avar.reward import head_sums, layer_scores
from verl_avar.roles import ChatTokens, Role, query_mask
from verl_avar.training.config import AvarConfig
from verl_avar.training.figures import QUERIES, Figures
from verl_avar.training.measured_batch import MeasuredBatch
from verl_avar.training.megatron.config import check_parallelism
from verl_avar.training.megatron.layer_objective import LayerObjective, layer_objective
from verl_avar.training.megatron.layout import Layout, lay_out
from verl_avar.training.megatron.measuring import measure_model
from verl_avar.training.packing import pad_rows, within


@dataclass
class MicroBatch:
    """What a measuring pass knows of the micro-batch in the model."""

    roles: torch.Tensor  # uint8 [B, T]
    layout: Layout
    record: Record
    objective: LayerObjective | None  # in a training pass with an objective


@EngineRegistry.register(model_type="language_model", backend="megatron", device="cuda", vendor="avar")
class AvarMegatronEngine(MeasuredBatch, MegatronEngineWithLMHead):
    """Megatron engine for a language model with visual tokens: tensor, sequence and data parallel.

    Output and metrics are those of `AvarFSDPEngine`. Raises ValueError for context and pipeline parallelism.
    """

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        self.avar = AvarConfig.of(getattr(engine_config, "avar", None))
        check_parallelism(engine_config)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self.chat = ChatTokens.from_tokenizer(model_config.tokenizer, model_config.hf_config)
        self._open_probes = ExitStack()
        self._micro_batch: MicroBatch | None = None  # None in a pass that doesn't measure
        self._now = self.avar  # the settings of this step
        self._figures: Figures | None = None  # of the mini-batch, in a training pass that measures

    def _build_megatron_module(self):
        # Not through a layer spec: some of the bridges' multimodal providers choose theirs where nobody can reach it.
        module = super()._build_megatron_module()
        measured = [layer for chunk in module for layer in measure_model(unwrap_model(chunk))]
        if missing := sorted(set(self.avar.layer_list or ()) - set(measured)):
            raise ValueError(f"avar.layers: the model has no layers {missing}; it has {measured}")
        self._layers = self.avar.layer_list or measured
        return module

    def forward_backward_batch(self, data: TensorDict, loss_function, forward_only: bool = False) -> Any:
        """As verl's, with the roles of the batch found first and the objective's metrics added to the output."""
        self._now = self.avar if forward_only else self.avar.at(self.lr_scheduler.num_steps)
        if not self._now.measures(training=not forward_only):
            data.pop("roles", None)  # an earlier pass over the same batch may have measured
            return super().forward_backward_batch(data, loss_function, forward_only)
        if not forward_only and self._now.active and self.tf_config.calculate_per_token_loss:
            raise ValueError("the AVAR engine's objective wants calculate_per_token_loss=False")
        data["roles"] = self._roles(data)
        self._figures = None if forward_only else Figures(self._now, self._count_samples(data["roles"]))
        # Recomputation runs the layers again in the backward pass, which megatron's schedule calls after
        # `forward_step`: a probe stays open until the next micro-batch.
        with self._open_probes:
            output = super().forward_backward_batch(data, loss_function, forward_only)
        self._micro_batch = None
        if not forward_only:
            metrics = self._figures.metrics(ranks=self.get_data_parallel_group())
            output["metrics"].update({name: [value] for name, value in metrics.items()})
        return output

    def forward_step(self, batch_iter, model, logits_processor_func, postprocess_micro_batch_func):
        """As verl's, inside a probe."""
        self._open_probes.close()
        micro_batch = next(batch_iter)
        if micro_batch.get("roles", None) is not None:
            device = next(model.parameters()).device
            training = not postprocess_micro_batch_func.keywords["forward_only"]
            self._micro_batch = self._open_probe(micro_batch, micro_batch["roles"].to(device), training)
        return super().forward_step(iter([micro_batch]), model, logits_processor_func, postprocess_micro_batch_func)

    def postprocess_micro_batch_func(self, output, data: TensorDict, forward_only: bool, loss_function, **options):
        """verl's loss, with AGTO added in a training pass."""
        scaled_loss, result = super().postprocess_micro_batch_func(
            output, data, forward_only=forward_only, loss_function=loss_function, **options
        )
        if self._micro_batch is None or (agto := self._micro_batch.objective) is None:
            return scaled_loss, result
        sums = agto.sums()
        self._figures.add_terms(*sums)
        # As verl scales its losses: data-parallel ranks average gradients, the schedule divides by the micro-batches.
        value, ranks = agto.value(sums), self.get_data_parallel_size()
        result["loss"] += value.item() * ranks
        return agto.join(scaled_loss, value, scale=ranks * data["num_micro_batch"]), result

    def prepare_model_outputs(self, output: dict, data: TensorDict) -> dict:
        """verl's outputs and the per-token scores."""
        model_output = super().prepare_model_outputs(output, data)
        if (measured := self._micro_batch) is None:
            return model_output
        roles = measured.roles
        visual, system = (measured.layout.padded(measured.record.mass(role)) for role in (Role.VISUAL, Role.SYSTEM))
        group = mpu.get_tensor_model_parallel_group()
        sums = head_sums(visual.movedim(-2, 1), system.movedim(-2, 1), self.avar.eps)
        torch.distributed.all_reduce(sums, group=group)
        heads = visual.shape[2] * torch.distributed.get_world_size(group)
        scores = layer_scores(sums / heads, self.avar.eps)  # [5, B, T]
        if self._figures is not None:
            self._figures.add_scores(scores, roles)
        return model_output | self._token_outputs(scores, roles, data["input_ids"])

    def _open_probe(self, micro_batch: TensorDict, nested_roles: torch.Tensor, training: bool) -> MicroBatch:
        """Opens a probe for the queries this pass needs: the answers', or those of the objective and the figures."""
        config = self._now
        roles = pad_rows(nested_roles)
        queries = query_mask(roles, QUERIES if training else "response")
        rows = {
            "roles": nested_roles,
            "queries": torch.nested.nested_tensor_from_jagged(queries[within(nested_roles)], nested_roles.offsets()),
        }
        engine = self.engine_config
        seen, layout = lay_out(
            rows,
            packed=engine.use_remove_padding,
            forced_length=tu.get_non_tensor_data(micro_batch, "forced_max_seqlen", default=None),
            bucket=engine.pad_to_length_bucket if engine.pad_to_length and engine.use_remove_padding else None,
        )
        record = self._open_probes.enter_context(probe(seen["roles"], seen["queries"], self._layers))
        if not (config.active and training):
            return MicroBatch(roles, layout, record, None)

        def terms(visual, system):
            visual, system = layout.padded(visual), layout.padded(system)
            return agto_terms(
                visual, system, roles, queries=config.queries, eps=config.eps, system_floor=config.system_floor
            )

        objective = LayerObjective(
            record,
            terms,
            config.alpha,
            config.beta,
            self._figures.counts,
            len(self._layers),
            mpu.get_tensor_model_parallel_group(),
        )
        self._open_probes.enter_context(layer_objective(objective))
        return MicroBatch(roles, layout, record, objective)


@EngineRegistry.register(model_type="value_model", backend="megatron", device="cuda", vendor="avar")
class AvarMegatronCritic(MegatronEngineWithValueHead):
    """verl's critic unchanged."""
