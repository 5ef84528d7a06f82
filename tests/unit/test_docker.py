"""The images and the cluster examples as far as they can be checked without a Docker daemon or a Kubernetes cluster."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import setuptools
import yaml
from conftest import ROOT
from packaging.specifiers import SpecifierSet
from setuptools.command.egg_info import FileList

DOCKER = ROOT / "docker"
MODES = ("cpu", "gpu")
SECRET = re.compile(r"token|secret|password|passwd|credential|api_?key", re.IGNORECASE)
RECIPE = "cd /opt/verl_avar && exec bash recipes/avar_qwen25vl_7b.sh nodes=2"


@pytest.fixture
def packaging(monkeypatch):
    """The names of setup.py, and as SETUP the arguments that setup() was called with."""
    call = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: call.update(kwargs))
    return runpy.run_path(str(ROOT / "setup.py")) | {"SETUP": call}


def instructions(mode: str) -> list[tuple[str, str]]:
    """(instruction, its arguments in one line) of a Dockerfile, comments left out."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (DOCKER / f"Dockerfile.{mode}").read_text())
    joined = text.replace("\\\n", " ").splitlines()
    return [tuple(re.sub(r"\s+", " ", line).strip().split(" ", 1)) for line in joined if line.strip()]


def values(mode: str, instruction: str) -> dict[str, str]:
    """What the ARG, ENV or LABEL lines of a Dockerfile set; the first wins, as the default of an ARG declared twice."""
    found = {}
    for name, rest in instructions(mode):
        if name == instruction:
            for key, value in re.findall(r'([\w.]+)=("[^"]*"|\S*)', rest):
                found.setdefault(key, value.strip('"'))
    return found


def sent_to_build(path: str) -> bool:
    """Whether .dockerignore lets a path into the build: the last pattern that fits it or a folder above it decides."""
    wanted = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            if re.fullmatch(f"{pattern}(?:/.*)?", path):
                wanted = line.startswith("!")
    return wanted


@pytest.mark.parametrize("mode", MODES)
def test_images_start_from_what_setup_py_names(mode, packaging):
    assert instructions(mode)[:2] == [("ARG", f"BASE_IMAGE={packaging['IMAGES'][mode]}"), ("FROM", "${BASE_IMAGE}")]
    assert any(
        name == "RUN" and rest.endswith(f"bash recipes/bootstrap.sh {mode}") for name, rest in instructions(mode)
    )
    assert sum(name == "FROM" for name, _ in instructions(mode)) == 1


def test_images_have_a_python_that_the_package_supports(packaging):
    supported = SpecifierSet(packaging["SETUP"]["python_requires"])
    assert re.match(r"python:(\d+\.\d+)-", packaging["IMAGES"]["cpu"])[1] in supported
    assert packaging["IMAGES"]["gpu"].endswith("ubuntu24.04")  # its python3 is 3.12
    assert "3.12" in supported


@pytest.mark.parametrize("mode", MODES)
def test_labels_carry_the_version_of_the_package(mode, packaging):
    labels = values(mode, "LABEL")
    wanted = ("title", "description", "version", "revision", "licenses", "documentation", "base.name")
    assert {f"org.opencontainers.image.{name}" for name in wanted} == labels.keys()
    assert labels["org.opencontainers.image.version"] == "${VERSION}"
    assert values(mode, "ARG")["VERSION"] == packaging["SETUP"]["version"]
    assert labels["org.opencontainers.image.licenses"] == packaging["SETUP"]["license"]


@pytest.mark.parametrize("mode", MODES)
def test_hadolint_finds_nothing(mode):
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert hadolint, "no hadolint; it comes with the extra 'dev': bash recipes/bootstrap.sh"
    command = [hadolint, "--config", "/dev/null", "--no-color", str(DOCKER / f"Dockerfile.{mode}")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("mode", MODES)
def test_containers_run_as_a_user_that_can_write_runs_and_caches(mode):
    lines = instructions(mode)
    assert [rest for name, rest in lines if name == "USER"] == ["10001:0"]
    at = lines.index(("USER", "10001:0"))
    assert not [line for line in lines[at:] if line[0] in ("RUN", "COPY", "ADD")]
    made = next(rest for name, rest in lines if name == "RUN" and "useradd" in rest)
    assert "--uid 10001 --gid 0" in made
    writable = re.search(r"install -d -o avar -g 0 -m 775 (.*)", made)[1].split()
    assert {"/opt/verl_avar/runs", "/home/avar/.cache"} <= {*writable}
    assert values(mode, "ENV")["HOME"] == "/home/avar"


@pytest.mark.parametrize("mode", MODES)
def test_dockerfiles_name_no_secret_and_download_nothing_by_url(mode):
    assert not [name for name in values(mode, "ARG") | values(mode, "ENV") if SECRET.search(name)]
    assert not [rest for name, rest in instructions(mode) if name == "ADD"]
    assert not [rest for name, rest in instructions(mode) if name == "RUN" and "://" in rest]


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        "runs/x/log.txt",
        ".env",
        "docker/.env",
        "docker/.env.local",
        ".netrc",
        "recipes/.netrc",
        "id_rsa",
        "verl_avar/__pycache__/cli.pyc",
        "verl_avar.egg-info/PKG-INFO",
    ],
)
def test_builds_do_not_see(path):
    assert not sent_to_build(path)


