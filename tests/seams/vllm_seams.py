"""The contract: what verl_avar relies on in vLLM beyond the names that it imports, calls and overrides.

Those are read off the code (`derived`); here is what the code only assumes. All of it holds for the versions of
`verl_avar.rollout.plugin.TESTED`, or for those that have the definition named by `only_with`.
"""

from seams.stated import Seam

CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
NEW_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
BACKEND = "vllm.v1.attention.backend:AttentionBackend"
CPU = "vllm.v1.attention.backends.cpu_attn"
OPENAI = "vllm.entrypoints.openai"
LAYOUTS = f"{BACKEND}.supported_kv_cache_layouts"

# Imported names that versions without the definition after the colon don't have, and our code doesn't reach there.
ONLY_WITH = {"vllm.v1.kv_cache_interface:KVCacheLayout": LAYOUTS}

# rollout/connector.py, in the scheduler
SCHEDULING = [
    # Asked once per new request, and no prefix is looked up before: the cache salt that we set counts.
    Seam(f"{SCHEDULER}.add_request", sequence=("on_new_request",), mentions=("requests",)),
    Seam("vllm.v1.request:Request.__init__", mentions=("update_block_hashes",)),
    Seam("vllm.v1.request:Request.update_block_hashes", mentions=("_block_hasher", "block_hashes")),
    Seam("vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys", mentions=("cache_salt",)),
    Seam(
        "vllm.v1.request:Request",
        has=(
            *("request_id", "sampling_params", "prompt_token_ids", "num_prompt_tokens", "num_output_tokens"),
            *("mm_features", "cache_salt", "block_hashes", "resumable"),
        ),
    ),
    Seam("vllm.sampling_params:SamplingParams", has=("extra_args", "stop", "n", "output_kind")),
    Seam("vllm.multimodal.inputs:MultiModalFeatureSpec", has=("modality", "mm_position")),
    Seam("vllm.multimodal.inputs:PlaceholderRange.extract_embeds_range", returns="list[tuple[int, int]]"),
    # The blocks of a step are known when our metadata is built.
    Seam(
        f"{SCHEDULER}.schedule",
        sequence=("_make_cached_request_data", "_build_kv_connector_meta", "_update_after_schedule"),
    ),
    Seam(f"{SCHEDULER}._build_kv_connector_meta", sequence=("build_connector_meta",)),
    Seam("vllm.v1.core.sched.output:SchedulerOutput", has=("scheduled_new_reqs", "scheduled_cached_reqs")),
    Seam("vllm.v1.core.sched.output:NewRequestData", has=("req_id", "block_ids")),
    Seam("vllm.v1.core.sched.output:NewRequestData.from_request", leading=("request", "block_ids")),
    Seam("vllm.v1.core.sched.output:CachedRequestData", has=("req_ids", "new_block_ids", "resumed_req_ids")),
    Seam(f"{SCHEDULER}._make_cached_request_data", mentions=("resumed_req_ids", "get_block_ids", "allow_none")),
    # A request's blocks are its own until we have read their scores.
    Seam(f"{SCHEDULER}._free_request", sequence=("_connector_finished", "_free_blocks")),
    Seam(f"{SCHEDULER}._connector_finished", returns="tuple[bool, dict[str, Any] | None]"),
    Seam(f"{SCHEDULER}._connector_finished", sequence=("request_finished", "request_finished_all_groups")),
    Seam(f"{CONNECTOR}.request_finished", returns="tuple[bool, dict[str, Any] | None]"),
    Seam(f"{CONNECTOR}.get_num_new_matched_tokens", returns="tuple[int | None, bool]"),
    Seam(f"{SCHEDULER}.shutdown", sequence=("connector.shutdown",)),
    # The result's way to the caller.
    Seam(f"{SCHEDULER}.update_from_output", mentions=("_free_request", "kv_transfer_params")),
    Seam("vllm.v1.engine:EngineCoreOutput", has=("kv_transfer_params",)),
    Seam("vllm.v1.engine.output_processor:OutputProcessor.process_outputs", mentions=("kv_transfer_params",)),
    Seam("vllm.outputs:RequestOutput.__init__", takes=("kv_transfer_params",)),
]

