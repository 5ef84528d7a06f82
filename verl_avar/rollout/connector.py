"""The KV connector: vLLM's public hook on both sides of the engine (KVConnectorBase_V1). It moves no KV cache.

Scheduler side: roles and options of each request, the blocks that it gets, its scores when it ends.
Worker side: writes roles and biases of fresh blocks into `SlotState` before the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.platforms import current_platform

from verl_avar.reward import summarise
from verl_avar.roles import Role
from verl_avar.rollout.layer import LinkedAttention, link_layers
from verl_avar.rollout.options import RequestOptions
from verl_avar.rollout.pinned import release, view_from
from verl_avar.rollout.plugin import version_error
from verl_avar.rollout.probed_layers import probed_layers
from verl_avar.rollout.request import chat_tokens, prompt_roles, roles_salt, unscored
from verl_avar.rollout.scores import SharedScores
from verl_avar.rollout.slots import BlockMarks, SlotState

UNSCORED_SALT = "avar:unscored"


@dataclass
class StepMarks(KVConnectorMetadata):
    """Scheduler to worker: the blocks given out in this step."""

    marks: BlockMarks


@dataclass
class Tracked:
    """One live request. roles: uint8 [P]. blocks: how many it holds. no_score: why it can't be scored, if so."""

    roles: np.ndarray
    options: RequestOptions
    blocks: int = 0
    no_score: str | None = None


def _check_engine(config: Any) -> None:
    """Raises RuntimeError or NotImplementedError, by name, for what this connector can't serve."""
    if error := version_error(vllm.__version__):
        raise RuntimeError(error)
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise NotImplementedError(
            f"verl_avar.rollout: the visual-attention backends run on NVIDIA GPUs and CPUs, not on "
            f"{current_platform.device_name}; remove its kv_transfer_config to run without scores and biases"
        )
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise NotImplementedError(f"verl_avar.rollout: {name} > 1 is not supported")
    if parallel.use_ubatching:
        raise NotImplementedError("verl_avar.rollout: dual-batch overlap (enable_dbo, ubatch_size) is not supported")
    if config.speculative_config is not None:
        raise NotImplementedError("verl_avar.rollout: speculative decoding is not supported")


