"""The page of samples: which rows it shows, that hostile text stays text, and that nothing is fetched or left out."""

import base64
import hashlib
import io
import random
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from PIL import Image
from synthesis_folder import EXPLAIN, HOSTILE, folder_rows, many_rows, write_folder

from verl_avar.report.sample_pages import LONGEST
from verl_avar.synthesis.samples import choose, divided, marks, shares
from verl_avar.synthesis.viewer import write_viewer


class Page(HTMLParser):
    """Elements with their attributes, and the text of each sample."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.samples, self.marked, self.inside = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.samples.append(dict(attrs) | {"text": ""})
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if self.samples and "section" in self.inside:
            self.samples[-1]["text"] += data
            if "mark" in self.inside:
                self.marked.append(data)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return write_viewer(write_folder(out), out, EXPLAIN).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_every_row_of_a_small_run_is_shown_with_its_reason(page):
    shown = Counter((sample["data-status"], sample["data-reason"], sample["data-source"]) for sample in page.samples)
    assert shown == Counter((one["status"], one["reason"] or "", one["source"]) for one, _, _ in folder_rows())
    (wrong,) = [sample["text"] for sample in page.samples if sample["data-reason"] == "wrong_answer"]
    assert "the answer is 5 cm, not 4 cm" in wrong and EXPLAIN["wrong_answer"] in wrong
    assert "Right answer: 4 cm" in wrong and "1,800 + 600 tokens" in wrong
    assert [page.samples[0]["data-status"], page.samples[-1]["data-status"]] == ["accepted", "pending"]


def test_hostile_text_is_shown_as_text(page, html):
    assert sum(HOSTILE in sample["text"] for sample in page.samples) == 3
    names = Counter(tag for tag, _ in page.elements)
    assert names["script"] == 1 and not {"iframe", "object", "link", "svg"} & set(names)
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    sources = [attrs["src"] for _, attrs in page.elements if "src" in attrs]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "http" not in re.sub(r"data:image/[^\"]*|Content-Security-Policy|http-equiv", "", html)


def test_the_policy_allows_the_pages_own_script_alone(page, html):
    (policy,) = [attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs]
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_without_scripts_all_samples_show_and_the_filter_does_not(page):
    assert not any("hidden" in sample for sample in page.samples)
    (form,) = [attrs for tag, attrs in page.elements if tag == "form"]
    assert form["id"] == "filter" and "hidden" in form


def test_anchors_are_marked_and_rejected_candidates_folded(page):
    assert Counter(page.marked)["再看图片"] == 1 and Counter(page.marked)["Let me check the image again"] == 4
    assert [tag for tag, _ in page.elements].count("details") == 1
    (several,) = [sample["text"] for sample in page.samples if "2 candidates not kept" in sample["text"]]
    assert "reason, candidate 1: wrong_answer – the answer is 1, not 3" in several


def test_large_images_are_shrunk_and_all_images_of_a_row_are_there(page):
    uris = [attrs["src"] for tag, attrs in page.elements if tag == "img"]
    assert len(uris) == 12  # eleven rows passed intake, one has two images
    sizes = []
    for uri in uris:
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            sizes.append(image.size)
    assert max(max(size) for size in sizes) == LONGEST and sizes.count((160, 120)) == 11


def test_samples_are_spread_over_groups_and_do_not_depend_on_the_rows_order(tmp_path):
    rows = many_rows(300)
    write_folder(tmp_path / "a", rows)
    chosen = choose(tmp_path / "a", 23, seed=4)
    groups = Counter((one["status"], one["reason"]) for one, _, _ in rows)
    assert len(groups) == 5 and len(chosen) == 23
    assert sorted(Counter(chosen.values()).values()) == [4, 4, 5, 5, 5]
    random.Random(0).shuffle(rows)
    write_folder(tmp_path / "b", rows)
    assert choose(tmp_path / "b", 23, seed=4) == chosen
    assert choose(tmp_path / "a", 23, seed=5) != chosen


def test_shares_are_as_even_as_the_groups_allow():
    assert shares([10, 1, 5], 9) == [4, 1, 4]
    assert shares([1, 2], 10) == [1, 2]
    assert shares([3, 3, 3], 2) == [1, 1, 0]
    assert shares([], 5) == []


def test_a_well_formed_chain_is_reasoning_and_answer():
    blocks = divided("<think>I look. So 3.</think>\n<answer>3</answer>", [{"text": "I look", "position": 0.0}])
    assert blocks == [("reasoning", [("anchor", "I look"), ("text", ". So 3.")]), ("answer", [("text", "3")])]


def test_tags_in_odd_places_are_shown_where_they_stand():
    assert divided("a</think><answer>b</think>") == [
        ("", [("text", "a"), ("tag", "</think>"), ("tag", "<answer>"), ("text", "b"), ("tag", "</think>")])
    ]  # fmt: skip
    assert divided("plain") == [("", [("text", "plain")])]
    assert divided("") == [("", [])]


def test_of_several_places_the_one_nearest_to_the_anchors_position_is_marked():
    text = "I look, then I look, then I look."
    places = [0, 13, 26]
    assert [text[at : at + 6] for at in places] == ["I look"] * 3
    for at in places:
        assert marks(text, [{"text": "I look", "position": at / len(text)}]) == [(at, at + 6)]
    twice = [{"text": "I look", "position": 0.8}, {"text": "I look", "position": 0.8}]
    assert marks(text, twice) == [(13, 19), (26, 32)]
    within = "Before. <think>I look. I  look.</think><answer>1</answer>"  # positions count inside <think>
    assert marks(within, [{"text": "I look", "position": 0.9}]) == [(23, 30)]
    assert marks(text, [{"text": "I peek", "position": 0.1}, {"text": "", "position": 0.1}]) == []


def test_the_pieces_of_a_text_are_the_text_whatever_is_marked():
    pick = random.Random(1)
    for _ in range(200):
        text = "".join(pick.choice(["ab", "<think>", "</think>", "<answer>", "</answer>", " "]) for _ in range(12))
        anchors = [{"text": pick.choice(["a", "ba", "b<think>a", "b a"]), "position": pick.random()} for _ in range(4)]
        blocks = divided(text, anchors)
        if len(blocks) == 1:
            assert "".join(piece for _, piece in blocks[0][1]) == text