# rollout/connector.py, in the worker: marks are bound before the forward pass of their step
WORKING = [
    Seam(
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.create_connector",
        passes=("connector_cls", "config", "role", "kv_cache_config"),
    ),
    Seam(
        "vllm.v1.worker.kv_connector_model_runner_mixin:KVConnectorModelRunnerMixin._get_kv_connector_output",
        sequence=("bind_connector_metadata", "yield", "clear_connector_metadata"),
    ),
    Seam(f"{RUNNER}.execute_model", sequence=("maybe_get_kv_connector_output", "_model_forward")),
    Seam(f"{RUNNER}.initialize_kv_cache", sequence=("initialize_kv_cache_tensors", "register_kv_caches")),
    Seam(
        "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.pre_forward",
        sequence=("handle_preemptions", "bind_connector_metadata"),
    ),
    Seam(
        f"{NEW_RUNNER}.execute_model",
        sequence=("pre_forward", "run_fullgraph", "pre_forward", "run_pw_graph", "self.model"),
    ),
    Seam("vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.__init__", sequence=("register_kv_caches",)),
    Seam("vllm.config:VllmConfig", has=("kv_transfer_config", "cache_config", "model_config", "parallel_config")),
    Seam("vllm.config:VllmConfig", has=("compilation_config", "scheduler_config", "speculative_config")),
    Seam("vllm.config:CompilationConfig", has=("static_forward_context",)),
    Seam("vllm.config:CacheConfig", has=("block_size",)),
    Seam("vllm.config:SchedulerConfig", has=("max_num_batched_tokens", "max_num_seqs")),
    Seam("vllm.config:ModelConfig", has=("hf_config", "dtype", "tokenizer", "tokenizer_revision", "trust_remote_code")),
    Seam(
        "vllm.config:ParallelConfig",
        has=(
            *("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size", "use_ubatching"),
            *("prefill_context_parallel_size", "worker_extension_cls"),
        ),
    ),
    Seam(
        "vllm.config:KVTransferConfig",
        has=("kv_connector", "kv_connector_module_path", "kv_role", "kv_connector_extra_config", "engine_id"),
    ),
    Seam("vllm.distributed.parallel_state:GroupCoordinator", has=("all_reduce", "rank_in_group", "world_size")),
    Seam("vllm.distributed.parallel_state:GroupCoordinator.all_reduce", leading=("input_",), returns="torch.Tensor"),
]

