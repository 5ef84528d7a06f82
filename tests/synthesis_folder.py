"""The folder of a synthesis run, made by hand: rows of every kind that outputs, card and viewer must take.

Thirteen source rows: four accepted (several images; choices; LaTeX and Chinese; a very long chain with hostile text),
two rejected at intake, five rejected later, one left out by attention, one pending.
"""

import io
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from verl_avar.data.schema import IMAGE, ROWS, content_id
from verl_avar.synthesis.config import Synthesis
from verl_avar.synthesis.outcomes import ACCEPTED, OUTCOMES, PENDING, REJECTED

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)></think>&amp;"
EXPLAIN = {
    "duplicate": "The same question about the same image stands in an earlier row.",
    "benchmark_overlap": "The question stands in a benchmark that the data must not contain.",
    "refusal": "The model declined to do what it was asked.",
    "call_failed": "The endpoint gave no answer in all the attempts that the config allows.",
    "wrong_answer": "The final answer is not the row's right answer.",
    "leak": "The text speaks of a description, which whoever looks at the image does not have.",
    "few_anchors": "The chain goes back to the image too rarely.",
    "attention_low": "The student looks at the image less than at that of the rows that were kept.",
}
CHAIN = "<think>The description says that the base is {n}. So the height is {n}. Let me check: yes.</think>"
ANCHORED = (
    "<think>Looking at the triangle, the base is {n}. So the height is {n} as well. Let me check the image again: the "
    "two sides are equal.</think><answer>{a}</answer>"
)


def png(number: int, width: int = 160, height: int = 120, kind: str = "PNG") -> bytes:
    """A picture of a triangle, each number another one."""
    picture = Image.new("RGB", (width, height), (250, 250, 245))
    draw = ImageDraw.Draw(picture)
    corners = [(0.1 * width, 0.9 * height), (0.9 * width, 0.9 * height), ((0.2 + 0.05 * number) * width, 0.1 * height)]
    draw.polygon(corners, outline=(0, 90, 170), width=3)
    draw.text((0.5 * width, 0.92 * height), str(number), fill=(30, 30, 30))
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return buffer.getvalue()


def row(number, question=IMAGE + "How long is x?", answer="3", choices=(), images=None, source="geo", meta="{}"):
    images = images or [png(number)]
    known = {"source": source, "source_row": number, "question": question, "answer": answer, "meta": meta}
    return known | {
        "id": content_id(question, answer, choices, images),
        "choices": list(choices),
        "images": [{"bytes": image} for image in images],
    }


def outcome(of, status=ACCEPTED, stage=None, reason=None, detail=None, answer=None, **changes):
    number, a = of["source_row"], answer or of["answer"]
    anchored = ANCHORED.format(n=number, a=a)
    reached = {"describe": 1, "reason": 2, "anchor": 3, "attention": 3, None: 3, "intake": 0}[stage]
    texts = {
        "description": f"A triangle with the base {number}. Its two sides are equal; the height is drawn dashed.",
        "chain": CHAIN.format(n=number) + f"<answer>{a}</answer>",
        "anchored": anchored,
    }
    texts = {name: text if index < reached else None for index, (name, text) in enumerate(texts.items())}
    made = {"status": status, "stage": stage, "reason": reason, "detail": detail} | texts
    made |= {"candidates": [], "calls": reached, "prompt_tokens": 900 * reached, "completion_tokens": 300 * reached}
    made |= {"cost": 0.001 * reached, "attention": None, "weight": 1.0, "id": of["id"]}
    made |= {"source": of["source"], "source_row": number} | changes
    looks = ("Looking at the triangle", "Let me check the image again")
    text = made["anchored"] or ""
    found = [(look, text.find(look)) for look in looks if look in text]
    return {"anchors": [{"text": look, "position": at / len(text)} for look, at in found]} | made


