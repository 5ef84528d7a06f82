"""`avar vas` from a checkpoint and rows to numbers, files and exit status, on the shipped miniature."""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from verl_avar.attention.hf import set_attention
from verl_avar.cli import main
from verl_avar.evaluation.answer import answer, answer_masses, given
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.evaluation.measure import measure
from verl_avar.evaluation.partial import begun
from verl_avar.evaluation.rows import read_rows
from verl_avar.evaluation.vas_run import check_model
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval
from verl_avar.roles import Role, query_mask
from verl_avar.vas import EPS, Vas


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_eval(tmp_path_factory.mktemp("rows") / "eval.parquet", 2, seed=3)


@pytest.fixture(scope="module")
def rows(data):
    return read_rows(data)


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(base_path())


@pytest.fixture(scope="module")
def answers(checkpoint, rows):
    return answer(checkpoint, [r.messages for r in rows[:3]], [r.images for r in rows[:3]], max_new_tokens=10)


@pytest.fixture(scope="module")
def maps(checkpoint, answers):
    """Eager attention maps [L, B, H, T, T], the oracle."""
    set_attention(checkpoint.model, "avar_eager")
    with torch.no_grad():
        found = torch.stack(checkpoint.model(**answers.inputs, output_attentions=True).attentions)
    set_attention(checkpoint.model, "avar_sdpa")
    return found


def avar_vas(*arguments) -> int:
    return main(["vas", "--model", str(base_path()), "--max-new-tokens", "8", *map(str, arguments)])


def test_every_figure_of_a_sample_equals_the_full_map(checkpoint, answers, maps):
    border = np.array([True] * 4 + [False] + [True] * 4)  # of 3 × 3 cells
    results = measure(checkpoint, answers, sink_share=0.05, borders=[border] * 3, follow=[1])
    layers = maps.shape[0]
    for b, result in enumerate(results):
        roles = answers.roles[b]
        visual = roles == Role.VISUAL
        for record in result.scopes:
            asked = query_mask(answers.roles[b : b + 1], record["scope"])[0]
            rows = maps[:, b, :, asked].double()
            mass = {r: rows[..., roles == r].sum(-1) for r in (Role.VISUAL, Role.SYSTEM, Role.USER, Role.RESPONSE)}
            ratio = mass[Role.VISUAL] / (mass[Role.SYSTEM] + EPS)
            assert record["vas"] == pytest.approx(ratio.mean(-1).flatten().tolist(), rel=1e-4)
            for name, role in (("visual", Role.VISUAL), ("user", Role.USER), ("response", Role.RESPONSE)):
                assert record[name] == pytest.approx(mass[role].mean(-1).flatten().tolist(), abs=1e-5)
            inner = rows[..., visual][..., torch.from_numpy(~border)].sum(-1)
            assert record["border_free_vas"] == pytest.approx(
                float((inner / (mass[Role.SYSTEM] + EPS)).mean()), rel=1e-4
            )
            assert record["border_free_head_mean"] == pytest.approx(
                float((inner.mean(1) / (mass[Role.SYSTEM].mean(1) + EPS)).mean()), rel=1e-4
            )
            assert record["border_share"] == pytest.approx(1 - float(inner.sum() / mass[Role.VISUAL].sum()), rel=1e-4)
    asked = query_mask(answers.roles[1:2], "response")[0]
    steps = maps[:, 1][:, :, asked][..., answers.roles[1] == Role.VISUAL].mean((0, 1))
    np.testing.assert_allclose(results[1].steps, steps.numpy(), atol=1e-5)
    assert results[0].steps is None and layers == len(results[0].layers)


def test_the_summary_is_the_vas_of_the_library(tmp_path, checkpoint, rows, data, capsys):
    assert avar_vas("--data", data, "--out", tmp_path / "out", "--batch-size", 3, "--pictures", 2) == 0
    result = json.loads((tmp_path / "out/vas.json").read_text())
    table = capsys.readouterr().out
    vas = {scope: Vas(scope) for scope in ("user", "response")}
    for row in rows:
        one = answer(checkpoint, [row.messages], [row.images], max_new_tokens=8)
        record = answer_masses(checkpoint, one)
        for each in vas.values():
            each.add(record.mass(Role.VISUAL), record.mass(Role.SYSTEM), one.roles)
    for scope, expected in vas.items():
        found, summary = result["scopes"][scope], expected.summary()
        assert found["vas"] == pytest.approx(summary["paper"], rel=1e-3)
        assert found["head_mean"] == pytest.approx(summary["head_mean"], rel=1e-4)
        assert found["median"] == pytest.approx(summary["median"], rel=1e-4)
        assert found["mass"]["visual"] == pytest.approx(summary["mass"]["visual"], rel=1e-4)
        low, high = found["head_mean_interval"]
        assert low <= found["head_mean"] <= high
        assert (found["samples"], found["skipped"], found["queries"]) == (len(rows), 0, summary["queries"])
    assert result["scopes"]["user"]["class"] in ("narrow", "wide", "panoramic")
    assert result["samples"] == len(rows) and not result["failed"]
    heads = pd.read_parquet(tmp_path / "out/vas.parquet")
    assert len(heads) == len(rows) * 2 * len(result["layers"]) * result["heads"]
    assert {"id", "scope", "layer", "head", "queries", "vas", "visual_mass", "system_mass"} <= set(heads)
    assert (tmp_path / "out/index.html").stat().st_size > 10_000 and "VAS" in table
    assert len(list((tmp_path / "out/figures").glob("*.png"))) >= 4