class VisualAttentionConnector(KVConnectorBase_V1):
    """Name it in `kv_transfer_config` (see `verl_avar.rollout.kv_transfer_config`)."""

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config=None):
        _check_engine(vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        self._engine_id = vllm_config.kv_transfer_config.engine_id
        self._shared: SharedScores | None = None
        self._state: SlotState | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._defaults = RequestOptions.from_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
            self._chat = chat_tokens(vllm_config.model_config)
            self._requests: dict[str, Tracked] = {}
            self._shared = SharedScores.open(self._engine_id)

    @property
    def requires_kv_delivery(self) -> bool:
        # Scores lie in the slots of a request's blocks: one that is preempted has to be computed again, not to end with
        # a token whose blocks are gone.
        return True

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        from vllm.distributed import get_tp_group
        from vllm.model_executor.models.utils import extract_layer_index

        config = self._vllm_config
        layers = config.compilation_config.static_forward_context
        names = sorted(kv_caches, key=extract_layer_index)
        impls = [layers[name].impl for name in names]
        if stock := {type(impl).__name__ for impl in impls if not isinstance(impl, LinkedAttention)}:
            raise RuntimeError(
                f"verl_avar.rollout: the connector is on but layers run {', '.join(stock)}: the vLLM plugin is not "
                "active in this process (is verl_avar installed here, and allowed by VLLM_PLUGINS?), or the connector "
                "is part of another one (MultiConnector), which is not supported"
            )
        cache, first = kv_caches[names[0]], impls[0]
        blocks = cache.shape[0]
        if (rows := cache.numel() // (blocks * first.num_kv_heads * 2 * first.head_size)) != self._block_size:
            raise NotImplementedError(
                f"verl_avar.rollout: KV-cache blocks of {rows} tokens under a block size of {self._block_size}"
            )
        ranks, group = config.parallel_config.tensor_parallel_size, get_tp_group()
        if group.rank_in_group == 0:
            self._shared = SharedScores.create(self._engine_id, blocks * self._block_size + 1)
        probed = probed_layers(config.kv_transfer_config.kv_connector_extra_config, len(impls))
        self._state = SlotState(
            blocks,
            self._block_size,
            len(probed),
            config.scheduler_config.max_num_batched_tokens,
            first.num_heads,
            view_from(cache.device, self._shared.array) if self._shared else None,
            total_heads=first.num_heads * ranks,
            all_reduce=group.all_reduce if ranks > 1 else None,
            device=cache.device,
        )
        link_layers(impls, self._state, probed)

    def bind_connector_metadata(self, connector_metadata: StepMarks) -> None:
        # Not in start_load_kv: vLLM 0.33's newer model runner calls that one after the forward pass.
        super().bind_connector_metadata(connector_metadata)
        self._state.begin(connector_metadata.marks)

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    # Scheduler side

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        pass

    def on_new_request(self, request) -> None:
        roles = np.zeros(request.num_prompt_tokens, dtype=np.uint8)
        options, no_score = RequestOptions(), None
        try:
            if request.sampling_params is None:
                raise ValueError("a pooling request has no response")
            wanted = RequestOptions.from_mapping(request.sampling_params.extra_args or {}, self._defaults)
            roles = prompt_roles(request.prompt_token_ids, request.mm_features, self._chat)
            options = wanted
        except ValueError as error:
            # The front end has refused what would be a bad request; here an exception would end the engine.
            no_score = str(error)
        self._requests[request.request_id] = Tracked(roles, options, no_score=no_score)
        # Blocks are shared by requests that agree on their bias, and on the roles that they write into them.
        salt = UNSCORED_SALT
        if no_score is None:
            salt = options.cache_salt + roles_salt(request.prompt_token_ids, roles, self._chat)
        if salt or request.cache_salt:
            # As a pair: a client's own salt must not be able to read like one of ours.
            request.cache_salt = repr((salt, request.cache_salt))
            request.block_hashes.clear()
            request.update_block_hashes()

    def build_connector_meta(self, scheduler_output) -> StepMarks:
        marks = BlockMarks()
        for fresh in scheduler_output.scheduled_new_reqs:
            self._give(marks, fresh.req_id, fresh.block_ids, restart=True)
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if block_ids is not None:
                self._give(marks, request_id, block_ids, restart=request_id in cached.resumed_req_ids)
        return StepMarks(marks)

    def _give(self, marks: BlockMarks, request_id: str, block_ids: tuple[list[int], ...], restart: bool) -> None:
        tracked = self._requests[request_id]
        if restart:  # after a preemption the blocks are new from the first on
            tracked.blocks = 0
        (blocks,) = block_ids
        if blocks:
            marks.add(blocks, tracked.blocks, tracked.roles, tracked.options, self._block_size)
            tracked.blocks += len(blocks)

    def request_finished(self, request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        tracked = self._requests.pop(request.request_id)
        no_score = tracked.no_score
        # The last token was never a query: the n response tokens come from queries P-1 … P+n-2.
        n = request.num_output_tokens
        position = request.num_prompt_tokens - 1 + np.arange(n)
        if len(block_ids) * self._block_size < request.num_prompt_tokens - 1 + n:
            no_score = "ended while it had no place in the KV cache"
        if no_score is not None:
            return False, {"visual_attention": unscored(n, no_score)}
        blocks = np.asarray(block_ids, dtype=np.int64)[position // self._block_size]
        scores = self._shared.array[blocks * self._block_size + position % self._block_size]
        has_system = bool((tracked.roles == Role.SYSTEM).any())
        score = summarise(
            torch.from_numpy(scores.T),
            has_system,
            tokens=tracked.options.attention_scores == "tokens",
        ).as_dict()
        if not has_system:
            score["reason"] = "the prompt has no system turn"
        return False, {"visual_attention": score}

    def shutdown(self) -> None:
        if self._state is not None and self._state.scores is not None:
            release(self._state.scores, self._shared.array)
        if self._shared is not None:
            self._shared.close()
