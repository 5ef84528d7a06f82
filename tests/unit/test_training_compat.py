"""Patches of verl: when they run, that they run once, and that they refuse versions nobody tested."""

import importlib
import sys

import pytest
import torch
from tensordict import TensorDict

from verl_avar.compat import on_import, verl_gloo, verl_versions
from verl_avar.compat.verl_mrope_position_ids import fix_3d_position_ids


@pytest.fixture
def module(tmp_path, monkeypatch):
    """An importable module that nobody has imported."""
    (tmp_path / "avar_probe_module.py").write_text("import os\nvalue = os.environ.get('AVAR_PROBE', 'stock')\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setattr(on_import, "_waiting", {})
    yield "avar_probe_module"
    sys.modules.pop("avar_probe_module", None)


def patched(monkeypatch):
    from contextlib import contextmanager

    @contextmanager
    def patch(module):
        monkeypatch.setenv("AVAR_PROBE", "before")
        yield
        module.after = True

    return patch


def test_patch_runs_around_the_import(module, monkeypatch):
    on_import.on_import(module, patched(monkeypatch))
    assert module not in sys.modules
    loaded = importlib.import_module(module)
    assert (loaded.value, loaded.after) == ("before", True)


def test_patch_runs_at_once_on_an_imported_module(module, monkeypatch):
    loaded = importlib.import_module(module)
    on_import.on_import(module, patched(monkeypatch))
    assert (loaded.value, loaded.after) == ("stock", True)


def test_failing_patch_fails_the_import(module):
    def patch(loading):
        raise RuntimeError("this patch does not apply")

    on_import.on_import(module, patch)
    with pytest.raises(RuntimeError, match="does not apply"):
        importlib.import_module(module)


@pytest.mark.parametrize("installed", ["0.9.0", "0.10.0", "1.0"])
def test_untested_version_is_refused_by_range(installed, monkeypatch):
    monkeypatch.setattr(verl_versions, "version", lambda name: installed)
    verl_versions.check.cache_clear()
    with pytest.raises(RuntimeError, match=rf"patches verl 0\.9\.1, but verl {installed} is installed"):
        verl_versions.check()
    verl_versions.check.cache_clear()


def test_patching_twice_changes_nothing():
    from verl.utils import distributed

    with verl_gloo.patch(distributed):
        pass
    first = distributed.initialize_global_process_group_ray
    with verl_gloo.patch(distributed):
        pass
    assert distributed.initialize_global_process_group_ray is first


@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 5, 2], [4]])
@pytest.mark.parametrize("damage", ["none", "as verl rebuilds it", "as it comes back"])
def test_position_ids_survive_sequences_of_any_lengths(lengths, damage):
    rows = [torch.arange(4 * n).reshape(4, n) + 100 * i for i, n in enumerate(lengths)]
    ids = torch.nested.as_nested_tensor([torch.arange(n) for n in lengths], layout=torch.jagged)
    if damage == "none" or len(set(lengths)) > 1:
        positions = torch.nested.nested_tensor_from_jagged(torch.cat(rows, -1), ids.offsets(), jagged_dim=2)
    else:
        positions = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        assert positions._ragged_idx == 1  # torch can't know which dimension is ragged
    if damage == "as verl rebuilds it":
        positions._ragged_idx = 2
    data = TensorDict({"input_ids": ids, "position_ids": positions}, batch_size=[len(lengths)])
    fix_3d_position_ids(data)
    assert data["position_ids"]._ragged_idx == 2
    padded = torch.nested.to_padded_tensor(data["position_ids"], padding=0, output_size=(len(rows), 4, max(lengths)))
    for row, got in zip(rows, padded, strict=True):
        assert torch.equal(got[:, : row.shape[1]], row)


def test_position_ids_that_fit_nothing_are_an_error():
    ids = torch.nested.as_nested_tensor([torch.arange(3), torch.arange(4)], layout=torch.jagged)
    positions = torch.nested.as_nested_tensor([torch.zeros(4, 2), torch.zeros(4, 2)], layout=torch.jagged)
    with pytest.raises(ValueError, match="position_ids"):
        fix_3d_position_ids(TensorDict({"input_ids": ids, "position_ids": positions}, batch_size=[2]))
