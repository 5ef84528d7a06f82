"""Which attention backend a decoder's layer gets on CUDA; no GPU needed, and its kernels are not run."""

import sys
from types import ModuleType

import pytest
import torch

from verl_avar.rollout import kv_transfer_config

OURS = "verl_avar.rollout.backend_gpu.PagedRoleBackend"


@pytest.fixture
def platform(monkeypatch):
    """vLLM's CUDA platform, pretending an H100, with our choice in it."""
    from vllm.platforms.interface import DeviceCapability

    from verl_avar.compat import vllm_cuda_attention

    for compiled in ("vllm._C", "vllm._C_stable_libtorch"):
        monkeypatch.setitem(sys.modules, compiled, ModuleType(compiled))
    from vllm.platforms.cuda import CudaPlatform

    class Platform(CudaPlatform):
        capability = DeviceCapability(9, 0)

        @classmethod
        def get_device_capability(cls, device_id=0):
            return cls.capability

    vllm_cuda_attention.apply(Platform)
    vllm_cuda_attention.apply(Platform)  # vLLM may load plugins more than once
    return Platform


def _choose(platform, transfer, asked=None, **changes):
    from vllm.config import KVTransferConfig, VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    layer = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None} | changes
    config = VllmConfig(kv_transfer_config=KVTransferConfig(**transfer) if transfer else None)
    asked = AttentionBackendEnum[asked] if asked else None
    with set_current_vllm_config(config):
        return platform.get_attn_backend_cls(asked, AttentionSelectorConfig(**layer))


def test_an_engine_with_the_connector_gets_our_backend(platform):
    assert _choose(platform, kv_transfer_config()) == OURS
    assert _choose(platform, kv_transfer_config(), asked="CUSTOM") == OURS


def test_vllm_finds_the_class_at_the_path_and_a_name_for_it():
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = resolve_obj_by_qualname(OURS)
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM


def test_other_engines_get_what_they_would_have_got(platform):
    triton = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
    other = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    for transfer in (None, other):
        assert _choose(platform, transfer, asked="TRITON_ATTN") == triton


def test_without_a_current_config_the_choice_is_vllms(platform):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    layer = AttentionSelectorConfig(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None)
    path = platform.get_attn_backend_cls(AttentionBackendEnum.TRITON_ATTN, attn_selector_config=layer)
    assert path.endswith(".TritonAttentionBackend")


def test_vision_towers_choose_among_vllms_own(platform):
    from vllm.config import KVTransferConfig, VllmConfig, set_current_vllm_config

    def tower():
        return platform.get_vit_attn_backend(72, torch.float32)

    plain = tower()
    with set_current_vllm_config(VllmConfig(kv_transfer_config=KVTransferConfig(**kv_transfer_config()))):
        assert tower() is plain


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 576}, "head_size not supported"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"kv_cache_dtype": "float16"}, "KV cache of type float16 under a model of type torch.bfloat16"),
        ({"block_size": 8}, "block_size not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"use_mm_prefix": True}, "partial multimodal token full attention not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
    ],
)
def test_what_the_backend_lacks_is_named(platform, changes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        _choose(platform, kv_transfer_config(), **changes)


def test_an_older_gpu_is_refused_by_name(platform):
    from vllm.platforms.interface import DeviceCapability

    platform.capability = DeviceCapability(7, 5)
    with pytest.raises(NotImplementedError, match="compute capability not supported"):
        _choose(platform, kv_transfer_config())


def test_another_backend_asked_for_is_refused_by_name(platform):
    with pytest.raises(NotImplementedError, match="FLASH_ATTN gives no scores"):
        _choose(platform, kv_transfer_config(), asked="FLASH_ATTN")


def test_the_plugin_puts_the_choice_into_a_cuda_platform_alone(platform, monkeypatch):
    from verl_avar.compat import vllm_cuda_attention
    from verl_avar.rollout import plugin

    applied = []
    monkeypatch.setattr(vllm_cuda_attention, "apply", applied.append)
    plugin.register()
    assert applied == []
    monkeypatch.setattr("vllm.platforms._current_platform", platform())
    plugin.register()
    assert applied == [platform]
