"""Small copies of published data sets, in the layout that each has on the hub or in its repository."""

import base64
import csv
import io
import json

import datasets
from PIL import Image

TEXT, PICTURE = datasets.Value("string"), datasets.Image()
ANSWERED = "<think>I look at the figure again.</think><answer>{}</answer>"


def png(colour=(255, 0, 0), size=(8, 6), kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=kind)
    return buffer.getvalue()


def hub(folder, rows, features, split="train"):
    """Parquet as `datasets` uploads it: data/SPLIT-00000-of-00001.parquet, images as {bytes, path}."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def avar_coldstart(folder):
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "1.png").write_bytes(png())
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "<image>How long is AB?"},
                {"from": "gpt", "value": ANSWERED.format("5 cm")},
            ],
            "images": ["images/1.png"],
        },
        {
            "conversations": [{"from": "human", "value": "<image>Why?"}, {"from": "gpt", "value": "Because."}],
            "images": ["images/1.png"],
        },
    ]
    (folder / "train.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return str(folder)


def geometry3k(folder):
    rows = [
        {
            "images": [{"bytes": png()}],
            "problem": "<image>Find x.",
            "answer": "3",
            "id": 0,
            "choices": ["1", "3", "5", "7"],
            "ground_truth": "B",
        },
        {"images": [], "problem": "Find y.", "answer": "4", "id": 1, "choices": [], "ground_truth": "A"},
    ]
    features = {
        "images": datasets.List(PICTURE),
        "problem": TEXT,
        "answer": TEXT,
        "id": datasets.Value("int64"),
        "choices": datasets.List(TEXT),
        "ground_truth": TEXT,
    }
    return hub(folder, rows, features)


def r1_sharevl(folder):
    rows = [{"images": [{"bytes": png()}], "problem": "<image>Find x.", "answer": "3", "new_questions": ["What is x?"]}]
    features = {
        "images": datasets.List(PICTURE),
        "problem": TEXT,
        "answer": TEXT,
        "new_questions": datasets.List(TEXT),
    }
    return hub(folder, rows, features)


def m3cot(folder):
    base = {"id": "s-1", "category": "c", "rationale": "Look.", "domain": "science", "topic": "biology"}
    rows = [
        base
        | {"question": "Which?", "choices": ["a cat", "a dog"], "context": "Two pets.", "answer": "B"}
        | {"image": {"bytes": png()}},
        base | {"question": "Which?", "choices": ["a", "b"], "context": "", "answer": "A", "image": None},
    ]
    features = {key: TEXT for key in (*base, "question", "context", "answer")}
    return hub(folder, rows, features | {"choices": datasets.List(TEXT), "image": PICTURE})


def algopuzzlevqa(folder):
    """As the repository has it: one object a line, `solution` differing by puzzle, options since the second release."""
    for name, rows in {
        "board_tile": [{"answer": "No", "options": ["Yes", "No"], "solution": {"rows": 6}}],
        "clock": [{"answer": "4:23", "solution": {"current_hour": 2, "add": {"hour": 1}}}],
    }.items():
        pictures = folder / "data" / "images" / name
        pictures.mkdir(parents=True)
        (pictures / f"{name}_0000.jpg").write_bytes(png(kind="JPEG"))
        lines = [
            json.dumps({"image": f"images/{name}/{name}_0000.jpg", "question": f"Solve the {name}."} | row)
            for row in rows
        ]
        (folder / "data" / f"{name}.json").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def solidgeo(folder):
    """As the repository has it: an object of objects, paths with backslashes."""
    (folder / "data" / "images").mkdir(parents=True)
    for number in (1, 2, 3):
        (folder / "data" / "images" / f"{number}.jpg").write_bytes(png((number, 0, 0), kind="JPEG"))
    base = {"choices": [], "solution": [], "answer_type": "single-step", "complexity_level": "Level 1", "qa_id": 7}
    rows = {
        "0": base
        | {"question": "Find the height.", "image": ["images\\1.jpg"], "answer": "diameter $=10 \\mathrm{~m}$"},
        "1": base
        | {
            "question": "The left view is ()\n\n<ImageHere>\nA.\n\n<ImageHere>\nB.\n\n<ImageHere>\n\n##",
            "image": ["images\\1.jpg", "images\\2.jpg", "images\\3.jpg"],
            "answer": "A\n\n[Analysis] By the definition of the left view.",
        },
        "2": base
        | {"question": "Mark C.\n\n<ImageHere>", "image": ["images\\1.jpg"], "answer": "See analysis\n\n[Analysis] x"},
        "3": base | {"question": "Two views <ImageHere>", "image": ["images\\1.jpg", "images\\2.jpg"], "answer": "3"},
        "4": base | {"question": "Which?", "choices": ["A. 3", "B. 4"], "image": ["images\\1.jpg"], "answer": "B"},
    }
    (folder / "data" / "SolidGeo.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return str(folder)


def mmk12(folder):
    rows = [
        {
            "id": "a7",
            "question": "<image>Which one?\nA. left\nB. right",
            "answer": " B ",
            "subject": "physics",
            "image": {"bytes": png()},
        }
    ]
    features = {"id": TEXT, "question": TEXT, "answer": TEXT, "subject": TEXT, "image": PICTURE}
    return hub(folder, rows, features)


def vlmevalkit(path, images, questions):
    """A TSV as VLMEvalKit has it: images in base64, a list of them as text, or the index of the row that has it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["index", "image", "question", "A", "B", "answer"], delimiter="\t")
        writer.writeheader()
        for number, (image, question) in enumerate(zip(images, questions, strict=True)):
            if isinstance(image, list):
                cell = str([base64.b64encode(each).decode() for each in image])
            else:
                cell = base64.b64encode(image).decode() if isinstance(image, bytes) else image
            writer.writerow({"index": number, "image": cell, "question": question, "A": "x", "B": "y", "answer": "A"})
    return str(path)
