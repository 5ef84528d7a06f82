"""`avar serve` inside vLLM's own command line, and engines that must not start."""

import sys

import pytest
from servers import Server

from verl_avar.miniature import base_path
from verl_avar.rollout import CONNECTOR, kv_transfer_config, serve


@pytest.fixture
def vllms_command(monkeypatch):
    """vLLM's own command line up to the server: what it would be started with."""
    from vllm.entrypoints.cli import serve as vllm_serve

    started = []
    monkeypatch.setattr(vllm_serve.ServeSubcommand, "cmd", staticmethod(started.append))
    monkeypatch.setattr(vllm_serve, "cmd_init", vllm_serve.cmd_init)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return started


def test_vllms_command_gets_its_flags_and_our_config(vllms_command):
    serve.serve(kv_transfer_config(visual_bias=0.5), ["MODEL", "--port", "8010", "--enforce-eager"])
    (args,) = vllms_command
    assert (args.model_tag, args.port, args.enforce_eager) == ("MODEL", 8010, True)
    assert args.kv_transfer_config.kv_connector == CONNECTOR
    assert args.kv_transfer_config.kv_connector_extra_config["visual_bias"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "8010"], "MODEL is missing"),
        (["MODEL", "--kv-transfer-config", "{}"], "--kv-transfer-config is what this command sets"),
        (["MODEL", "--kv_transfer_config.kv_role", "kv_both"], "--kv-transfer-config is what this command sets"),
    ],
)
def test_what_vllms_command_shows_to_be_wrong_is_one_line(vllms_command, capsys, arguments, complaint):
    with pytest.raises(SystemExit, match="2"):
        serve.serve(kv_transfer_config(), arguments)
    assert complaint in capsys.readouterr().err and vllms_command == []


def test_a_bad_config_ends_the_server_before_it_loads_the_model(tmp_path):
    config = kv_transfer_config() | {"kv_connector_extra_config": {"visual_bias": 99}}
    with Server(base_path(), tmp_path, config=config) as bad, pytest.raises(RuntimeError, match="did not start"):
        bad.wait()
    log = bad.log_end()
    assert f"kv_connector_extra_config of {CONNECTOR}: visual_bias must be finite" in log.splitlines()[-1]
    assert "EngineCore" not in log