def folder_rows() -> list[tuple[dict, dict, bool]]:
    """(outcome, row, whether the row passed intake), in the order of the sources."""
    several = row(0, f"{IMAGE}{IMAGE}Which of the two is larger?", "the second", (), [png(0), png(1, kind="JPEG")])
    chosen = row(1, IMAGE + "Which side is longest?", "B", ("$AB$", "$BC$ | the base", "none of them"))
    chinese = row(2, IMAGE + "如图，求三角形的面积 $S=\\frac{1}{2}ah$。", "\\frac{9}{2}", meta='{"subject": "几何"}')
    think = "Looking at the figure, 底边是 3。所以 $S=\\frac{1}{2}\\cdot 3\\cdot 3$。再看图片：高是 3。"
    long_row = row(3, IMAGE + f"How long is x? {HOSTILE}", "7", images=[png(3, 1600, 1100)])
    steps = " ".join(f"Step {i}: the side is {i % 7} and the sum is {i * i}." for i in range(400))
    long_text = (
        f"<think>Looking at the triangle I begin. {steps} {HOSTILE} <image> Let me check the image again: it "
        "is right.</think><answer>7</answer>"
    )
    twice, bench = row(4), row(5)
    refused = row(6, IMAGE + "Who is this?", "nobody")
    silent, wrong, leaky = row(7), row(8, answer="4 cm"), row(9)
    bare, dull, waiting = row(10), row(11), row(0, source="m3cot")
    tried = [
        {"stage": "reason", "candidate": i, "reason": "wrong_answer", "detail": f"the answer is {i}, not 3",
         "text": f"<think>I count {i}.</think><answer>{i}</answer> {HOSTILE if i else ''}"}
        for i in range(2)
    ]  # fmt: skip
    intake = {"id": None, "weight": None, "anchors": [], "cost": 0.0}
    r = (REJECTED,)
    return [
        (outcome(several, attention=1.5, candidates=tried, calls=5), several, True),
        (outcome(chosen, attention=1.25), chosen, True),
        (
            outcome(
                chinese,
                anchored=f"<think>{think}</think><answer>\\frac{{9}}{{2}}</answer>",
                chain="<think>描述说底边是 3，高是 3。</think><answer>\\frac{9}{2}</answer>",
                anchors=[{"text": "Looking at the figure", "position": 0.1}, {"text": "再看图片", "position": 0.7}],
                attention=0.75,
                weight=0.5,
            ),
            chinese,
            True,
        ),
        (outcome(long_row, anchored=long_text, chain=f"<think>{steps}</think><answer>7</answer>"), long_row, True),
        (outcome(twice, *r, "intake", "duplicate", "as row 3 of geo", **intake | {"id": twice["id"]}), twice, False),
        (outcome(bench, *r, "intake", "benchmark_overlap", "as row 17 of MathVista", **intake), bench, False),
        (outcome(refused, *r, "describe", "refusal", "“I'm sorry, I can't”", description="I'm sorry, I can't."),
         refused, True),
        (outcome(silent, *r, "describe", "call_failed", "8 attempts, the last: timeout", description=None), silent,
         True),
        (outcome(wrong, *r, "reason", "wrong_answer", "the answer is 5 cm, not 4 cm", answer="5 cm"), wrong, True),
        (outcome(leaky, *r, "anchor", "leak", "“the description says”", anchored=CHAIN.format(n=9) + HOSTILE), leaky,
         True),
        (outcome(bare, *r, "anchor", "few_anchors", "1 look at the image, wanted 2",
                 anchored="</think><answer>3</answer><think>Looking at the triangle"), bare, True),
        (outcome(dull, *r, "attention", "attention_low", "0.25, kept from 0.5", attention=0.25), dull, True),
        (outcome(waiting, PENDING, chain=None, anchored=None), waiting, True),
    ]  # fmt: skip


def summary_of(made: list[dict]) -> dict:
    """summary.json of these outcomes; figures of the calls are made up, those of the rows counted."""
    status = Counter(one["status"] for one in made)
    reasons: dict[str, Counter] = {}
    for one in made:
        if one["status"] == REJECTED:
            reasons.setdefault(one["stage"], Counter())[one["reason"]] += 1
    sources = {name: [one for one in made if one["source"] == name] for name in ("geo", "m3cot")}
    stage = {
        "model": "/home/somebody/models/teacher",
        "endpoint": "http://somebody:secret@vision.example:8000/v1",
        "prompt": "built in",
        "prompt_sha256": "0" * 64,
        "sampling": {"temperature": 0.7, "max_tokens": 2048},
        "candidates": 1,
        "keep": "first",
        "calls": 11,
        "retries": {"timeout": 3, "rate_limit": 1},
        "prompt_tokens": 9900,
        "completion_tokens": 3300,
        "cost": 0.011,
        "seconds": 22.0,
    }
    return {
        "name": "triangles",
        "seed": 0,
        "rows": len(made),
        "accepted": status[ACCEPTED],
        "rejected": status[REJECTED],
        "pending": status[PENDING],
        "reasons": {name: dict(count) for name, count in reasons.items()},
        "sources": {
            name: {"rows": len(part), "accepted": sum(one["status"] == ACCEPTED for one in part)}
            for name, part in sources.items()
        },
        "stages": {
            "describe": stage,
            "reason": stage
            | {"model": "org/reasoner", "candidates": 3, "keep": "shortest", "calls": 12, "retries": {}},
            "anchor": stage | {"model": "org/writer", "calls": 7, "cost": 0.0},
        },
        "seconds": 61.5,
        "versions": {"verl_avar": "0.1.0", "openai": "2.1.0"},
        "attention": attention_report(),
    }


