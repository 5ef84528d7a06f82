"""A run resumes from the newest checkpoint whose files are those that were saved."""

import pytest

from verl_avar.training import whole_checkpoints as whole
from verl_avar.training.checkpoint import latest_step


@pytest.fixture
def folder(tmp_path):
    """Sealed checkpoints of steps 2 and 4, as verl's RL lays them out; the tracker names 4."""
    for step in (2, 4):
        actor = tmp_path / f"global_step_{step}" / "actor"
        actor.mkdir(parents=True)
        (actor / "model.pt").write_bytes(b"weights" * step)
        (actor.parent / "data.pt").write_bytes(b"order")
        whole.SealCheckpoints().on_save(None, step, str(actor.parent))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    return tmp_path


def cut(folder, step, name="actor/model.pt"):
    path = folder / f"global_step_{step}" / name
    path.write_bytes(path.read_bytes()[:3])


def test_a_whole_checkpoint_is_left_alone(folder):
    before = sorted(folder.rglob("*"))
    assert whole.settle(folder) is None
    assert sorted(folder.rglob("*")) == before and latest_step(folder) == 4


@pytest.mark.parametrize("name", ["actor/model.pt", "data.pt"])
def test_a_truncated_one_is_set_aside_for_the_one_before(folder, name):
    cut(folder, 4, name)
    said = whole.settle(folder)
    assert f"{name} has 3 bytes, was saved with" in said and said.endswith("resumes from step 2")
    assert latest_step(folder) == 2
    assert (folder / "global_step_4.broken").is_dir() and not (folder / "global_step_4").exists()
    assert whole.settle(folder) is None


def test_a_missing_file_and_a_missing_folder_are_found(folder):
    (folder / "global_step_4" / "data.pt").unlink()
    assert "data.pt is missing" in whole.settle(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("6")  # a folder that someone removed
    assert whole.settle(folder).endswith("resumes from step 2")


def test_an_unsealed_folder_never_takes_the_place_of_a_broken_one(folder):
    """Step 3 was cut off while it was written: nothing lists its files."""
    (folder / "global_step_3").mkdir()
    cut(folder, 4)
    whole.settle(folder)
    assert latest_step(folder) == 2


def test_without_a_whole_one_the_run_begins_again_and_says_so(folder):
    cut(folder, 2)
    cut(folder, 4)
    assert "no other is whole: the run begins again" in whole.settle(folder)
    assert latest_step(folder) == 0
    assert (folder / "global_step_2").is_dir() and (folder / "global_step_4.broken").is_dir()


def test_one_of_verls_own_commands_is_taken_as_it_is(folder):
    (folder / "global_step_4" / whole.MANIFEST).unlink()
    assert whole.settle(folder) is None and latest_step(folder) == 4


def test_breaking_twice_at_one_step_keeps_both(folder):
    (folder / "global_step_4.broken").mkdir()
    cut(folder, 4)
    whole.settle(folder)
    assert (folder / "global_step_4.broken1").is_dir()


def test_a_new_run_has_nothing_to_settle(tmp_path):
    assert whole.settle(tmp_path / "checkpoints") is None


def test_a_checkpoint_that_is_still_being_written_is_not_sealed(folder):
    (folder / "global_step_6").mkdir()
    whole.SealCheckpoints().on_save(None, 6, str(folder / "global_step_6"), async_save=True)
    assert not list((folder / "global_step_6").iterdir())
