"""The same stages on several machines: Ray Data hands blocks of OUT/rows.parquet to workers with shards of their own.

OUT is a folder that all nodes see under the same path. Only numbers travel through Ray: a worker reads its rows from
OUT/rows.parquet itself. Each node's environment must hold the API keys that the config names, for Ray keeps and logs
what it is told to set there.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_avar.errors import ConfigError

BLOCK = 256  # rows that a worker gets at a time
READ = 64  # rows read at a time
RESTARTS = 3  # of a worker that died, and tries of a block that a death interrupted
LOCAL = (None, "local")
# Keeps a Ray of one machine to the loopback on any system, where it is set before ray is imported; `_node_ip_address`
# does not: Ray puts the machine's own address in the place of 127.0.0.1.
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
OBJECT_STORE = 200 * 2**20  # bytes, of a Ray started here: blocks are numbers

RunBlock = Callable[[DictConfig, Path, list[dict], str], dict]
SPENT = ("tokens", "cost")


class ClusterError(RuntimeError):
    """Ray itself failed; what was answered until then is stored."""


def divided(config: DictConfig, workers: int, spent_tokens: int = 0, spent_cost: float = 0.0) -> DictConfig:
    """One worker's part of a config: rate limits, requests in flight and what is left of the budget, by `workers`.

    Whole numbers are rounded down, so that the workers together stay within the config. Raises ConfigError for an
    endpoint that allows fewer requests in flight than there are workers.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, it is {workers}")
    config = copy.deepcopy(config)
    for name, endpoint in config.endpoints.items():
        if endpoint.concurrency < workers:
            raise ConfigError(
                f"endpoints.{name}.concurrency is {endpoint.concurrency}, fewer than the {workers} workers: take fewer "
                "workers"
            )
        endpoint.concurrency //= workers
        for limit in ("requests_per_minute", "tokens_per_minute"):
            if endpoint[limit] is not None:
                endpoint[limit] /= workers
    if config.budget.tokens is not None:
        config.budget.tokens = max(0, config.budget.tokens - spent_tokens) // workers
    if config.budget.cost is not None:
        config.budget.cost = max(0.0, config.budget.cost - spent_cost) / workers
    return config


def run_on_ray(
    config: DictConfig,
    out: Path | str,
    run_block: RunBlock,
    address: str | None = None,
    workers: int = 2,
    *,
    spent_tokens: int = 0,
    spent_cost: float = 0.0,
    block: int = BLOCK,
    progress: Callable[[int], Any] = lambda done: None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict:
    """Runs `run_block` on all rows of OUT/rows.parquet, in blocks, by `workers` actors; returns the sums of its counts.

    run_block: (config, out, rows, writer's name) -> counts, to be imported by its name on every node. The config is the
    worker's part (`divided`), its budget what this worker may still spend, nothing stored counted: of the counts,
    `tokens` and `cost` are taken off before the worker's next block. The writer's name is the block's own, of each
    time that it is tried: nobody else appends to its shard. address: of a running cluster, or "auto"; None or "local"
    starts one on this machine, on the loopback unless ray was imported before, which ends with the run. progress: told
    the rows of each finished block. stopped: asked after each block whether to end here, with what was stored so far.

    A worker that dies is started again, and its block done again, which makes only the calls that are missing; its
    budget starts afresh. Raises what `run_block` raised, and ClusterError, in one line, where Ray itself failed.
    """
    part = divided(config, workers, spent_tokens, spent_cost)
    out = Path(out).resolve()
    blocks = list(_blocks(out / "rows.parquet", block))
    if not blocks:
        return {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray reports to its makers
    if address in LOCAL:
        os.environ.setdefault(LOOPBACK, "0")
    import ray
    from ray.exceptions import RayError

    started = not ray.is_initialized()
    if started:
        _start(address, workers)
    try:
        counts = Counter()
        # Closed before Ray is: a thread of Ray Data that finds Ray gone ends the whole process, without a word.
        with closing(_results(blocks, (pickle.dumps(part), str(out), run_block), workers)) as results:
            for result in results:
                if isinstance(result, Exception):
                    raise result
                rows, found = result
                progress(rows)
                counts.update(found)
                if stopped():
                    break
        return dict(counts)
    except RayError as error:  # its whole text carries the stacks of every process on the way
        text = " ".join(str(error).split("\n")[0].split())
        raise ClusterError(f"Ray ended the run: {type(error).__name__}: {text}") from error
    finally:
        if started:
            ray.shutdown()


class Worker:
    """An actor of Ray Data: its own part of the limits, its own shards."""

    def __init__(self, config: bytes, out: str, run_block: RunBlock):
        self.config = pickle.loads(config)  # with its types; Ray finds an actor by the value of its arguments
        self.out = Path(out)
        self.run_block = run_block
        self.name = f"ray-{secrets.token_hex(4)}"  # of this process: one that replaces it has another
        self.blocks = 0

    def __call__(self, batch: dict) -> dict:
        results = []
        for group, first, rows in zip(batch["group"], batch["first"], batch["rows"], strict=True):
            table = _read(self.out / "rows.parquet", int(group), int(first), int(rows))
            try:
                counts = dict(self.run_block(self.config, self.out, table, f"{self.name}-{self.blocks}"))
            except Exception as error:  # raised again by `run_on_ray`: on its own way Ray would rewrite it
                results.append(pickle.dumps(error))
                break
            self.blocks += 1
            for kind in SPENT:
                if self.config.budget[kind] is not None:
                    self.config.budget[kind] = max(0, self.config.budget[kind] - counts.get(kind, 0))
            results.append(pickle.dumps((int(rows), counts)))
        return {"result": results}


def _blocks(path: Path, size: int) -> Iterator[dict]:
    """Row groups cut into pieces of at most `size` rows."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            for first in range(0, rows, size):
                yield {"group": group, "first": first, "rows": min(size, rows - first)}


def _read(path: Path, group: int, first: int, rows: int) -> list[dict]:
    """Some rows of one row group; those before them are passed over in pieces, so that few are held at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        found, place = [], 0
        for batch in file.iter_batches(READ, row_groups=[group]):
            start, stop = max(first - place, 0), min(first + rows - place, batch.num_rows)
            if start < stop:
                found += batch.slice(start, stop - start).to_pylist()
            place += batch.num_rows
            if place >= first + rows:
                break
    return found


def _results(blocks: list[dict], arguments: tuple, workers: int) -> Iterator[tuple[int, dict] | Exception]:
    """Rows and counts of each block as it ends, or what ended it."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the run has its own
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # an error is raised, and worded, here
    data = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
        Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=arguments,
        num_cpus=1,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )
    for row in data.iter_rows():
        yield pickle.loads(row["result"])


def _start(address: str | None, workers: int) -> None:
    import ray

    if address in LOCAL:
        ray.init(
            address="local",
            num_cpus=workers + 1,  # waiting for answers takes no CPU; one for Ray Data's own tasks
            num_gpus=0,
            object_store_memory=OBJECT_STORE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from error
