"""A task of lmms-eval over a Parquet file of questions. It is copied beside the task's yaml, where lmms-eval loads it.

It runs in the harness's environment: nothing of verl_avar can be imported here. Answers are judged by lmms-eval's own
rules: choices by its `extract_mcq_answer`, yes or no as its task mme does, all others by the rules of its mathvision.
"""

import io
import json
import string

IMAGE = "<image>"


def doc_to_visual(doc):
    """The images of a question, as PIL images."""
    from PIL import Image

    return [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in doc["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """The question and its options, unless these are drawn in the image, with a placeholder for each image."""
    drawn = json.loads(doc["meta"] or "{}").get("options_in_image")
    options = zip(string.ascii_uppercase, () if drawn else doc["choices"], strict=False)
    return "\n".join([doc["question"], *(f"{letter}. {text}" for letter, text in options)])


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    """One user turn, the images where their placeholders are; those that have none come first."""
    images, text = doc_to_visual(doc), doc_to_text(doc)
    missing = max(0, len(images) - text.count(IMAGE))
    parts = (IMAGE * missing + text).split(IMAGE)
    content = []
    for number, part in enumerate(parts):
        if number:
            content.append({"type": "image", "url": images[number - 1]})
        if part.strip():
            content.append({"type": "text", "text": part.strip("\n")})
    return [{"role": "user", "content": content}]


def process_results(doc, results):
    """{"accuracy": 1.0 or 0.0} of one answer."""
    return {"accuracy": float(verdict(doc, results[0]))}


def verdict(doc, response):
    """Whether lmms-eval's rules find the right answer in a response."""
    kind, answer = doc["answer_type"], doc["answer"]
    if kind == "choice":
        from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

        letters = list(string.ascii_uppercase[: len(doc["choices"])])
        return extract_mcq_answer(response, choices=letters) == answer
    if kind == "yes_no":
        from lmms_eval.tasks.mme.utils import parse_pred_ans

        return parse_pred_ans(response) == answer.strip().lower()
    from lmms_eval.tasks.mathvision.utils import mathvision_process_results

    scores = mathvision_process_results({"answer": answer, "options": []}, [response])
    return bool(scores["mathvision_standard_eval"]["scores"][0])
