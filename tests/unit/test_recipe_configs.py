"""Every shipped recipe composes against the installed verl by the runner's own dry run; sweeps; machines' problems."""

import runpy
import signal
import subprocess
import sys

import preflight
import pyarrow.parquet as pq
import pytest
import run
from conftest import ROOT
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from plan import compose_stages, differences, flat, total_steps
from ray_cluster import gpus_of_nodes
from settings import STAGES, SettingsError, load
from sweep import is_sweep, runs_of
from trainers import trainer

from verl_avar.doctor import environment
from verl_avar.training.checks import engine_of
from verl_avar.training.cluster import prepare_ray
from verl_avar.training.compose import compose

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAPER, MEGATRON, TINY = (
    ROOT / "recipes" / f"{name}.yaml" for name in ("avar_qwen25vl_7b", "avar_qwen25vl_7b_megatron", "avar_tiny_cpu")
)
SMALL = ["data.rl_rows=8", "data.eval_rows_per_task=2", "needs.disk_gib=0", "needs.memory_gib=0"]


@pytest.fixture(autouse=True)
def own_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def dry(capsys, path, *arguments):
    """(exit status, what was printed, problems and errors) of a dry run."""
    status = run.main([str(path), "--dry-run", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.splitlines()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_composes_and_its_dry_run_writes_nothing(path, capsys, tmp_path):
    status, shown, problems = dry(capsys, path, "--out", tmp_path / "run")
    assert status == 0, problems
    assert all(line.startswith("problem: ") for line in problems)
    for word in ("stages", "model", "machines", "data, sft", "steps", "batch", str(tmp_path / "run")):
        assert word in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_headed_by_its_command_and_has_a_script(path):
    assert f"#   bash recipes/{path.stem}.sh\n" in path.read_text()
    script = path.with_suffix(".sh")
    assert f" {path.stem} " in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    assert OmegaConf.load(path).name == path.stem


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["rl.overrides=[trainer.no_such_key=1]"], "no_such_key"),
        (["coldstart.overrides=[engine.avar.alhpa=1]"], "alhpa"),
        (["evaluation.pictuers=3"], "pictuers"),
        (["rl.overrides=[actor_rollout_ref.actor.loss_agg_mode=dance]"], "loss_agg_mode"),
        (["coldstart.overrides=[data.train_batch_size=511]"], "511"),
        (["stages=[data,dance]"], "dance"),
        (["rl.epochs=null"], "rl.steps or rl.epochs"),
    ],
)
def test_an_unknown_key_or_a_value_that_verl_refuses_is_an_error_line(arguments, named, capsys, tmp_path):
    status, _, lines = dry(capsys, PAPER, "--out", tmp_path / "run", *arguments)
    assert status == run.EXIT_BAD_INPUT
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]


@pytest.mark.parametrize(
    ("stage", "setting", "named"),
    [
        ("coldstart_agto", "engine.no_such_key=1", "no_such_key"),
        ("coldstart_agto", "+engine.fsdp_size=8", "fsdp_size"),
        ("coldstart_agto", "engine.pipeline_model_parallel_size=2", "pipeline_model_parallel_size=1"),
        ("coldstart_agto", "engine.tensor_model_parallel_size=3", "does not divide 8 GPUs"),
        ("coldstart_agto", "data.micro_batch_size_per_gpu=3", "micro_batch_size_per_gpu=3 does not divide"),
        ("rl", "actor_rollout_ref.actor.megatron.avar.alhpa=1", "alhpa"),
        ("rl", "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2", "fsdp_config"),
        ("rl", "actor_rollout_ref.actor.megatron.context_parallel_size=2", "context_parallel_size=1"),
        ("rl", "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=3", "does not divide 8 GPUs"),
    ],
)
def test_what_the_megatron_engine_refuses_is_an_error_of_the_dry_run(stage, setting, named, tmp_path):
    recipe = load(MEGATRON, [f"{'rl' if stage == 'rl' else 'coldstart'}.overrides=[{setting}]"])
    with pytest.raises(SettingsError, match=f"^{stage}: .*{named}") as error:
        compose_stages(recipe, tmp_path, [stage])
    assert "\n" not in str(error.value)


