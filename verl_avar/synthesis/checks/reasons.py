"""Why rows and texts are not kept: every code, in words."""

from __future__ import annotations

INTAKE_REASONS: dict[str, str] = {
    "bad_row": "the source's row lacks what a row needs, or holds it in another form",
    "no_image": "no image, or another number of images than the question has places for",
    "bad_image": "an image that cannot be read",
    "no_question": "the question is empty",
    "no_answer": "the answer is empty, so nothing can be verified against it",
    "duplicate": "the same question, answer, choices and image files as an earlier row",
    "near_duplicate": "nearly the same question and image as an earlier row, with the same answer",
    "benchmark_overlap": "the question stands in an evaluation benchmark",
}
STAGE_REASONS: dict[str, str] = {  # for which a stage can be asked again
    # calls
    "call_failed": "no attempt got an answer from the endpoint",
    "bad_request": "the endpoint refused the request as it was made",
    # texts of all stages
    "truncated": "the model ran into its token limit",
    "empty": "the model wrote nothing",
    "refusal": "the model declined, apologised or saw no image, or a content filter stopped it",
    "language": "too many letters of other writing systems than those wanted",
    "too_short": "fewer words than wanted",
    "too_long": "more words than wanted",
    "repetition": "the same runs of words over and over, or a loop at the end",
    # reason and anchor
    "format": "not exactly <think>…</think><answer>…</answer>",
    "wrong_answer": "the final answer is not the row's",
    # anchor
    "leak": "speaks of a description, caption or text in place of the image, or of not seeing the image",
    "no_anchors": "no look at the image",
    "few_anchors": "fewer looks at the image than wanted",
    "bunched_anchors": "the looks at the image stand close together, not spread over the chain",
    "ungrounded_anchors": "too few of the looks name something that the description names",
    "length_ratio": "much longer or shorter than the chain that it was made from",
}
REASONS = (
    INTAKE_REASONS
    | STAGE_REASONS
    | {
        "attention_low": "the student looks at the image less over this chain than over those kept",
    }
)
