"""lmms-eval from the package index, on local files of questions, through its `openai` model and our proxy."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.harness.driver import MODEL, drive
from verl_avar.evaluation.benchmark.harness.reading import Rules, Verdict
from verl_avar.evaluation.benchmark.harness.settings import LONG_ANSWER, HarnessSettings, harness_python
from verl_avar.evaluation.benchmark.score import score

FAILED = ("[LMMS_EVAL_REQUEST_FAILED", "[LMMS_EVAL_BUDGET_EXCEEDED]")
TASK_FILE = Path(__file__).with_name("lmms_task.py")
METRIC = "accuracy"


def run(settings: HarnessSettings, rules: Rules = score) -> Path:
    """Drives lmms-eval over Parquet files of schema.QUESTIONS; returns results.parquet (see driver.drive).

    Raises ConfigError for a wrong setting, driver's HarnessFailed where the harness fails.
    """
    python = harness_python(settings.python)
    questions = {one.name: one.questions or read_questions(one.file, one.name) for one in settings.benchmarks}
    files = {one.name: one.file.absolute() for one in settings.benchmarks}

    def prepared(proxy: str, raw: Path) -> tuple[list[str], dict[str, str]]:
        tasks = raw / "tasks"
        for name, file in files.items():
            write_task(tasks / name, name, file, settings.protocol.max_tokens or LONG_ANSWER)
        return command(python, settings, proxy, raw), {"HF_DATASETS_CACHE": str(raw / "cache")}

    def verdicts(name: str, raw: Path) -> dict[str, Verdict]:
        return read_samples(raw / "predictions", name, [question["id"] for question in questions[name]])

    return drive("lmms-eval", f"lmms-eval {version(python)}", settings, questions, prepared, verdicts, rules)


def command(python: Path, settings: HarnessSettings, proxy: str, raw: Path) -> list[str]:
    """The harness's command line."""
    protocol = settings.protocol
    model = {
        "model_version": MODEL,
        "base_url": f"{proxy}/v1",
        "api_key": "none",
        "num_concurrent": settings.concurrency,
        "max_retries": 3,
        "httpx_trust_env": False,
    }
    limit = protocol.max_tokens or LONG_ANSWER
    generation = f"max_new_tokens={limit},temperature={protocol.temperature},top_p={protocol.top_p}"
    words = [str(python), "-m", "lmms_eval", "--model", "openai"]
    words += ["--model_args", ",".join(f"{name}={value}" for name, value in model.items())]
    words += ["--tasks", ",".join(one.name for one in settings.benchmarks), "--include_path", str(raw / "tasks")]
    words += ["--gen_kwargs", generation, "--seed", str(protocol.seed or 0), "--batch_size", "1"]
    return [*words, "--log_samples", "--output_path", str(raw / "predictions")]


def write_task(folder: Path, name: str, questions: Path, max_tokens: int) -> None:
    """A yaml over a Parquet file of questions, and the functions it names."""
    import yaml

    folder.mkdir(parents=True)
    shutil.copyfile(TASK_FILE, folder / "questions_task.py")
    task = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": max_tokens, "temperature": 0},
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": [{"version": 1.0}],
    }
    functions = ("doc_to_visual", "doc_to_text", "doc_to_messages", "process_results")
    lines = [f"{function}: !function questions_task.{function}\n" for function in functions]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False) + "".join(lines))


def read_questions(file: Path | None, name: str) -> list[dict]:
    """Rows of schema.QUESTIONS. Raises ConfigError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from verl_avar.evaluation.benchmark.schema import QUESTIONS

    if file is None or not file.is_file():
        raise ConfigError(f"benchmark {name}: lmms-eval is driven over a Parquet file of questions; there is no {file}")
    try:
        table = pq.read_table(file)
    except pa.ArrowInvalid as problem:
        raise ConfigError(f"benchmark {name}: {file} is no Parquet file ({problem})") from None
    if missing := set(QUESTIONS.names) - set(table.column_names):
        raise ConfigError(f"benchmark {name}: {file} lacks the columns {', '.join(sorted(missing))}")
    return table.select(QUESTIONS.names).to_pylist()


def read_samples(folder: Path, name: str, ids: list[str]) -> dict[str, Verdict]:
    """Verdicts by question id of the `*_samples_NAME.jsonl` below a folder; failed calls are left out.

    ids: of the questions, by their row in the file, which is lmms-eval's doc_id.
    """
    found = {}
    for path in folder.glob(f"**/*_samples_{name}.jsonl"):
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            answer = sample["filtered_resps"]
            answer = answer[0] if isinstance(answer, list) else answer
            if not answer.startswith(FAILED):
                value = float(sample[METRIC])
                found[ids[sample["doc_id"]]] = Verdict(answer, None if math.isnan(value) else bool(value))
    return found


def version(python: Path) -> str:
    """Of lmms-eval in an environment. Raises ConfigError where it is not installed."""
    code = "from importlib.metadata import version; print(version('lmms-eval'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{python} has no lmms-eval: make its environment by `bash recipes/bootstrap.sh eval`")
    return done.stdout.strip()