def test_on_megatron_the_papers_settings_differ_by_the_engine_alone(tmp_path):
    fsdp, megatron = (
        [part.config for part in compose_stages(load(path, []), tmp_path, ["coldstart_agto", "rl"])]
        for path in (PAPER, MEGATRON)
    )
    actor = "actor_rollout_ref.actor."
    optimizer = {"optim._target_", "optim.optimizer", "optim.override_optimizer_config"}
    cut = {"use_dynamic_bsz", "micro_batch_size_per_gpu", "max_token_len_per_gpu"}
    allowed = (
        {"model.use_remove_padding", "trainer.experiment_name", *optimizer, *(f"data.{key}" for key in cut)},
        {"actor_rollout_ref.model.use_remove_padding", "trainer.experiment_name", "model_engine"}
        | {actor + key for key in (*optimizer, "_target_", "checkpoint._target_", "strategy", "use_dynamic_bsz")}
        | {f"{actor}ppo_micro_batch_size_per_gpu"},
    )
    # The engine itself, and parts that follow the actor or that this run builds nothing from
    follow = ("engine.", "critic.", "actor_rollout_ref.ref.", "actor_rollout_ref.rollout.")
    for ours, other, keys in zip(megatron, fsdp, allowed, strict=True):
        values, others = (flat(OmegaConf.to_container(config, resolve=True)) for config in (ours, other))
        both = values.keys() & others.keys()
        assert {key for key in both if values[key] != others[key] and not key.startswith(follow)} == keys
        engine = engine_of(ours).block
        assert engine.avar == engine_of(other).block.avar
        assert engine.tensor_model_parallel_size == 4 and engine.sequence_parallel and engine.use_distributed_optimizer
        assert engine.override_transformer_config.recompute_granularity == "full"
    sft, rl = megatron
    assert (sft.optim.lr_decay_style, sft.optim.min_lr, rl.actor_rollout_ref.actor.optim.lr_decay_style) == (
        "cosine", 0, "constant",
    )  # fmt: skip
    for checkpoint in (sft.checkpoint, rl.actor_rollout_ref.actor.checkpoint):
        assert checkpoint.save_contents == ["model", "optimizer", "extra", "hf_model"]


def test_megatron_plans_are_compared_with_verls_megatron_defaults(tmp_path):
    for part in compose_stages(load(MEGATRON, []), tmp_path, ["coldstart_agto", "rl"]):
        key, engine, _ = engine_of(part.config)
        shown = {name.removeprefix(f"{key}."): old for name, _, old in differences(part) if name.startswith(f"{key}.")}
        assert shown["tensor_model_parallel_size"] == 1
        assert "sequence_parallel" in engine and "sequence_parallel" not in shown  # as verl's Megatron engine has it


def test_what_the_megatron_backend_lacks_is_a_line_per_package_of_megatron_recipes(monkeypatch, tmp_path):
    declared = {
        "megatron-core": ">=0.18,<0.19", "megatron-bridge": ">=0.5,<0.6", "transformer-engine": "[core_cu13,pytorch]",
    }  # fmt: skip
    lines = [f'{name}{wanted}; extra == "megatron"' for name, wanted in declared.items()]
    monkeypatch.setattr(environment.metadata, "requires", lambda name: ["rich", *lines, 'torch; extra == "gpu"'])
    here = {"megatron-core": "0.16.1", "transformer-engine": "2.20.2"}
    monkeypatch.setattr(environment, "installed", here.get)

    def problems(path, *overrides):
        recipe = load(path, list(overrides))
        return preflight.megatron_problems(recipe, compose_stages(recipe, tmp_path, ["coldstart_agto", "rl"]))

    core, bridge = problems(MEGATRON)
    assert core.startswith("megatron-core: 0.16.1 is not in the range")
    assert bridge.startswith("megatron-bridge: not installed") and "bash recipes/bootstrap.sh megatron" in bridge
    assert problems(MEGATRON, "needs.versions=false") == [bridge]
    assert problems(PAPER) == []
    here |= {"megatron-core": "0.18.2", "megatron-bridge": "0.5.1"}
    assert problems(MEGATRON) == []


def test_the_megatron_extra_names_what_the_backend_imports():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        extras = runpy.run_path(str(ROOT / "setup.py"))["EXTRAS"]
    names = {Requirement(line).name for line in extras["megatron"]}
    assert {"megatron-core", "megatron-bridge", "transformer-engine", "nvidia-modelopt", "einops"} == names


