"""Whole anchored chains under the default settings."""

import pytest
from synthesis_chains import BAD, GOOD

from verl_avar.synthesis.checks import Context
from verl_avar.synthesis.checks.settings import AnchorChecks, TextChecks
from verl_avar.synthesis.checks.stages import check, find_anchors


@pytest.mark.parametrize("name", GOOD)
def test_good_chains_pass_the_default_checks(name):
    context, text = GOOD[name]
    assert check("anchor", text, "stop", context, AnchorChecks()) is None
    assert check("reason", text, "stop", context, TextChecks()) is None


@pytest.mark.parametrize("name", BAD)
def test_bad_chains_fail_with_their_reason(name):
    reason, context, text = BAD[name]
    problem = check("anchor", text, "stop", context, AnchorChecks())
    assert problem is not None and problem.reason == reason, problem


def test_there_are_as_many_of_each_as_promised():
    assert len(GOOD) == len(BAD) == 20


def test_looks_of_a_chain_worked_by_hand():
    anchors = find_anchors(GOOD["triangle"][1])
    assert [a.text.split(",")[0] for a in anchors] == [
        "Okay",
        "Looking at the triangle again",
    ]
    assert anchors[0].text.endswith("the triangle is isosceles with AB = AC.")
    assert anchors[0].position == 0 and 0.5 < anchors[1].position < 0.8


@pytest.mark.parametrize("name", GOOD)
def test_descriptions_pass_the_default_checks(name):
    context, _ = GOOD[name]
    assert check("describe", context.description, "stop", context, TextChecks()) is None


def test_a_chinese_chain_and_its_leak():
    context = Context(
        "十字是什么颜色？", "蓝色", description="左上角有一个红色圆形，正中间有一个蓝色十字。", chain=None
    )
    thoughts = (
        "先看图，左上角是一个红色圆形。题目问的是十字的颜色，所以需要找到十字的位置，再判断它的颜色，不能与圆形混淆。"
        "让我再看一下图像，正中间的十字是蓝色的，因此答案是蓝色。"
    )
    settings = AnchorChecks(scripts=["han"])
    assert check("anchor", f"<think>{thoughts}</think><answer>蓝色</answer>", "stop", context, settings) is None
    leak = thoughts.replace("先看图", "根据描述")
    assert check("anchor", f"<think>{leak}</think><answer>蓝色</answer>", "stop", context, settings).reason == "leak"
    assert check(
        "anchor", f"<think>{thoughts}</think><answer>蓝色</answer>", "stop", context, AnchorChecks()
    ).reason == ("language")