def test_given_responses_measure_as_generated_ones(checkpoint, rows):
    row = rows[0]
    own = answer(checkpoint, [row.messages], [row.images], max_new_tokens=30)
    (text,) = own.texts
    told = given(checkpoint, [row.messages], [row.images], [text])
    assert told.texts == own.texts
    n = told.inputs["input_ids"].shape[1]
    if own.inputs["input_ids"].shape[1] == n:  # ended by itself, with its end marker
        assert torch.equal(told.inputs["input_ids"], own.inputs["input_ids"]) and torch.equal(told.roles, own.roles)
    else:
        assert torch.equal(told.inputs["input_ids"][:, : n - 1], own.inputs["input_ids"])


def test_a_rerun_measures_only_what_is_missing(tmp_path, data, monkeypatch):
    out = tmp_path / "out"
    assert avar_vas("--data", data, "--out", out, "--max-samples", 3, "--batch-size", 2) == 0
    before = {p.name: p.stat().st_mtime_ns for p in (out / "parts").iterdir()}
    assert sorted(before) == ["00000000.parquet", "00000002.parquet"]
    assert avar_vas("--data", data, "--out", out) == 0
    after = {p.name: p.stat().st_mtime_ns for p in (out / "parts").iterdir()}
    assert all(after[name] == time for name, time in before.items()) and len(after) == 2 + 5
    whole = json.loads((out / "vas.json").read_text())
    assert avar_vas("--data", data, "--out", tmp_path / "fresh") == 0
    fresh = json.loads((tmp_path / "fresh/vas.json").read_text())
    assert avar_vas("--data", data, "--out", out) == 0
    assert json.loads((out / "vas.json").read_text())["seconds"] == whole["seconds"] > 0  # of measuring, then and now
    assert whole["scopes"]["response"]["head_mean"] == pytest.approx(fresh["scopes"]["response"]["head_mean"], rel=1e-4)


def test_other_settings_do_not_mix_with_what_is_there(tmp_path, data, capsys):
    out = tmp_path / "out"
    assert avar_vas("--data", data, "--out", out, "--max-samples", 1, "--scope", "user") == 0
    assert avar_vas("--data", data, "--out", out, "--max-samples", 1, "--layers", "0") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "layers: None there, [0] asked for" in line and "scope: user there, both asked for" in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("…")
    assert avar_vas("--data", data, "--out", tmp_path / "mine") == 2
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["thesis.tex"]


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_bad_rows_are_named_and_counted_and_take_no_other_with_them(tmp_path, capsys):
    fine = png(Image.new("RGB", (84, 84), "red"))
    user = "<image>What colour?"
    frame = pd.DataFrame(
        {
            "id": ["fine", "broken", "tiny", "text", "long", "marker", "rgba"],
            "question": [user, user, user, "no image", "<image>" + "what colour " * 400, user + "<|image_pad|>", user],
            "images": [
                [fine],
                [fine[:50]],
                [png(Image.new("RGB", (1, 1)))],
                [],
                [fine],
                [fine],
                [png(Image.new("RGBA", (90, 60), (0, 0, 0, 0)))],
            ],
        }
    )
    frame.to_parquet(tmp_path / "rows.parquet")
    out = tmp_path / "out"
    assert avar_vas("--data", tmp_path / "rows.parquet", "--out", out, "--batch-size", 4, "--system", "Look.") == 0
    result = json.loads((out / "vas.json").read_text())
    failed = {f["row"]: f["reason"] for f in result["failed"]}
    assert {"broken", "long", "marker"} <= set(failed) <= {"broken", "long", "marker", "tiny"}
    assert "context" in failed["long"] and "\n" not in "".join(failed.values())
    assert [s["row"] for s in result["skipped"]] == ["text"]
    assert result["samples"] == 7 - len(failed) - 1
    assert avar_vas("--data", tmp_path / "rows.parquet", "--out", tmp_path / "strict", "--strict") == 2
    assert "row broken" in capsys.readouterr().err