def test_the_papers_settings_reach_the_trainers(tmp_path):
    recipe = load(PAPER, ["nodes=2", "ray_address=head:6379"])
    sft, rl = (part.config for part in compose_stages(recipe, tmp_path, list(STAGES)) if part.stage != "coldstart")
    assert (sft.optim.lr, sft.data.train_batch_size, sft.trainer.total_epochs) == (5e-6, 512, 20)
    assert (sft.data.max_length, sft.optim.lr_scheduler_type, sft.optim.lr_warmup_steps_ratio) == (8192, "cosine", 0.1)
    assert (sft.engine.strategy, sft.engine.avar.alpha, sft.engine.avar.beta) == ("fsdp2", 0.15, 0.15)
    actor, reward = rl.actor_rollout_ref.actor, rl.reward.custom_reward_function.reward_kwargs
    assert (rl.actor_rollout_ref.rollout.n, actor.optim.lr, rl.data.train_batch_size) == (8, 1e-6, 256)
    assert (rl.algorithm.adv_estimator, rl.trainer.total_epochs, actor.use_kl_loss) == ("grpo", 4, False)
    assert (reward.lambda_v, reward.lambda_f, reward.visual) == (0.3, 0.1, "ratio")
    for config in (sft, rl):
        assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (2, 8)
        assert config.ray_kwargs.ray_init.address == "head:6379"
    assert sft.avar.ray is True


def test_the_plain_cold_start_differs_by_the_objective_alone(tmp_path):
    plain, agto = compose_stages(load(PAPER, []), tmp_path, ["coldstart", "coldstart_agto"])
    settings = [{key: value for key, value, _ in differences(part)} for part in (plain, agto)]
    changed = {key for key in settings[1] if settings[0].get(key) != settings[1][key]}
    assert changed == {
        "engine.avar.alpha", "engine.avar.beta", "avar.metrics_file", "trainer.default_local_dir",
        "trainer.experiment_name",
    }  # fmt: skip
    assert settings[0]["engine.avar.alpha"] == 0.0


