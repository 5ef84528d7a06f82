"""Which vLLM the plugin accepts, and what an engine is told where the plugin can't work."""

import logging
from importlib.metadata import entry_points

import pytest

from verl_avar.rollout import CONNECTOR, plugin


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that vLLM has just started."""
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "_lacking", None)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv(plugin.UNTESTED_ENV, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "version", ["0.24.0", "0.24.0+cpu", "0.27.1+cpu", "0.28.0rc1", "0.30.1.dev5+g12ab", "0.33.0+cu130", "0.33.4"]
)
def test_releases_of_the_range_and_their_builds_are_accepted(fresh, version):
    assert plugin.version_error(version) is None


@pytest.mark.parametrize("version", ["0.23.0", "0.9.2", "0.24.0rc1", "0.34.0.dev5", "0.34.0", "1.0", "dev", ""])
def test_another_vllm_is_named_with_the_range_and_a_way_to_try(fresh, version):
    error = plugin.version_error(version)
    assert f"0.24 to 0.33 and this is {version}:" in error
    assert "\n" not in error
    fresh.setenv(plugin.UNTESTED_ENV, "1")
    assert plugin.version_error(version) is None


def test_the_connector_is_had_where_the_plugin_has_registered(fresh):
    plugin.register()
    plugin.register()
    assert plugin.problem() is None
    assert getattr(plugin, CONNECTOR).__name__ == CONNECTOR


def test_an_engine_that_was_told_to_leave_the_plugin_out_hears_of_it(fresh):
    fresh.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,avary")
    with pytest.raises(RuntimeError, match="VLLM_PLUGINS='lora_filesystem_resolver,avary' keeps vLLM from loading"):
        getattr(plugin, CONNECTOR)
    fresh.setenv("VLLM_PLUGINS", "other,avar")
    with pytest.raises(RuntimeError, match="vLLM has not loaded the plugin 'avar': install verl_avar"):
        getattr(plugin, CONNECTOR)


def test_the_plugins_name_is_that_of_its_entry_point():
    names = {entry.value: entry.name for entry in entry_points(group="vllm.general_plugins")}
    assert names["verl_avar.rollout.plugin:register"] == plugin.NAME


def test_out_of_range_nothing_is_registered_and_the_connector_says_why(fresh):
    fresh.setattr("vllm.__version__", "0.99.0")
    fresh.setattr(plugin, "_apply", lambda: pytest.fail("went on registering"))
    plugin.register()
    with pytest.raises(RuntimeError, match=r"this is 0\.99\.0"):
        getattr(plugin, CONNECTOR)


@pytest.mark.parametrize("kind", [ImportError, AttributeError])
def test_a_missing_seam_ends_no_engine_but_one_that_asks_for_the_connector(fresh, caplog, kind):
    def lacks():
        raise kind("no name 'register_backend'")

    fresh.setattr(plugin, "_apply", lacks)
    with caplog.at_level(logging.ERROR):
        plugin.register()
    assert "no name 'register_backend'; engines without its connector are not concerned" in caplog.text
    with pytest.raises(RuntimeError, match=r"can't work with vLLM .*: no name 'register_backend'"):
        getattr(plugin, CONNECTOR)


def test_any_other_failure_ends_the_process(fresh):
    def fails():
        raise RuntimeError("broken")

    fresh.setattr(plugin, "_apply", fails)
    with pytest.raises(RuntimeError, match="broken"):
        plugin.register()
    assert plugin.problem() is not None


def test_the_module_has_no_other_hidden_names():
    with pytest.raises(AttributeError, match="no attribute 'Connector'"):
        plugin.Connector  # noqa: B018
