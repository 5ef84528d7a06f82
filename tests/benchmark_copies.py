"""A few questions of each of the seven benchmarks, made by hand in the columns that each is published in.

Both forms hold the same questions, so that they must be read alike: VLMEvalKit's TSV files and the hub's parquet.
"""

import base64
import csv
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEN = ("Paris", "Rome", "Oslo", "Bern", "Lima", "Cairo", "Delhi", "Quito", "Accra", "Seoul")
COLOURS = ("red", "green", "blue", "orange", "purple", "black")


def picture(text: str, colour: str = "red", kind: str = "PNG") -> bytes:
    """A file of 56 × 56 pixels with a disc and a text."""
    image = Image.new("RGB", (56, 56), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 20, 40, 52), fill=colour)
    draw.text((2, 2), text, fill="black")
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def write_copies(folder: Path | str, kind: str = "tsv") -> dict[str, Path]:
    """Writes all seven into one folder, as `--data` takes it; name of the benchmark -> its file or folder.

    kind: "tsv" as VLMEvalKit names them, or "parquet" as the hub's repositories lie after a download. MMMU-Pro is two
    tables: its path is the folder of all copies.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, tables in BENCHMARKS.items():
        for tsv, parquet, rows in tables:
            as_tsv, as_hub = rows()
            path = folder / (tsv if kind == "tsv" else parquet)
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "tsv":
                write_tsv(path, as_tsv)
            else:
                write_parquet(path, as_hub)
            paths[name] = path
    return paths | {"mmmu_pro": folder}


def write_tsv(path: Path, rows: list[dict]) -> None:
    """Cells as pandas writes them: None is empty; of bytes the base64, of several a list's text."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def write_parquet(path: Path, rows: list[dict]) -> None:
    """Columns of bytes become the hub's images, {bytes, path}."""
    pictured = [key for key in rows[0] if key.startswith(("image_", "decoded")) or isinstance(rows[0][key], bytes)]
    columns = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if key in pictured:
            values = [None if value is None else {"bytes": value, "path": None} for value in values]
        columns[key] = pa.array(values, IMAGE if key in pictured else None)
    pq.write_table(pa.table(columns), path)


def _cell(value):
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return str([base64.b64encode(each).decode() for each in value])
    return value


def _mathvista():
    hints = {
        "text": "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
        "integer": "Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, "
        "at the end.",
        "float": "Please answer the question requiring a floating-point number with one decimal place and provide the "
        "final value, e.g., 1.2, 1.3, 1.4, at the end.",
        "list": "Please answer the question requiring a Python list as an answer and provide the final list, e.g., "
        "[1, 2, 3], [1.2, 1.3, 1.4], at the end.",
    }
    questions = [
        ("What colour is the disc?", ["red", "green", "blue"], "red", "text", None, None),
        ("How many discs are there?", [], "1", "integer", None, None),
        ("How wide is the disc?", [], "1.2", "float", 1.0, "cm"),
        ("Between which two years does it grow?", [], "[2007, 2008]", "list", None, None),
    ]
    tsv, hub = [], []
    for number, (question, choices, answer, answer_type, precision, unit) in enumerate(questions, start=1):
        query = f"Hint: {hints[answer_type]}\nQuestion: {question}" + (f" (Unit: {unit})" if unit else "")
        if choices:
            query += "\nChoices:\n" + "\n".join(f"({'ABC'[i]}) {text}" for i, text in enumerate(choices))
        image = picture(str(number))
        said = {"question_type": "multi_choice" if choices else "free_form", "answer_type": answer_type}
        facts = {
            "task": "figure question answering",
            "category": "general-vqa",
            "source": "made",
            "grade": "daily life",
        }
        tsv.append(
            {
                "index": number,
                "question": query,
                "image": image,
                "answer": answer,
                "choices": str(choices),
                "unit": unit,
            }
            | {"answer_option": "A" if choices else None, "precision": precision, "skills": "['arithmetic reasoning']"}
            | {**said, **facts}
        )
        hub.append(
            {"pid": str(number), "question": question, "image": f"images/{number}.jpg", "decoded_image": image}
            | {"choices": choices or None, "unit": unit, "precision": precision, "answer": answer, **said}
            | {"metadata": {**facts, "skills": ["arithmetic reasoning"], "language": "english"}, "query": query}
        )
    return tsv, hub


