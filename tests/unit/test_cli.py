"""The command line: what it offers, how light it is, what it returns."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from test_report import make_results

from verl_avar import cli


def test_the_avar_command_is_this_module():
    (point,) = entry_points(group="console_scripts", name="avar")
    assert point.load() is cli.main


@pytest.mark.parametrize(("arguments", "engines"), [(["doctor"], True), (["doctor", "--no-engines"], False)])
def test_doctor_passes_its_option_and_its_status_on(monkeypatch, arguments, engines):
    asked = []
    monkeypatch.setattr("verl_avar.doctor.run", lambda engines: asked.append(engines) or 1)
    assert cli.main(arguments) == 1
    assert asked == [engines]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["doctor", "--nonsense"]])
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: avar" in capsys.readouterr().err


def test_report_prints_the_table_of_a_run(tmp_path, capsys):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text(json.dumps(make_results()))
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "cold start" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "named"), [(None, "no file"), ("{", "is not JSON"), ("{}", "no 'stages'")])
def test_report_of_no_run_is_one_line(tmp_path, capsys, content, named):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["report", str(path)]) == 1
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_help_loads_no_heavy_library():
    code = "import sys; from verl_avar import cli\ntry: cli.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "doctor" in out
    assert not {"torch", "vllm", "ray", "verl", "transformers", "matplotlib"} & set(out.split())
