"""What our plugin changes in vLLM, and what it leaves alone; no engine needed."""

import pytest
import torch

from verl_avar.rollout import kv_transfer_config, plugin


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()
    plugin.register()  # vLLM may load plugins more than once


def _config(**parts):
    from vllm.config import VllmConfig

    return VllmConfig(**parts)


def _backend(config):
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    with set_current_vllm_config(config):
        return AttentionBackendEnum.CPU_ATTN.get_class()


def test_an_engine_without_the_connector_gets_vllms_own_backend():
    from vllm.config import KVTransferConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    other = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    assert _backend(_config()) is CPUAttentionBackend
    assert _backend(_config(kv_transfer_config=other)) is CPUAttentionBackend


def test_an_engine_with_the_connector_gets_ours():
    from vllm.config import KVTransferConfig

    from verl_avar.rollout.backend_cpu import RoleAttentionBackend

    config = _config(kv_transfer_config=KVTransferConfig(**kv_transfer_config()))
    assert _backend(config) is RoleAttentionBackend


def test_attention_that_the_backend_lacks_is_refused_by_name():
    from verl_avar.rollout.backend_cpu import RoleAttention

    with pytest.raises(NotImplementedError, match="sliding_window, sinks"):
        RoleAttention(2, 8, 1.0, 2, sliding_window=64, sinks=torch.ones(2))


def test_out_of_range_nothing_is_registered_and_the_connector_says_why(monkeypatch):
    import vllm
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from verl_avar.rollout.connector import VisualAttentionConnector

    config = _config(kv_transfer_config=KVTransferConfig(**kv_transfer_config()))
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: pytest.fail("went on registering"))
    plugin.register()
    with pytest.raises(RuntimeError, match=r"0\.24 to 0\.33 and this is 0\.99\.0"):
        VisualAttentionConnector(config, KVConnectorRole.WORKER, None)


def test_another_platform_is_refused_by_name(monkeypatch):
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from verl_avar.rollout.connector import VisualAttentionConnector

    config = _config(kv_transfer_config=KVTransferConfig(**kv_transfer_config()))
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: False)
    with pytest.raises(NotImplementedError, match="run on NVIDIA GPUs and CPUs, not on"):
        VisualAttentionConnector(config, KVConnectorRole.WORKER, None)


def _packed_linear(config):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import utils

    layer = torch.nn.Linear(32, 32, bias=False).requires_grad_(False)
    with set_current_vllm_config(config):
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer


def test_linear_layers_stay_packed_unless_a_trainer_writes_weights():
    layer = _packed_linear(_config())
    assert layer.weight.numel() == 0


def test_linear_layers_are_packed_as_in_stock_where_no_config_is_current():
    from vllm.model_executor.layers import utils

    layer = torch.nn.Linear(32, 32, bias=False).requires_grad_(False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0


def test_linear_layers_follow_the_weights_that_a_trainer_writes():
    from vllm.config import ParallelConfig

    layer = _packed_linear(_config(parallel_config=ParallelConfig(worker_extension_cls="verl.workers.Extension")))
    x = torch.randn(2, 32)
    layer.weight.copy_(torch.eye(32) * 3)
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), 3 * x)
