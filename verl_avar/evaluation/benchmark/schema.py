"""What travels between the parts: questions of a benchmark, and results of a model on them."""

from __future__ import annotations

import pyarrow as pa

from verl_avar.data.schema import IMAGES

# How an answer is judged: a letter of `choices`; a number, with tolerance; LaTeX by value; text; yes or no.
ANSWER_TYPES = ("choice", "number", "latex", "text", "yes_no")
# The question as it is, and controls: without images, with grey ones, with another question's, with a part blacked out.
PLAIN = "plain"
CONTROLS = ("no_image", "grey_image", "other_image", "blackout")

QUESTIONS = pa.schema(
    [
        ("benchmark", pa.string()),  # name of its definition
        ("id", pa.string()),  # unique in its benchmark
        ("question", pa.string()),  # without options and instructions; with <image> for each image, in order
        ("choices", pa.list_(pa.string())),  # texts of A, B, …; empty for open questions
        ("answer", pa.string()),  # letter where there are choices
        ("answer_type", pa.string()),
        ("images", IMAGES),  # may be empty where the benchmark has questions without one
        # JSON object of what metrics and tables group by: category, subset, set_id, figure_id, precision, unit, …
        ("meta", pa.string()),
    ]
)

RESULTS = pa.schema(
    [
        ("benchmark", pa.string()),
        ("id", pa.string()),
        ("condition", pa.string()),  # PLAIN, a control, "blackout=0.25" or "visual_bias=0.14"
        ("repeat", pa.int32()),  # 0, 1, …: of sampled answers
        ("meta", pa.string()),
        ("prompt", pa.string()),  # JSON of the messages as they were sent, images as <image>
        ("answer", pa.string()),  # the right one
        ("answer_type", pa.string()),
        ("response", pa.string()),  # all that the model wrote; null where no answer came
        ("extracted", pa.string()),  # the answer that was read in it; null: none
        ("right", pa.bool_()),  # null only where there is no response
        (
            "problem",
            pa.string(),
        ),  # truncated, format, no_answer, several_answers, contradiction, judge_…, failed; or null
        ("scored_by", pa.string()),  # "rules", or the judge's model
        ("finish", pa.string()),  # the API's finish_reason
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        # Of the response, from the visual-attention connector; null where the server has none.
        ("visual_mass", pa.float32()),
        ("system_mass", pa.float32()),
        ("visual_ratio", pa.float32()),  # VARS: mean over tokens of visual over system mass
        ("visual_share", pa.float32()),  # mean of visual / (visual + system)
        ("vas", pa.float32()),
        ("attention_tokens", pa.list_(pa.float32())),  # visual_ratio token by token, where it was asked for
        ("seconds", pa.float32()),
    ]
)