def test_where_no_row_can_be_measured_the_first_reason_is_told_with_its_row(tmp_path, capsys):
    lines = [{"id": "text", "question": "?"}, {"id": "broken", "question": "?", "image": "no.png"}]
    Image.new("RGB", (84, 84)).save(tmp_path / "a.png")
    lines.append({"id": "fine", "question": "What colour?", "image": "a.png"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    options = ["--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "--scope", "user"]
    for more, status in ((["--max-samples", 2], 2), ([], 0), (["--max-samples", 2], 2)):
        capsys.readouterr()
        assert avar_vas(*options, *more) == status
        said = "none of 2 rows could be measured; row broken: "
        assert (said in capsys.readouterr().err) == (status == 2)


def test_without_a_system_turn_there_are_masses_but_no_vas(tmp_path):
    """The miniature's template writes a system turn of its own; this one does not."""
    model = tmp_path / "model"
    shutil.copytree(base_path(), model)
    image, marker = "'<|vision_start|><|image_pad|><|vision_end|>'", "'<|im_start|>'"
    part = f"{{{{ {image} if p.type == 'image' else p.text }}}}"
    turn = f"{{{{ {marker} + m.role }}}}\n{{% for p in m.content %}}{part}{{% endfor %}}<|im_end|>\n"
    start = f"{{% if add_generation_prompt %}}{{{{ {marker} }}}}assistant\n{{% endif %}}"
    (model / "chat_template.jinja").write_text(f"{{% for m in messages %}}{turn}{{% endfor %}}{start}")
    Image.new("RGB", (84, 84), "red").save(tmp_path / "a.png")
    options = ["--data", str(tmp_path), "--question", "What colour?", "--max-new-tokens", "8"]
    assert main(["vas", "--model", str(model), "--out", str(tmp_path / "out"), *options]) == 0
    result = json.loads((tmp_path / "out/vas.json").read_text())
    scope = result["scopes"]["user"]
    assert scope["vas"] is None and scope["class"] is None and 0 < scope["mass"]["visual"] < 1
    assert (scope["samples"], scope["skipped"]) == (0, 1)
    assert any("--system" in note for note in result["notes"])


def test_what_cannot_be_measured_is_one_line_and_status_2(tmp_path, data, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(LlamaConfig(**tiny)).save_pretrained(tmp_path / "llama")
    for model, source, words in (
        (tmp_path / "llama", data, "no vision-language model for LlamaConfig"),
        (tmp_path / "nowhere", data, "nowhere"),
        (base_path(), tmp_path / "none.jsonl", "no such file"),
    ):
        assert main(["vas", "--model", str(model), "--data", str(source), "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err.strip().splitlines()
        assert err[-1].startswith("avar vas: ") and words in err[-1]
        assert not (tmp_path / "out").exists()


def test_a_model_whose_attention_cannot_be_probed_is_refused_by_name(tmp_path, data, capsys):
    from transformers import GitConfig, GitForCausalLM

    shutil.copytree(base_path(), tmp_path / "git")  # for its processor
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (tmp_path / "git" / name).unlink()
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = GitConfig(vision_config=size | dict(image_size=28, patch_size=14), vocab_size=300, **size)
    config.image_token_id = 5
    GitForCausalLM(config).save_pretrained(tmp_path / "git")
    assert main(["vas", "--model", str(tmp_path / "git"), "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert "attention of GitForCausalLM can't be exchanged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_reports_no_masses_is_refused(checkpoint):
    checkpoint.model.set_attn_implementation("sdpa")
    try:
        with pytest.raises(RuntimeError, match="no attention layer reported a mass"):
            check_model(checkpoint)
    finally:
        set_attention(checkpoint.model, "avar_sdpa")


def test_a_layer_that_the_model_lacks_is_an_error(tmp_path, data, capsys):
    assert avar_vas("--data", data, "--out", tmp_path / "out", "--layers", "0,77") == 2
    assert "--layers 77: the attention layers of Qwen2_5" in (err := capsys.readouterr().err) and "are 0, 1, 2" in err
    assert not (tmp_path / "out").exists()


def test_the_samples_table_holds_the_texts_of_questions_and_responses(tmp_path, data):
    out = tmp_path / "out"
    assert avar_vas("--data", data, "--out", out, "--max-samples", 2) == 0
    samples = pd.read_parquet(out / "samples.parquet")
    assert samples["number"].tolist() == [0, 1] and samples["question"].str.contains("[a-z]{3}").all()
    assert samples["response"].map(lambda text: isinstance(text, str) and len(text) > 0).all()


def test_a_run_that_measured_nothing_does_not_hold_its_folder(tmp_path, data):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text(json.dumps({"question": "What?", "image": "a.png"}))
    assert avar_vas("--data", source, "--out", out) == 2
    Image.new("RGB", (84, 84), "red").save(tmp_path / "a.png")
    source.write_text(json.dumps({"question": "What is it?", "image": "a.png"}))
    assert avar_vas("--data", source, "--out", out) == 0


def test_an_interrupted_run_says_that_it_goes_on(tmp_path, data, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("verl_avar.evaluation.vas_run.measure_rows", interrupted)
    assert avar_vas("--data", data, "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err.strip() == "avar vas: interrupted; the same command goes on from here"


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    out = tmp_path / "out"
    with begun(out, {"a": 1}):
        (out / "result").touch()
        with pytest.raises(ValueError, match="another run is at work in "), begun(out, {"a": 1}):
            pass
    with begun(out, {"a": 1}):
        pass
    with pytest.raises(ValueError, match="a: 1 there, 2 asked for"), begun(out, {"a": 2}):
        pass
    assert json.loads((out / "run.json").read_text()) == {"a": 1}
