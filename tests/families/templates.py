"""Chat templates of the tiny checkpoints: each family's format, in as little as that takes."""

from __future__ import annotations


def say(text: str) -> str:
    """Jinja that writes this text and no space around it."""
    return "{{- '" + text.replace("\n", "\\n") + "' }}"


def parts(image: str, video: str = "", text: str = "part['text']") -> str:
    """Jinja that writes a message's content: a string, or a list of image, video and text parts in their order."""
    cases = "{%- if part['type'] == 'image' %}" + say(image)
    if video:
        cases += "{%- elif part['type'] == 'video' %}" + say(video)
    cases += "{%- elif part['type'] == 'text' %}{{- " + text + " }}{%- endif %}"
    return (
        "{%- if message['content'] is string %}{%- set content = [{'type': 'text', 'text': message['content']}] %}"
        "{%- else %}{%- set content = message['content'] %}{%- endif %}"
        "{%- for part in content %}" + cases + "{%- endfor %}"
    )


def prompt(start: str) -> str:
    """Jinja that opens the answer's turn where a generation prompt is asked for."""
    return "{%- if add_generation_prompt %}" + say(start) + "{%- endif %}"


def chatml(content: str, default_system: str = "", generation: str = "<|im_start|>assistant\n") -> str:
    """Turns from `<|im_start|>` and a name to `<|im_end|>`; a system turn of the template's own where one is given."""
    default = say(f"<|im_start|>system\n{default_system}<|im_end|>\n")
    return (
        ("{%- if messages[0]['role'] != 'system' %}" + default + "{%- endif %}" if default_system else "")
        + "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}"
        + content
        + "{{- '<|im_end|>\n' }}{%- endfor %}"
        + prompt(generation)
    )


QWEN_PARTS = parts("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
QWEN2_VL = chatml(QWEN_PARTS, default_system="You are a helpful assistant.")
QWEN3_VL = chatml(QWEN_PARTS)
QWEN3_5 = chatml(QWEN_PARTS, generation="<|im_start|>assistant\n<think>\n")
INTERNVL = chatml(parts("<IMG_CONTEXT>\n", "<video>\n"))

# A turn's name ends in a space here, the generation prompt's in a newline; images come first, and a line break between
# them and the text.
LLAVA_ONEVISION = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + ' ' }}"
    "{%- for part in message['content'] if part['type'] == 'image' %}{{- '<image>' }}{%- endfor %}"
    "{%- for part in message['content'] if part['type'] == 'video' %}{{- '<video>' }}{%- endfor %}"
    "{%- for part in message['content'] if part['type'] == 'text' %}{{- '\n' + part['text'] }}{%- endfor %}"
    "{{- '<|im_end|>' }}{%- endfor %}" + prompt("<|im_start|>assistant\n")
)

# The system text stands without a name, turns are words and not special tokens, and only a space ends them.
LLAVA = (
    "{%- for message in messages %}"
    "{%- if message['role'] != 'system' %}{{- message['role'] | upper + ': ' }}{%- endif %}"
    "{%- for part in message['content'] if part['type'] == 'image' %}{{- '<image>\n' }}{%- endfor %}"
    "{%- for part in message['content'] if part['type'] == 'text' %}{{- part['text'] + ' ' }}{%- endfor %}"
    "{%- endfor %}" + prompt("ASSISTANT:")
)

# No system turn: its text opens the first user turn.
GEMMA3 = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set first = messages[0]['content'] %}"
    "{%- if first is not string %}{%- set first = first[0]['text'] %}{%- endif %}"
    "{%- set lead = first + '\n\n' %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set lead = '' %}{%- set turns = messages %}{%- endif %}"
    "{%- for message in turns %}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{%- if loop.first %}{{- lead }}{%- endif %}"
    + parts("<start_of_image>", text="part['text'] | trim")
    + "{{- '<end_of_turn>\n' }}{%- endfor %}"
    + prompt("<start_of_turn>model\n")
)

MLLAMA = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    + parts("<|image|>", text="part['text'] | trim")
    + "{{- '<|eot_id|>' }}{%- endfor %}"
    + prompt("<|start_header_id|>assistant<|end_header_id|>\n\n")
)


def idefics(start: str) -> str:
    """One start token, then `Name: …<end_of_utterance>` lines; no space between the colon and an image."""
    return (
        "{{- '" + start + "' }}{%- for message in messages %}{{- message['role'] | capitalize }}"
        "{{- ':' if message['content'][0]['type'] == 'image' else ': ' }}"
        + parts("<image>", "<video>")
        + "{{- '<end_of_utterance>\n' }}{%- endfor %}"
        + prompt("Assistant:")
    )


SMOLVLM = idefics("<|im_start|>")
IDEFICS3 = idefics("<|begin_of_text|>")

# Meta's own refuses a system message beside an image, and writes a system turn of its own where there is no image.
MLLAMA_WITHOUT_SYSTEM = (
    "{%- set seen = namespace(image=false) %}{%- for message in messages if message['content'] is not string %}"
    "{%- for part in message['content'] if part['type'] == 'image' %}{%- set seen.image = true %}{%- endfor %}"
    "{%- endfor %}"
    "{%- if seen.image and messages[0]['role'] == 'system' %}{{- raise_exception('no system message, please') }}"
    "{%- endif %}{{- bos_token }}"
    "{%- if not seen.image and messages[0]['role'] != 'system' %}"
    + say("<|start_header_id|>system<|end_header_id|>\n\nToday is a day.<|eot_id|>")
    + "{%- endif %}"
    + MLLAMA.removeprefix("{{- bos_token }}")
)
