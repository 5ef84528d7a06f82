"""`avar vas`: the Visual Attention Score of a checkpoint on image questions, as table, figures and page (AVAR §2.2)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from verl_avar.evaluation.options import add_shared, count, layer_list, load, model_path, share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `avar vas`."""
    add_shared(parser, data=".parquet or .jsonl of image questions, or a folder of images")
    parser.add_argument("--name", help="what to call the checkpoint in tables and figures (default: from its path)")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: runs/vas/MODEL); a rerun goes on there"
    )
    parser.add_argument(
        "--scope",
        choices=("user", "response", "both"),
        default="both",
        help="whose attention: the user's tokens after the image (the paper's VAS), the response's, or both (default)",
    )
    parser.add_argument(
        "--layers", type=layer_list, metavar="LIST", help="layers to measure, such as 0,4,8-11 (default: all)"
    )
    parser.add_argument(
        "--pictures",
        type=count,
        metavar="N",
        default=4,
        help="rows whose response is followed over the image, chosen before they are measured (default: 4)",
    )
    parser.add_argument(
        "--sink-share",
        type=share,
        default=0.05,
        help="a visual token is a sink above this share of the visual mass (and 5 times an even part of it)",
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="DIR",
        help="results of another checkpoint to put beside these in the table; may be given again",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs `avar vas`; returns the exit status: 0, 2 for bad input and where nothing could be measured, 130 if
    interrupted.
    """
    try:
        others = [read_result(path) for path in arguments.compare]
        result, out = measure_checkpoint(arguments, others)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"avar vas: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("avar vas: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    from verl_avar.report.vas_page import print_vas

    print_vas([*others, result])
    print(f"{out / 'index.html'}")
    return 0


def measure_checkpoint(arguments: argparse.Namespace, others: list[dict]) -> tuple[dict, Path]:
    """Measures what the options ask for and writes everything into the output folder: (vas.json, folder).

    others: results that the page shows beside these.
    """
    from verl_avar.evaluation.partial import begun, fingerprint
    from verl_avar.evaluation.rows import read_rows

    model = model_path(arguments)
    out = arguments.out or Path("runs/vas") / Path(model).name
    rows = read_rows(arguments.data, arguments.question, arguments.system, arguments.max_samples)

    from rich.console import Console
    from rich.progress import track

    from verl_avar.evaluation.vas_run import Settings, check_model, measure_rows
    from verl_avar.report.vas_page import render_vas

    settings = Settings(arguments.scope, arguments.layers, arguments.max_new_tokens, arguments.sink_share)
    checkpoint = load(arguments)
    check_model(checkpoint, settings.layers)
    decisive = {
        "command": "avar vas",
        "model": model,
        "model_files": fingerprint(model),
        "data": str(arguments.data),
        "data_files": fingerprint(arguments.data),
        "question": arguments.question,
        "system": arguments.system,
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        **vars(settings),
    }
    console = Console(stderr=True)

    def progress(batches):
        quiet = not console.is_terminal
        return track(batches, description="measuring", console=console, transient=True, disable=quiet)

    with begun(out, decisive):
        outcome = measure_rows(
            checkpoint,
            rows,
            settings,
            out / "parts",
            batch_size=arguments.batch_size,
            pictures=arguments.pictures,
            strict=arguments.strict,
            progress=progress,
        )
        result, samples = finish(checkpoint, arguments, rows, settings, outcome, out)
        render_vas(result, samples, out, others)
    return result, out


def finish(checkpoint, arguments, rows, settings, outcome, out: Path) -> tuple[dict, list]:
    """vas.json and the tables from the parts on disk: (vas.json, the samples of the pictures)."""
    import pandas as pd

    from verl_avar import families
    from verl_avar.evaluation.partial import write_parquet, write_text
    from verl_avar.evaluation.vas_run import overlays
    from verl_avar.evaluation.vas_summary import by_head, summarise

    tables = [pd.read_parquet(part) for part in sorted((out / "parts").glob("*.parquet"))]
    tables = [table for table in tables if table["number"].min() < len(rows)]
    if not tables:
        first = (outcome.failed + outcome.skipped)[0]
        raise ValueError(f"none of {len(rows)} rows could be measured; row {first['row']}: {first['reason']}")
    table = pd.concat(tables, ignore_index=True)
    table = table[table["number"] < len(rows)].sort_values("number", kind="stable")
    crossed = bool(families.cross_attention_layers(checkpoint.model))
    result = {
        "schema": 1,
        "model": model_path(arguments),
        "name": arguments.name,
        "model_type": checkpoint.model.config.model_type,
        "data": str(arguments.data),
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "cross_attention": crossed,
        "layers": [int(layer) for layer in table["layers"].iloc[0]],
        "heads": int(table["heads"].iloc[0]),
        "samples": int(table["number"].nunique()),
        "planned": len(rows),
        "failed": outcome.failed,
        "skipped": outcome.skipped,
        "seconds": float(table.drop_duplicates("number")["seconds"].sum()),
        "notes": notes(table, outcome, crossed),
        **summarise(table, classes=not crossed, sink_share=settings.sink_share),
    }
    write_text(out / "vas.json", json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
    write_parquet(out / "vas.parquet", by_head(table))
    kept = ["number", "id", "question", "answer", "text", "prompt_tokens", "response_tokens", "visual_tokens"]
    # In the parts `response` is the mass on the response.
    samples = table.drop_duplicates("number")[kept].rename(columns={"text": "response"})
    write_parquet(out / "samples.parquet", samples)
    return result, overlays(table, rows)


def notes(table, outcome, crossed: bool) -> list[str]:
    """What a reader of the figures must know."""
    said = []
    if crossed:
        said.append(
            "The image enters through cross-attention: visual mass is the gated mass of the cross-attention layers, to "
            "be compared between checkpoints of this architecture only; the paper's classes do not apply."
        )
    without = int(table.drop_duplicates("number")["vas"].isna().sum())
    if without:
        said.append(
            f"Samples without VAS, for want of a system turn that their queries reach: {without}; --system TEXT gives "
            "one to rows that have none."
        )
    if outcome.skipped:
        said.append(f"Rows left out for want of an image: {len(outcome.skipped)}.")
    return said


def read_result(path: str | Path) -> dict:
    """`vas.json` of a finished run, by its file or folder. Raises OSError or ValueError, with the path."""
    path = Path(path)
    path = path / "vas.json" if path.is_dir() else path
    from verl_avar.report.vas_results import check_vas

    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError("no object with a schema")
        check_vas(result)
    except ValueError as error:  # no UTF-8, no JSON, or another schema
        raise ValueError(f"{path}: not a vas.json of this version of avar: {error}") from None
    return result
