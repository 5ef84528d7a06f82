"""How a run ends: what its last line and its exit status are, and what it notices by itself."""

import asyncio
import signal
import threading
import time
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from verl_avar.errors import ConfigError
from verl_avar.training import command, stopping
from verl_avar.training.command import one_line
from verl_avar.training.shared_memory import SHARED_MEMORY
from verl_avar.training.stopping import Stopped, on_sigterm
from verl_avar.training.watchdog import watch


def run_command(monkeypatch, raised: Exception | None) -> int:
    def run(config):
        if raised:
            raise raised

    monkeypatch.setattr(command, "prepare", lambda cpu: None)
    return command.main("sft", run, ["--config-name", "sft_cpu", "model.path=m", "data.train_files=f"])


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (None, 0, ""),
        (ConfigError("data.x: no such file"), 2, "error: data.x: no such file"),
        (Stopped.after(7), 143, "stopped: a checkpoint of step 7 is saved; run the same command again to go on"),
        (Stopped.after(0), 143, "stopped: no step was finished; run the same command again to go on"),
        (RuntimeError("two\n lines."), 1, "error: two lines. The same command resumes from the newest checkpoint"),
        (
            OSError(28, "full"),
            1,
            "error: OSError: [Errno 28] full. The same command resumes from the newest checkpoint",
        ),
    ],
)
def test_every_end_has_a_line_and_a_status(monkeypatch, capsys, raised, status, line):
    assert run_command(monkeypatch, raised) == status
    assert capsys.readouterr().err.strip().split("\n")[-1] == line


def test_an_error_from_ray_is_told_by_what_was_raised_first():
    from ray.exceptions import RayTaskError

    inner = RayTaskError("f", "traceback\nof f", ValueError("the reason"))
    outer = RayTaskError("g", "traceback\nof g", inner)
    assert one_line(outer) == "ValueError: the reason"
    assert len(one_line(RuntimeError("x" * 1000))) == 302


def test_the_first_sigterm_asks_and_a_later_one_ends(capsys, monkeypatch):
    asked, before = [], signal.getsignal(signal.SIGTERM)
    try:
        on_sigterm(lambda: asked.append(True))
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a killed parent of many threads sends several at once
        assert asked == [True] and capsys.readouterr().err.count("saving a checkpoint") == 1
        monkeypatch.setattr(stopping, "AGAIN_S", 0.0)
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGTERM)
        assert end.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_watchdog_ends_a_run_for_what_a_check_says(tmp_path):
    ended, answers = [], iter([None, "worker_3 died"])
    with watch([tmp_path], stall_s=60, checks=[lambda: next(answers)], every_s=0.05, end=ended.append):
        time.sleep(0.4)
    assert ended == ["worker_3 died. The same command resumes from the newest checkpoint"]


