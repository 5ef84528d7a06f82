"""What a Ray cluster has, asked by a process of its own: joining one changes the process that does it."""

from __future__ import annotations

import json
import subprocess
import sys

from settings import SettingsError

WAIT_S = 60
ASK = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
print(json.dumps([node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]))
"""


def gpus_of_nodes(address: str) -> list[float]:
    """GPUs of every node that is alive, the most first. Raises SettingsError where the cluster does not answer."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", ASK, address], capture_output=True, text=True, timeout=WAIT_S, check=True
        )
    except subprocess.TimeoutExpired:
        why = f"no answer in {WAIT_S} s"
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or ["no word why"])[-1]
    else:
        return sorted(json.loads(answer.stdout.strip().splitlines()[-1]), reverse=True)
    raise SettingsError(
        f"no Ray cluster answers at {address} ({why[:200]}); `ray status` on its head node shows whether it runs, "
        "ray_address or RAY_ADDRESS names it"
    )