# rollout/backend_cpu.py, backend_gpu.py, backend_choice.py and compat/vllm_{cuda_attention,wide_kv_cache}.py
ATTENTION = [
    Seam(
        "vllm.model_executor.layers.attention.attention:Attention.__init__",
        passes=(
            *("impl_cls", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window"),
            *("kv_cache_dtype", "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name"),
        ),
        mentions=("get_impl_cls", "static_forward_context"),
    ),
    Seam("vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec", leading=("vllm_config",)),
    Seam("vllm.model_executor.layers.attention.attention:Attention", has=("impl", "get_kv_cache_spec")),
    Seam(
        "vllm.model_executor.layers.attention.attention:unified_attention_with_output",
        passes=("forward", "self", "query", "key", "value", "kv_cache", "attn_metadata"),
        mentions=("output",),
    ),
    Seam("vllm.v1.kv_cache_interface:FullAttentionSpec", has=("head_size", "head_size_v", "block_size")),
    Seam(f"{CPU}:CPUAttentionMetadata", has=("slot_mapping", "num_actual_tokens")),
    Seam(f"{CPU}:CPUAttentionBackendImpl", has=("num_heads", "num_kv_heads", "head_size", "scale", "kv_cache_dtype")),
    Seam(f"{CPU}:CPUAttentionMetadataBuilder.__init__", mentions=("head_size", "num_kv_heads")),
    Seam(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        has=(
            *("query_start_loc", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len", "block_table_tensor"),
            *("slot_mapping", "causal"),
        ),
    ),
    Seam("vllm.v1.attention.backend:AttentionMetadataBuilder", has=("_cudagraph_support",)),
    # What a version doesn't ask by name it asks for otherwise: shape and order, or the layouts that are read.
    Seam("vllm.v1.kv_cache_layout:KVCacheLayout", has=("LBNHC", "BLNHC", "LBHNC"), only_with=LAYOUTS),
    Seam(
        "vllm.v1.attention.backends.registry:AttentionBackendEnum",
        has=(
            "CPU_ATTN",
            "CUSTOM",
            "FLASH_ATTN",
            "FLASHINFER",
            "TRITON_ATTN",
            "FLEX_ATTENTION",
            "get_class",
            "get_path",
        ),
    ),
    Seam("vllm.v1.attention.backends.registry:register_backend", leading=("backend", "class_path")),
    # The backend is chosen while the engine's config is current, and remembered by its config, connector or not.
    Seam("vllm.v1.attention.selector:get_attn_backend", mentions=("get_current_vllm_config", "use_kv_connector")),
    Seam("vllm.v1.attention.selector:AttentionSelectorConfig", has=("use_kv_connector", "head_size", "kv_cache_dtype")),
    Seam(
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        mentions=("get_attn_backend_cls", "attn_selector_config", "num_heads", "resolve_obj_by_qualname"),
    ),
    *(
        Seam(
            f"vllm.platforms.{platform}.get_attn_backend_cls",
            leading=("selected_backend", "attn_selector_config", "num_heads"),
        )
        for platform in ("cuda:CudaPlatformBase", "cpu:CpuPlatform")
    ),
    Seam("vllm.platforms.cuda:CudaPlatformBase.get_device_capability"),
    Seam("vllm.platforms.interface:DeviceCapability", has=("major", "minor")),
    Seam("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", leading=("layer", "remove_weight")),
]

# compat/vllm_{request_check,scores_per_choice,scores_over_http}.py, rollout/serve.py, evaluation/sweep_*.py
FRONT = [
    Seam("vllm.plugins:load_general_plugins", sequence=("load_plugins_by_group", "func")),
    Seam("vllm.engine.arg_utils:EngineArgs.__post_init__", mentions=("load_general_plugins",)),
    Seam("vllm.config:VllmConfig.__post_init__", mentions=("supports_hma_config",)),
    Seam("vllm.v1.engine.input_processor:InputProcessor", has=("vllm_config", "process_inputs")),
    Seam("vllm.v1.engine.input_processor:InputProcessor.process_inputs", returns="EngineCoreRequest"),
    Seam("vllm.v1.engine:EngineCoreRequest", has=("sampling_params", "prompt_token_ids", "mm_features", "resumable")),
    Seam(
        "vllm.v1.engine.output_processor:RequestState",
        has=("detokenizer", "parent_req", "request_index", "from_new_request", "make_request_output"),
    ),
    Seam("vllm.v1.engine.output_processor:RequestState.from_new_request", leading=("tokenizer", "request")),
    Seam(
        "vllm.v1.engine.output_processor:RequestState.make_request_output",
        leading=("new_token_ids", "pooling_output", "finish_reason", "stop_reason", "kv_transfer_params"),
    ),
    Seam("vllm.v1.engine.parallel_sampling:ParentRequest", has=("n",)),
    *(
        Seam(f"{OPENAI}.{module}", has=("vllm_xargs", "kv_transfer_params", "to_sampling_params"))
        for module in (
            "chat_completion.protocol:ChatCompletionRequest",
            "completion.protocol:CompletionRequest",
            "responses.protocol:ResponsesRequest",
        )
    ),
    Seam(f"{OPENAI}.chat_completion.protocol:ChatCompletionResponse", has=("kv_transfer_params",)),
    Seam(f"{OPENAI}.completion.protocol:CompletionResponse", has=("kv_transfer_params",)),
    Seam(
        f"{OPENAI}.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator",
        leading=("request", "result_generator"),
    ),
    Seam(
        f"{OPENAI}.completion.serving:OpenAIServingCompletion.completion_stream_generator",
        leading=("request", "engine_inputs", "result_generator"),
    ),
    Seam(
        f"{OPENAI}.completion.serving:OpenAIServingCompletion.request_output_to_completion_response",
        leading=("final_res_batch", "request"),
    ),
    Seam(
        f"{OPENAI}.chat_completion.batch_serving:OpenAIServingChatBatch.chat_completion_full_generator_batch",
        leading=("request", "generators"),
    ),
    Seam(f"{OPENAI}.chat_completion.serving:OpenAIServingChat", has=("beam_search", "engine_client")),
    Seam(f"{OPENAI}.completion.serving:OpenAIServingCompletion", has=("beam_search", "engine_client")),
    Seam("vllm.entrypoints.cli.serve:ServeSubcommand.validate", leading=("args",)),
    Seam("vllm.entrypoints.cli.serve:cmd_init"),
    Seam("vllm.entrypoints.cli.main:main"),
]

SEAMS = [*SCHEDULING, *WORKING, *ATTENTION, *FRONT]