def _mathvision():
    questions = [
        ("How many discs can you find?\n<image1>", [], "1"),
        ("<image1>\nWhich one is the same as <image2>?", ["A", "B", "C", "D", "E"], "D"),
        ("What is the area of the disc?\n<image1>", [], "$\\frac{9\\pi}{4}$"),
    ]
    tsv, hub = [], []
    for number, (question, options, answer) in enumerate(questions, start=4):
        hint = (
            "provide the correct option letter, e.g., A, B, C, D, at the end."
            if options
            else "provide the final answer at the end."
        )
        lines = "\nChoices:\n" + "\n".join(f"({text}) {text}" for text in options) if options else ""
        image = picture(str(number), COLOURS[number % 6], "JPEG")
        query = f"Hint: Please answer the question and {hint}\nQuestion: {question}{lines}"
        tsv.append(
            {"index": number, "question": query, "image": image, "answer": answer, "choices": str(options)}
            | {"category": "counting", "level": 1}
        )
        hub.append(
            {"id": str(number), "question": question, "options": options, "image": f"images/{number}.jpg"}
            | {"decoded_image": image, "answer": answer, "solution": None, "level": 1, "subject": "counting"}
        )
    return tsv, hub


def _mathverse():
    questions = [
        ("As shown in the figure, angle 2 is equal to ()\nChoices:\nA:50°\nB:60°\nC:65°\nD:90°", "multi-choice", "C"),
        ("Find the domain of f in interval notation.", "free-form", "(-3, 3]"),
    ]
    tsv, hub = [], []
    for number, (asked, question_type, answer) in enumerate(questions, start=1):
        how = (
            "provide the correct option letter, e.g., A, B, C, D"
            if question_type == "multi-choice"
            else "provide the value"
        )
        query = f"Please directly answer the question and {how}."
        facts = {"split": "testmini", "source": "made", "subject": "Plane Geometry", "subfield": "Angle"}
        row = {"problem_index": str(number), "problem_version": "Vision Only", "answer": answer}
        row |= {"question_type": question_type, "question_for_eval": asked, "query_wo": query}
        image = picture(f"Q{number}")
        tsv.append(
            {
                "index": number,
                "sample_index": str(5 * number),
                "question": query,
                "image": image,
                "metadata": str(facts),
            }
            | row
        )
        hub.append({"sample_index": str(5 * number), "question": "", "image": image, "metadata": facts} | row)
        # The other versions of the problem are in the hub's table too.
        other = {"sample_index": str(5 * number - 1), "problem_version": "Text Dominant", "question": asked}
        hub.append(hub[-1] | other | {"query_wo": f"{query}\nQuestion: {asked}"})
    return tsv, hub


def _mmmu():
    one, two, three = (picture(str(number), COLOURS[number]) for number in range(3))
    questions = [
        ("validation_Art_1", "What is drawn in <image 1>?", ["a disc", "a square", "a star", "None"], "A", [one]),
        ("validation_Art_2", "Which is green?", ["<image 1>", "<image 2>", "<image 3>"], "B", [one, two, three]),
        (
            "validation_Math_Basics_3",
            "<image 1> Give the share of the disc. See <image 1> again.",
            [],
            "['1/4', '0.25']",
            [two],
        ),
    ]
    tsv, hub = [], []
    for number, (name, question, options, answer, images) in enumerate(questions, start=1):
        field = name.removeprefix("validation_").rpartition("_")[0]
        letters = {letter: text for letter, text in zip("ABCD", [*options, *[None] * 4], strict=False)}
        tsv.append(
            {"index": number, "id": name, "question": question, "image": images if len(images) > 1 else images[0]}
            | {**letters, "answer": answer, "category": field, "l2-category": "Art & Design", "split": "validation"}
        )
        hub.append(
            {"id": name, "question": question, "options": str(options), "explanation": ""}
            | {f"image_{n + 1}": images[n] if n < len(images) else None for n in range(7)}
            | {"img_type": "['Diagrams']", "answer": answer, "topic_difficulty": "Easy", "subfield": "Drawing"}
            | {"question_type": "multiple-choice" if options else "open"}
        )
    # The file has the development split's questions too.
    tsv.insert(1, tsv[0] | {"index": 4, "id": "dev_Art_1", "split": "dev"})
    return tsv, hub