def test_steps_follow_from_rows_and_batch_size(tmp_path):
    import pandas as pd

    pd.DataFrame({"messages": [0] * 100}).to_parquet(tmp_path / "sft.parquet")
    recipe = load(PAPER, [f"data.sft={tmp_path / 'sft.parquet'}", "coldstart.epochs=3"])
    (part,) = compose_stages(recipe, tmp_path, ["coldstart"])
    part.config.data.train_batch_size = 32
    assert total_steps(recipe, tmp_path, "coldstart", part.config) == 3 * (100 // 32)
    part.config.data.train_batch_size = 101
    with pytest.raises(SettingsError, match=r"fewer rows than one batch \(101\)"):
        total_steps(recipe, tmp_path, "coldstart", part.config)
    recipe.coldstart.steps = 7  # given steps count
    assert total_steps(recipe, tmp_path, "coldstart", part.config) == 7


def test_problems_of_the_machine_stop_a_real_run_all_at_once_and_nothing_is_written(capsys, tmp_path):
    wrong = ["needs.disk_gib=1e9", "needs.memory_gib=1e9", "base=./no_such_model", "reward_fn=nowhere.py"]
    arguments = [str(TINY), "--out", str(tmp_path / "run"), *wrong]
    assert run.main(arguments) == run.EXIT_BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    for line, word in zip(lines, ("GiB free", "GiB of memory", "no model in", "reward_fn: no file"), strict=True):
        assert line.startswith("error: ") and word in line
    assert run.main([*arguments, "--dry-run"]) == 0  # the same are warnings there
    warned = capsys.readouterr().err.splitlines()
    assert [line.split()[-3:] for line in warned] == [line.split()[-3:] for line in lines]
    assert all(line.startswith("problem: ") for line in warned)
    assert not (tmp_path / "run").exists()


def test_a_loggers_key_is_asked_for_only_where_it_is_used(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    preflight.check_loggers(compose_stages(load(TINY, []), tmp_path, ["coldstart"]))
    used = compose_stages(load(TINY, ["coldstart.overrides=[trainer.logger=wandb]"]), tmp_path, ["coldstart"])
    with pytest.raises(SettingsError, match="WANDB_API_KEY is not set"):
        preflight.check_loggers(used)
    monkeypatch.setenv("WANDB_MODE", "offline")
    preflight.check_loggers(used)


def test_gpus_that_are_not_there_are_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(preflight, "_gpus_here", lambda: 4)
    with pytest.raises(SettingsError, match="1 × 8 GPUs are wanted, this machine has 4"):
        preflight.check_cluster(load(PAPER, []))
    preflight.check_cluster(load(PAPER, ["gpus_per_node=4"]))
    with pytest.raises(SettingsError, match="there is no Ray cluster to join"):
        preflight.check_cluster(load(PAPER, ["nodes=2"]))
    monkeypatch.setattr("ray_cluster.gpus_of_nodes", lambda address: [8, 8, 2])
    preflight.check_cluster(load(PAPER, ["nodes=2", "ray_address=head:6379"]))
    with pytest.raises(SettingsError, match=r"the Ray cluster head:6379 has 8 \+ 8 \+ 2"):
        preflight.check_cluster(load(PAPER, ["nodes=3", "ray_address=head:6379"]))


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setattr("ray_cluster.ASK", "import sys; sys.exit('ConnectionError: nobody at ' + sys.argv[1])")
    with pytest.raises(SettingsError, match=r"no Ray cluster answers at 127.0.0.1:1 \(ConnectionError: nobody"):
        gpus_of_nodes("127.0.0.1:1")
    monkeypatch.setattr("ray_cluster.ASK", "print('noise of an import'); print('[0, 8.0, 4.0]')")
    assert gpus_of_nodes("127.0.0.1:1") == [8.0, 4.0, 0]


def test_workers_of_a_running_cluster_get_the_drivers_environment(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "/shared/metrics.jsonl")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    own = compose("rl_cpu", ["ray_kwargs.ray_init.address=local"])
    prepare_ray(own)
    assert own.ray_kwargs.ray_init.num_cpus == 8 and "env_vars" not in own.ray_kwargs.ray_init.runtime_env
    joined = compose("rl_cpu", ["ray_kwargs.ray_init.address='head:6379'"])
    prepare_ray(joined)
    init = joined.ray_kwargs.ray_init
    assert init.num_cpus is None and init.num_gpus is None and init.object_store_memory is None
    assert init.runtime_env.env_vars.VERL_ENGINE_VENDOR == "avar"
    assert init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH == "/shared/metrics.jsonl"
    assert "secret" not in str(init)  # Ray shows a runtime environment in its logs and its dashboard


def test_a_recipes_environment_reaches_workers_on_other_nodes(tmp_path):
    recipe = load(TINY, ["environment.NCCL_SOCKET_IFNAME=eth0"])
    config = compose("rl_cpu", trainer(recipe, tmp_path, "rl", "base").overrides)
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.NCCL_SOCKET_IFNAME == "eth0"


def sweep_file(folder, **changes):
    runs = {
        "first": {"stages": ["data"], "overrides": ["data.sft_rows=8"]},
        "second": {"stages": ["data"], "overrides": ["data.sft_rows=9"]},
        "third": {"stages": ["coldstart"], "share": "first", "overrides": ["data.sft_rows=8"]},
    }
    path = folder / "small.yaml"
    OmegaConf.save({"name": "small", "recipe": str(TINY), "runs": runs | changes}, path)
    return path


def test_a_sweep_runs_each_in_its_own_folder_and_shares_finished_stages(capsys, tmp_path):
    path, out = (
        sweep_file(tmp_path, third={"stages": [], "share": "first", "overrides": ["data.sft_rows=8"]}),
        tmp_path / "out",
    )
    assert run.main([str(path), "--out", str(out), *SMALL]) == 0, capsys.readouterr().err
    rows = {name: pq.read_metadata(out / name / "data" / "sft.parquet").num_rows for name in ("first", "second")}
    assert rows == {"first": 8, "second": 9}
    assert (out / "third" / "data").resolve() == (out / "first" / "data").resolve()
    # A shared stage that was made with other settings is refused, before anything runs.
    wrong = sweep_file(tmp_path, third={"stages": ["coldstart"], "share": "first", "overrides": ["data.sft_rows=7"]})
    assert run.main([str(wrong), "--out", str(out), *SMALL]) == run.EXIT_BAD_INPUT
    assert "settings of stage 'data' differ" in capsys.readouterr().err


def test_runs_of_a_sweep_know_what_they_share(tmp_path):
    first, _, third = runs_of(sweep_file(tmp_path), tmp_path / "out", SMALL)
    assert (first.given, third.given, third.shared) == ((), ("data",), tmp_path / "out" / "first")
    assert third.recipe.name == "small/third" and third.recipe.data.sft_rows == 8
    with pytest.raises(SettingsError, match="run 'x' shares 'y', which is no earlier run"):
        runs_of(sweep_file(tmp_path, x={"stages": ["rl"], "share": "y"}), None, [])
    with pytest.raises(SettingsError, match="stagez"):
        runs_of(sweep_file(tmp_path, x={"stagez": ["rl"]}), None, [])
    assert is_sweep(tmp_path / "small.yaml") and not is_sweep(TINY)


def test_the_runner_starts_from_a_shell_without_a_gpu_or_a_platform(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "run.py"), str(PAPER), "--dry-run", "--stages", "data"]
    result = subprocess.run([*command, "--out", tmp_path / "run"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "nothing is started or written" in result.stdout, result.stderr
