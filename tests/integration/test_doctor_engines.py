"""The doctor on the real libraries: a driver, a Ray worker and a vLLM engine with the plugin, and without it."""

import pytest

from verl_avar import doctor
from verl_avar.doctor import processes
from verl_avar.doctor.environment import stack


@pytest.mark.timeout(900)
def test_every_check_passes_in_this_environment():
    findings = {finding.name: finding for finding in doctor.diagnose()}
    # Room on the machine is not the environment's doing.
    failed = [f for f in findings.values() if not f.ok and f.name not in ("disk", "memory", "shared memory")]
    assert not failed
    assert "AvarFSDPEngine" in findings["plugin in a Ray worker"].detail
    assert "visual-attention ratio" in findings["plugin in a vLLM engine"].detail


@pytest.mark.timeout(400)
def test_a_process_that_loads_no_verl_plugins_is_found(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    finding = processes.probe("driver", stack()[0])
    finding.log.unlink()
    assert not finding.ok
    assert "VERL_USE_EXTERNAL_PLUGINS=none" in finding.detail
    assert "unset VERL_USE_EXTERNAL_PLUGINS" in finding.fix


@pytest.mark.timeout(500)
def test_a_vllm_that_loads_no_plugins_is_found(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "none-of-them")
    finding = processes.probe("vllm", stack()[0])
    finding.log.unlink()
    assert not finding.ok
    assert "VLLM_PLUGINS=none-of-them" in finding.detail
    assert "VLLM_PLUGINS" in finding.fix
