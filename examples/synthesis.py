"""Cold-start data by `avar synth run`, from an endpoint that fails now and then:

    python examples/synthesis.py [FOLDER]

The endpoint is the exact teacher of the miniature's scenes, which is no language model but rules. It answers over HTTP
as any OpenAI-compatible server does, and is told to err: requests that fail, wrong answers, refusals, and chains that
still speak of a description. With the same FOLDER again, only what has no answer yet is asked.
"""

import os
import sys
import tempfile
from pathlib import Path

from verl_avar.cli import main
from verl_avar.miniature.data import write_questions
from verl_avar.miniature.teacher_server import Teacher

FAULTS = {"rate_limit": 0.03, "server_error": 0.03, "cut": 0.03, "wrong_answer": 0.08, "leak": 0.05, "refusal": 0.02}
CONFIG = os.path.relpath(Path(__file__).parents[1] / "recipes" / "synthesis" / "miniature.yaml")

if __name__ == "__main__":  # math-verify, which compares answers, starts a process
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="vard_"))
    questions = folder / "questions.parquet"
    if not questions.exists():
        write_questions(questions, 200, seed=0)
    with Teacher(faults=FAULTS) as teacher:
        given = [f"out={folder / 'vard'}", f"sources=[{{path: '{questions}'}}]"]
        status = main(["synth", "run", CONFIG, *given, f"endpoints.teacher.base_url={teacher.url}"])
    print(f"\nTo look at samples, open {folder / 'vard' / 'viewer' / 'index.html'} in a browser.")
    sys.exit(status)