def test_builds_see_the_product():
    folders = ("docker", "examples", "recipes", "reward_fns", "tests", "verl_avar")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    assert not [path for path in files if not sent_to_build(str(path.relative_to(ROOT)))]
    copied = [rest.split()[:-1] for mode in MODES for name, rest in instructions(mode) if name == "COPY"]
    assert ["."] in copied
    assert all(path == "." or ((ROOT / path).exists() and sent_to_build(path)) for paths in copied for path in paths)


@pytest.fixture
def container(tmp_path):
    """Starts the entry point beside recipes of our own; `avar` and `ray` are stand-ins that print their arguments."""
    for folder in ("docker", "recipes", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copy(DOCKER / "entrypoint.sh", tmp_path / "docker")
    for name in ("bootstrap.sh", "tiny.yaml", "waiting.yaml", "sweep.yaml"):
        (tmp_path / "recipes" / name).touch()
    (tmp_path / "recipes" / "tiny.sh").write_text('printf "tiny:%s\\n" "$@"\nexit 5\n')
    wait = "trap 'echo saved; exit 7' TERM\necho ready\nwhile :; do sleep 0.05; done\n"
    (tmp_path / "recipes" / "waiting.sh").write_text(wait)
    for name in ("avar", "ray"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)

    started = []

    def start(*words: str) -> subprocess.Popen:
        process = subprocess.Popen(
            ["bash", str(tmp_path / "docker" / "entrypoint.sh"), *words],
            env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    "words,status,output",
    [
        ((), 0, "avar doctor\n"),
        (("doctor", "--no-engines"), 0, "avar doctor --no-engines\n"),
        (("avar", "vas", "--help"), 0, "avar vas --help\n"),
        (("ray", "start", "--head"), 0, "ray start --head\n"),
        (("recipe", "tiny", "a=1 2", "--stages", "data"), 5, "tiny:a=1 2\ntiny:--stages\ntiny:data\n"),
        (("shell", "-c", "echo $0; exit 3"), 3, "bash\n"),
    ],
)
def test_entry_point_runs(container, words, status, output):
    process = container(*words)
    assert (*process.communicate(timeout=30), process.returncode) == (output, "", status)


@pytest.mark.parametrize(
    "words,message",
    [
        (("train",), "unknown word 'train'; use doctor, recipe NAME, shell, avar COMMAND or ray COMMAND"),
        (("--help",), "unknown word '--help'; use doctor, recipe NAME, shell, avar COMMAND or ray COMMAND"),
        (("recipe",), "recipe needs a name; there are: tiny waiting"),
        (("recipe", "big"), "no recipe 'big'; there are: tiny waiting"),
        (("recipe", ""), "no recipe ''; there are: tiny waiting"),
        (("recipe", "tiny waiting"), "no recipe 'tiny waiting'; there are: tiny waiting"),
        (("recipe", "../docker/entrypoint"), "no recipe '../docker/entrypoint'; there are: tiny waiting"),
        (("recipe", "bootstrap"), "no recipe 'bootstrap'; there are: tiny waiting"),
        (("recipe", "sweep"), "no recipe 'sweep'; there are: tiny waiting"),
    ],
)
def test_entry_point_refuses_in_one_line(container, words, message):
    process = container(*words)
    assert (*process.communicate(timeout=30), process.returncode) == ("", f"entrypoint: {message}\n", 2)


def test_a_signal_reaches_the_recipe(container):
    process = container("recipe", "waiting")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert (*process.communicate(timeout=30), process.returncode) == ("saved\n", "", 7)


@pytest.mark.parametrize("mode", MODES)
def test_images_start_the_entry_point_under_an_init(mode):
    path = "/opt/verl_avar/docker/entrypoint.sh"
    assert instructions(mode)[-2:] == [("ENTRYPOINT", f'["tini", "--", "bash", "{path}"]'), ("CMD", '["doctor"]')]
    assert ("WORKDIR", "/opt/verl_avar") in instructions(mode)
    packages = next(rest for name, rest in instructions(mode) if name == "RUN" and "apt-get install" in rest)
    assert "tini" in packages.split()


@pytest.fixture
def compose():
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_compose_runs_a_ray_cluster_and_the_miniature(compose):
    services = compose["services"]
    assert {name: service["profiles"] for name, service in services.items()} == {
        "head": ["head"],
        "worker": ["worker"],
        "tiny": ["cpu"],
    }
    assert services["tiny"]["command"] == ["recipe", "avar_tiny_cpu"]
    for service in services.values():
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["build"]["dockerfile"].endswith(service["image"].removeprefix("verl_avar:"))
        assert service["user"] == "${AVAR_UID:-10001}"
        assert {volume.split("}:")[1] for volume in service["volumes"]} <= {"/opt/verl_avar/runs", "/home/avar/.cache"}
        assert not [n for n, value in service.get("environment", {}).items() if SECRET.search(n) and value is not None]
    for node in ("head", "worker"):
        assert services[node]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_compose_workers_join_the_port_of_the_head_and_ask_for_its_address(compose, container):
    head, worker = (compose["services"][name]["command"] for name in ("head", "worker"))
    asked = container(*[word.replace("$$", "$") for word in worker])
    _, error = asked.communicate(timeout=30)
    assert (asked.returncode != 0, "RAY_HEAD: set it" in error) == (True, True)
    port = re.search(r"--port=(\d+)", " ".join(head))[1]
    given = container("shell", "-c", "export RAY_HEAD=10.0.0.1; " + worker[2].replace("$$", "$"))
    assert given.communicate(timeout=30)[0] == f"ray start --block --address=10.0.0.1:{port}\n"


@pytest.fixture
def kubernetes():
    """The documents of the KubeRay example by kind."""
    return {d["kind"]: d for d in yaml.safe_load_all((DOCKER / "kuberay-rayjob.yaml").read_text())}


def pods(kubernetes) -> dict[str, dict]:
    cluster = kubernetes["RayJob"]["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return {group["template"]["spec"]["containers"][0]["name"]: group["template"]["spec"] for group in groups}


def test_rayjob_submits_the_recipe_for_the_nodes_it_has(kubernetes):
    job = kubernetes["RayJob"]["spec"]
    assert job["entrypoint"] == RECIPE
    assert (ROOT / re.search(r"bash (recipes/\S+\.sh)", job["entrypoint"])[1]).is_file()
    assert f"nodes={1 + sum(group['replicas'] for group in job['rayClusterSpec']['workerGroupSpecs'])}" in RECIPE
    assert f"bash -c '{RECIPE}'" in (DOCKER / "compose.yaml").read_text()


def test_pods_have_shared_memory_and_the_volume_of_checkpoints(kubernetes):
    claim = kubernetes["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pods(kubernetes).keys() == {"ray-head", "ray-worker"}
    for pod in pods(kubernetes).values():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        for path in ("/opt/verl_avar/runs", "/home/avar/.cache"):
            assert mounted[path]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_pods_get_secrets_by_reference_and_run_as_the_user_of_the_image(kubernetes):
    for pod in pods(kubernetes).values():
        env = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
        for name in ("WANDB_API_KEY", "HF_TOKEN"):
            assert env[name].keys() == {"name", "valueFrom"}
            assert env[name]["valueFrom"]["secretKeyRef"]["optional"] is True
        assert not [name for name in env if SECRET.search(name) and "value" in env[name]]
        assert pod["securityContext"]["runAsNonRoot"] is True
        user, group = pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]
        assert all(("USER", f"{user}:{group}") in instructions(mode) for mode in MODES)


def test_pods_ask_for_as_much_as_they_may_use(kubernetes):
    for pod in pods(kubernetes).values():
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        assert int(resources["limits"]["nvidia.com/gpu"]) > 0


def test_a_source_distribution_holds_what_a_clone_runs_with(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = FileList()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        files.process_template_line(line)
    packed = {*files.files}
    for folder in ("docker", "examples", "recipes", "reward_fns", "tests/unit"):
        assert {str(p.relative_to(ROOT)) for p in (ROOT / folder).iterdir() if p.is_file()} <= packed
    assert not [path for path in packed if "__pycache__" in path]