def test_an_actor_that_stays_away_is_lost(monkeypatch):
    from verl_avar.training import lost_actors

    alive = ["worker_0", "worker_1"]
    monkeypatch.setattr(lost_actors, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(lost_actors, "list_named_actors", lambda: alive)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(lost_actors, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lost = lost_actors.LostActors(patience_s=30)
    assert lost() is None
    alive = ["worker_0"]
    assert [lost() for _ in range(3)] == [None] * 3
    alive = ["worker_0", "worker_1"]  # it was restarted
    assert lost() is None
    alive = ["worker_0"]
    assert [lost() for _ in range(3)] == [None] * 3
    assert lost().startswith("worker_1 died")


class Buffer:
    """What `FailedRollouts` sees of verl's replay buffers."""

    def __init__(self):
        self.failure_keys = defaultdict(set)
        self.looks = 0

    def _sync_metadata_from_transfer_queue(self):
        self.looks += 1


def test_more_failed_prompts_than_allowed_in_a_step_end_the_run():
    from verl_avar.training.failed_rollouts import FailedRollouts

    buffer = Buffer()
    failed = FailedRollouts(buffer, most=2)
    buffer.failure_keys["train"] = {"a", "b"}
    buffer._sync_metadata_from_transfer_queue()
    buffer._sync_metadata_from_transfer_queue()  # the same prompts are not counted again
    assert buffer.looks == 2 and failed.of_step() == 2 and failed.of_step() == 0
    buffer.failure_keys["train"] = {"b", "c"}
    buffer.failure_keys["val"] = {"d"}
    buffer._sync_metadata_from_transfer_queue()
    buffer.failure_keys["train"] = {"e"}
    with pytest.raises(RuntimeError, match="rollouts of 3 prompts failed in this step"):
        buffer._sync_metadata_from_transfer_queue()


class Server:
    """A vLLM server that answers a call of its workers in its own way."""

    def __init__(self, answer):
        self.answer = answer
        self.collective_rpc = SimpleNamespace(remote=lambda *args, **kwargs: self.answer())


@pytest.fixture
def adapter(monkeypatch, tmp_path):
    before = set(SHARED_MEMORY.iterdir())
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    from verl_avar.training.weight_sync import ImpatientServerAdapter

    adapter = ImpatientServerAdapter.__new__(ImpatientServerAdapter)
    adapter.config = SimpleNamespace(checkpoint_engine=SimpleNamespace(update_weights_bucket_megabytes=1))
    adapter._has_server, adapter.use_shm = True, True
    adapter.zmq_handle = f"ipc://{tmp_path}/weights.sock"
    adapter.bucket_s, adapter.cause_s = 0.3, 0.3
    yield adapter
    for segment in set(SHARED_MEMORY.glob("verl_weights_*")) - before:  # verl forgets one that nobody took
        segment.unlink()


async def refuses():
    raise ValueError("size mismatch for lm_head.weight")


async def hangs():
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(refuses, "ValueError: size mismatch for lm_head.weight"), (hangs, "it does not say why")],
)
def test_a_weight_sync_that_vllm_does_not_take_fails_with_vllms_reason(adapter, answer, words):
    import zmq

    adapter.server_handle = Server(answer)
    with pytest.raises(RuntimeError, match=f"weight sync: vLLM took no weights for 0 s: {words}"):
        asyncio.run(asyncio.wait_for(adapter.update_weights(iter([("w", torch.ones(3))])), 20))
    assert zmq.Context.instance().getsockopt(zmq.RCVTIMEO) == zmq.Context.instance().getsockopt(zmq.SNDTIMEO) == -1


def test_a_weight_sync_that_vllm_takes_is_verls_own(adapter):
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

    taken = {}

    def receive():
        receiver = BucketedWeightReceiver(adapter.zmq_handle, torch.device("cpu"), use_shm=True)
        receiver.receive_weights(lambda weights, is_last: taken.update({n: w.clone() for n, w in weights}))

    async def answers():
        return None

    adapter.server_handle = Server(answers)
    adapter.server_handle.clear_kv_cache = SimpleNamespace(remote=answers)
    adapter.replica_rank = adapter.rollout_rank = 0
    thread = threading.Thread(target=receive)
    thread.start()
    asyncio.run(asyncio.wait_for(adapter.update_weights(iter([("w", torch.arange(3.0))])), 20))
    thread.join(20)
    assert taken["w"].tolist() == [0, 1, 2]


def test_verl_chooses_the_client_that_does_not_hang(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    from verl.workers.rollout.base import get_rollout_class

    assert get_rollout_class("vllm", "async").__name__ == "ImpatientServerAdapter"


def test_both_ends_of_a_weight_sync_use_a_socket_of_this_run(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("RAY_LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("VERL_RAY_JOB_ID", "01000000")
    monkeypatch.setenv("VERL_REPLICA_RANK", "0")
    from verl.workers.rollout.vllm_rollout import utils, vllm_rollout

    from verl_avar.training.weight_sync import ImpatientServerAdapter

    context = SimpleNamespace(get_job_id=lambda: "01000000")
    monkeypatch.setattr(vllm_rollout.ray, "get_runtime_context", lambda: context)
    parallel = SimpleNamespace(tensor_model_parallel_size=1, data_parallel_size=1, pipeline_model_parallel_size=1)
    config = SimpleNamespace(**vars(parallel), disaggregation=None, layered_summon=False)
    monkeypatch.setattr(vllm_rollout.BaseRollout, "__init__", lambda self, *args: setattr(self, "config", config))
    worker = SimpleNamespace(model_runner=None, local_rank=0)

    def sockets() -> list[str]:
        extension = utils.vLLMColocateWorkerExtension
        return [ImpatientServerAdapter(config, None, None).zmq_handle, extension._get_zmq_handle(worker)]

    monkeypatch.delenv("VERL_AVAR_RUN", raising=False)
    stock = sockets()
    assert stock[0] == stock[1] == "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock"
    monkeypatch.setenv("VERL_AVAR_RUN", "0123abcd")
    assert sockets() == ["ipc:///tmp/rl-colocate-zmq-0123abcd-01000000-replica-0-rank-0.sock"] * 2