def _mmmu_pro():
    tsv, hub = [], []
    for number, city in enumerate(("Oslo", "Seoul"), start=1):
        name, image = f"test_Geography_{number}", picture(city, COLOURS[number])
        question, answer = f"Which city does <image 1> show, number {number}?", "ABCDEFGHIJ"[TEN.index(city)]
        tsv.append(
            {"index": number, "id": name, "question": question, "image": image}
            | dict(zip("ABCDEFGHIJ", TEN, strict=True))
            | {"answer": answer, "category": "Geography"}
        )
        hub.append(
            {"id": name, "question": question, "options": str(list(TEN)), "explanation": ""}
            | {f"image_{n}": image if n == 1 else None for n in range(1, 8)}
            | {"img_type": "['Maps']", "answer": answer, "topic_difficulty": "Easy", "subject": "Geography"}
        )
    return tsv, hub


def _mmmu_pro_vision():
    tsv, hub = _mmmu_pro()
    drawn = [picture(f"{row['id'][-1]}? A-J", "black") for row in tsv]
    tsv = [row | {"question": "placeholder", "image": image} for row, image in zip(tsv, drawn, strict=True)]
    kept = ("id", "options", "answer", "subject")
    return tsv, [{k: row[k] for k in kept} | {"image": image} for row, image in zip(hub, drawn, strict=True)]


def _mmstar():
    questions = [
        ("What colour is the disc?", ["red", "a shade of green, or blue", "NA", "None"], "A", "coarse perception"),
        ("Which figure comes next?", ["one", "two"], "B", "logical reasoning"),
    ]
    tsv, hub = [], []
    for number, (question, options, answer, category) in enumerate(questions):
        image = picture(str(number), "red", "JPEG")
        row = {"index": number, "answer": answer, "category": category, "l2_category": "object counting"}
        letters = {letter: text for letter, text in zip("ABCD", [*options, None, None], strict=False)}
        inline = ", ".join(f"{letter}: {text}" for letter, text in letters.items() if text)
        tsv.append(row | {"question": question, "image": image, **letters, "bench": "Made"})
        facts = {"source": "Made", "split": "val", "image_path": f"{number}.jpg"}
        hub.append(row | {"question": f"{question}\nOptions: {inline}", "image": image, "meta_info": facts})
    return tsv, hub


def _hallusionbench():
    tsv, hub = [], []
    images = {0: picture("0"), 1: picture("1", "green")}
    rows = [("VD", "illusion", 0, "Is the disc red?", "1"), ("VD", "illusion", 1, "Is the disc red?", "0")]
    rows += [
        ("VS", "chart", None, "Is gold rarer than iron?", "1"),
        ("VS", "chart", 1, "Is gold rarer than iron?", "1"),
    ]
    for category, subcategory, figure, question, truth in rows:
        index = f"HallusionBench_{category}_{subcategory}_0_{figure or 0}_0"
        cell = images[figure] if figure is not None else None
        tsv.append(
            {"index": index, "question": question, "image": cell, "answer": "Yes" if truth == "1" else "No"}
            | {"category": category, "l2-category": subcategory}
        )
        hub.append(
            {"category": category, "subcategory": subcategory, "visual_input": "0" if figure is None else "1"}
            | {"set_id": "0", "figure_id": str(figure or 0), "sample_note": "disc", "question_id": "0"}
            | {"question": question, "gt_answer_details": question, "gt_answer": truth, "filename": None, "image": cell}
        )
    tsv[-1]["image"] = tsv[1]["index"]  # an image that another row has
    return tsv, [row for row in hub if row["image"] is not None]


_SHARD = "00000-of-00001.parquet"
BENCHMARKS = {
    "mathvista": [("MathVista_MINI.tsv", f"MathVista/data/testmini-{_SHARD}", _mathvista)],
    "mathvision": [("MathVision.tsv", f"MathVision/data/test-{_SHARD}", _mathvision)],
    "mathverse_vo": [("MathVerse_MINI_Vision_Only.tsv", "MathVerse/testmini.parquet", _mathverse)],
    "mmmu_val": [("MMMU_DEV_VAL.tsv", f"MMMU/data/validation-{_SHARD}", _mmmu)],
    "mmmu_pro": [
        ("MMMU_Pro_10c.tsv", f"MMMU_Pro/standard (10 options)/test-{_SHARD}", _mmmu_pro),
        ("MMMU_Pro_V.tsv", f"MMMU_Pro/vision/test-{_SHARD}", _mmmu_pro_vision),
    ],
    "mmstar": [("MMStar.tsv", "MMStar/mmstar.parquet", _mmstar)],
    "hallusionbench": [("HallusionBench.tsv", f"HallusionBench/data/image-{_SHARD}", _hallusionbench)],
}