def attention_report() -> dict:
    """The block `attention` of summary.json, of rows with 1.5, 1.25, 0.75 and 0.25, the last of which was left out."""
    return {
        "model": "/home/somebody/student",
        "measure": "made up",
        "rows": 5,
        "measured": 4,
        "not_measured": 1,
        "kept": 4,
        "dropped": 1,
        "keep": 0.75,
        "weighted": False,
        "attention": {
            "before": {"mean": 0.9375},
            "after": {"mean": 1.1667},
            "difference": 0.2292,
            "interval": [0.0625, 0.5],
        },
        "words": {"before": {"mean": 25.0}, "after": {"mean": 24.0}, "difference": -1.0, "interval": None},
        "notes": ["Mean attention rises by construction."],
    }


def config_of(out, **changes):
    """The run's settings, with every output asked for."""
    endpoint = {"base_url": "http://somebody:secret@vision.example:8000/v1", "api_key_env": "SOME_KEY"}
    stages = {name: {"endpoint": "e", "model": "org/m"} for name in ("reason", "anchor")}
    given = {
        "name": "triangles",
        "out": str(out),
        "sources": [{"path": "hiyouga/geometry3k"}, {"path": "/home/somebody/m3cot"}],
        "endpoints": {"e": endpoint},
        "stages": {"describe": {"endpoint": "e", "model": "org/v", "images": True}} | stages,
        "outputs": ["sft", "rl", "sharegpt", "dataset"],
    }
    return OmegaConf.merge(OmegaConf.structured(Synthesis), given, changes)


def write_folder(out, rows: list[tuple[dict, dict, bool]] | None = None):
    """Writes rows.parquet, outcomes.parquet and summary.json into `out`; returns the run's settings."""
    rows = folder_rows() if rows is None else rows
    out.mkdir(parents=True, exist_ok=True)
    made = [one for one, _, _ in rows]
    # Several row groups, as the run itself writes them.
    pq.write_table(
        pa.Table.from_pylist([one for _, one, in_ in rows if in_], schema=ROWS), out / "rows.parquet", row_group_size=3
    )
    pq.write_table(pa.Table.from_pylist(made, schema=OUTCOMES), out / "outcomes.parquet", row_group_size=4)
    (out / "summary.json").write_text(json.dumps(summary_of(made)), encoding="utf-8")
    return config_of(out)


def many_rows(count: int, seed: int = 0) -> list[tuple[dict, dict, bool]]:
    """Rows as a run of some size leaves them, for figures and pages: lengths, anchors and reasons drawn at random."""
    random, picture = np.random.default_rng(seed), [png(0)]
    reasons = [("describe", "refusal"), ("reason", "wrong_answer"), ("reason", "wrong_answer"), ("anchor", "leak"),
               ("anchor", "few_anchors")]  # fmt: skip
    made = []
    for number in range(count):
        one = row(number, images=picture)
        if random.random() < 0.3:
            stage, reason = reasons[random.integers(len(reasons))]
            made.append((outcome(one, REJECTED, stage, reason, "drawn at random"), one, True))
            continue
        words = int(random.lognormal(5, 0.6)) + 20
        anchors = [
            {"text": "Let me look again", "position": float(at)} for at in random.beta(1.2, 1, random.integers(2, 9))
        ]
        chain = f"<think>{'word ' * words}</think><answer>3</answer>"
        anchored = f"<think>{'word ' * int(words * random.uniform(1, 1.4))}</think><answer>3</answer>"
        look = float(random.gamma(4, 0.3))
        made.append((outcome(one, chain=chain, anchored=anchored, anchors=anchors, attention=look), one, True))
    return made
