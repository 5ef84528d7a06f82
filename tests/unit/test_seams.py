"""The checks of tests/seams see what they are for, on small packages written for it."""

from dataclasses import replace

import pytest
from seams import derived
from seams.source import Source
from seams.stated import Seam, violations

UPSTREAM = {
    "vllm/__init__.py": "from vllm.base import *\n",
    "vllm/base.py": """
from abc import ABC, abstractmethod
from vllm.fields import Config as Settings

class Base(ABC):
    def __init__(self, config, role):
        self.config = config

    @property
    def wanted(self): return False

    @abstractmethod
    def load(self, context, **kwargs): ...

    @abstractmethod
    def save(self, layer): ...

    def finished(self, request, blocks: list[int]) -> tuple[bool, dict | None]: ...

class Runner:
    def step(self):
        connector.bind()
        with context():
            yield self.model(1, size=2)
        connector.clear()

def pick(name, *, strict=False): ...
""",
    "vllm/fields.py": "class Config:\n    size: int = 1\n",
}
OURS = """
from vllm import pick
from vllm.base import Base, Settings

class Connector(Base):
    def __init__(self, config, role, extra=None):
        super().__init__(config, role)

    @property
    def wanted(self): return True

    def load(self, context, **kwargs): pass

    def save(self, layer): pass

    def finished(self, request, blocks): pass

def run():
    import vllm.fields as fields
    pick("a", strict=True)
    return Settings(size=2), Settings.size, fields.Config
"""


@pytest.fixture
def lay(tmp_path):
    """lay(ours, **changes) -> the Source of our module `ours.code` beside UPSTREAM, whose base.py is changed by
    `old -> new`."""

    def lay(ours=OURS, changes=()):
        for name, text in UPSTREAM.items():
            for old, new in changes if name == "vllm/base.py" else ():
                assert old in text
                text = text.replace(old, new)
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        (tmp_path / "ours").mkdir(exist_ok=True)
        (tmp_path / "ours" / "__init__.py").write_text("")
        (tmp_path / "ours" / "code.py").write_text(ours)
        return Source(tmp_path)

    return lay


def complaints(source):
    module = "ours.code"
    assert derived.modules(source.roots[0] / "ours") == ["ours", module]
    return [
        *derived.missing_imports(source, module, {}),
        *derived.unfit_uses(source, module),
        *derived.unfit_classes(source, module),
    ]


def test_code_that_fits_has_no_complaints(lay):
    assert complaints(lay()) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("def pick(", "def choose(", "no pick in vllm"),
        ("name, *, strict=False", "name", "takes no strict"),
        ("name, *, strict=False", "name, kind, *, strict=False", "needs kind"),
        ("name, *, strict=False", "*, name=None, strict=False", "takes 0 positional arguments, we pass 1"),
        ("import Config as", "import Configuration as", "no Settings in vllm.base"),
        ("self, config, role", "self, config, role, cache", "needs cache"),
        ("self, config, role", "self, role", "takes 1 positional arguments, we pass 2"),
        ("def save(self, layer)", "def save(self, layer, lock)", "parameter 2 is None, upstream's is lock"),
        ("def save(self, layer)", "def save(self, name)", "parameter 1 is layer, upstream's is name"),
        ("def save(self, layer)", "def save(self, layer, *, lock=0)", "does not take lock"),
        ("def save(self, layer)", "def save(self, layer, **others)", "does not take further keywords"),
        ("def save(self, layer)", "def save(self)", "requires layer"),
        ("    @property\n", "", "is a property, upstream's a method"),
        (
            "    def finished(",
            "    @abstractmethod\n    def start(self): ...\n    def finished(",
            "leaves start abstract",
        ),
    ],
)
def test_an_upstream_that_moved_is_complained_of(lay, old, new, complaint):
    found = complaints(lay(changes=[(old, new)]))
    assert any(complaint in line for line in found), found


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("Settings.size", "Settings.width", "no width in vllm.fields:Config"),
        ("Settings(size=2)", "Settings(width=2)", "has no field width"),
        ("fields.Config", "fields.Layout", "no Layout in vllm.fields"),
        ("import vllm.fields as fields", "import vllm.layouts as fields", "no module vllm.layouts"),
        ("super().__init__(", "super().setup(", "no super().setup upstream"),
    ],
)
def test_a_use_of_ours_that_never_fitted_is_complained_of(lay, old, new, complaint):
    found = complaints(lay(OURS.replace(old, new)))
    assert any(complaint in line for line in found), found


def test_a_name_is_needed_only_where_its_condition_exists(lay):
    source = lay("from vllm.base import Layout\n")
    assert derived.missing_imports(source, "ours.code", {"vllm.base:Layout": "vllm.base:Base.layouts"}) == []
    assert derived.missing_imports(source, "ours.code", {"vllm.base:Layout": "vllm.base:Base.wanted"}) != []


STEP = Seam("vllm.base:Runner.step", sequence=("bind", "yield", "clear"), passes=("model",), mentions=("size",))
FINISHED = Seam(
    "vllm.base:Base.finished", leading=("request", "blocks"), takes=("blocks",), returns="tuple[bool, dict | None]"
)
SEAMS = [STEP, FINISHED, Seam("vllm:Base", has=("config", "finished")), Seam("vllm.base:pick", takes=("strict",))]


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.where)
def test_a_seam_that_holds_has_no_violations(lay, seam):
    assert violations(lay(), seam) == []


@pytest.mark.parametrize(
    ("seam", "violation"),
    [
        (Seam("vllm.base:Walker"), "not there"),
        (Seam("vllm.lost:Base"), "not there"),
        (Seam("vllm.base:Base", has=("missing",)), "has no missing"),
        (Seam("vllm.base:Base.config", has=("size",)), "not there"),
        (Seam("vllm:base", has=("size",)), "is no class or function"),
        (replace(STEP, sequence=("yield", "bind", "clear")), "runs bind, yield, clear, not yield, bind, clear"),
        (replace(STEP, sequence=("bind",) * 2), "runs bind, not bind, bind"),
        (replace(STEP, passes=("model", "one")), "does not call model(one, …)"),
        (replace(STEP, mentions=("height",)), "does not mention height"),
        (replace(FINISHED, leading=("blocks",)), "starts with request, blocks, not with blocks"),
        (replace(FINISHED, takes=("groups",)), "does not take groups"),
        (replace(FINISHED, returns="bool"), "returns tuple[bool, dict | None], not bool"),
    ],
)
def test_a_seam_that_does_not_hold_is_reported(lay, seam, violation):
    (found,) = violations(lay(), seam)
    assert found == f"{seam.where}: {violation}"


def test_a_seam_of_newer_versions_only_is_no_matter_for_older_ones(lay):
    seam = Seam("vllm.base:Walker", only_with="vllm.base:Base.layouts")
    assert violations(lay(), seam) == []
    assert violations(lay(), replace(seam, only_with="vllm.base:Base.wanted")) == [f"{seam.where}: not there"]
