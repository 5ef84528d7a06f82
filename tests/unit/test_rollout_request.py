"""Options, roles, scores and start-up checks of one request, without an engine."""

from types import SimpleNamespace

import pytest

from verl_avar.roles import ChatTokens, Role
from verl_avar.rollout import kv_transfer_config, request, requested
from verl_avar.rollout.options import RequestOptions
from verl_avar.rollout.scores import COLUMNS, SharedScores, shared_folder

START, END, NEWLINE, IMAGE = 1, 2, 3, 9
CHAT = ChatTokens(
    turn_start=START,
    turn_end=END,
    headers={"system": (4,), "user": (5,), "assistant": (6,), "tool": (7,)},
    newline=NEWLINE,
    visual=frozenset({IMAGE}),
)
PROMPT = [START, 4, NEWLINE, 20, END, START, 5, NEWLINE, IMAGE, IMAGE, 21, END, START, 6, NEWLINE]


class _Range:
    def __init__(self, *spans):
        self.spans = spans

    def extract_embeds_range(self):
        return list(self.spans)


def _feature(modality, *spans):
    return SimpleNamespace(modality=modality, mm_position=_Range(*spans))


def _engine(**extra_config):
    transfer = SimpleNamespace(**kv_transfer_config(**extra_config))
    return SimpleNamespace(kv_transfer_config=transfer, model_config=None)


def _request(extra_args, ids=PROMPT, features=(), stop=()):
    params = SimpleNamespace(extra_args=extra_args, stop=list(stop))
    return SimpleNamespace(sampling_params=params, prompt_token_ids=ids, mm_features=list(features), resumable=False)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"visual_bias": float("nan")}, "visual_bias must be finite"),
        ({"visual_bias": 21}, "within ±20"),
        ({"visual_bias": 10**400}, r"within ±20, got 10{17}\.\.\."),  # too large for a float
        ({"system_bias": "1.0"}, "system_bias must be a number"),
        ({"system_bias": True}, "system_bias must be a number"),
        ({"system_bias": [1.0]}, "system_bias must be a number"),
        ({"system_bias": None}, "system_bias must be a number"),
        ({"attention_scores": "all"}, "summary, tokens"),
        ({"attention_scores": ["tokens"]}, "summary, tokens"),
        ({"visual_bais": 1.0}, "unknown option 'visual_bais'"),
        ({"Visual-Bias": 1.0}, "unknown option 'Visual-Bias'"),
        ({"visual" * 99: 1.0}, r"unknown option 'visualvis.{,30}'; known"),
        ({"attention_layers": [0]}, "attention_layers is engine-wide"),
    ],
)
def test_bad_options_are_named(values, complaint):
    with pytest.raises(ValueError, match=complaint):
        RequestOptions.from_mapping(values)


def test_a_request_overrides_the_engines_defaults_and_leaves_other_plugins_keys_alone():
    defaults = RequestOptions(visual_bias=0.5, attention_scores="tokens")
    options = RequestOptions.from_mapping({"visual_bias": 0, "kv_transfer_params": {}, "bias": "x", 3: 4}, defaults)
    assert options == RequestOptions(visual_bias=0, attention_scores="tokens")
    assert not options.biased


def test_in_the_connectors_config_every_key_is_ours():
    options = RequestOptions.from_config({"system_bias": -1, "attention_layers": [0]})
    assert options == RequestOptions(system_bias=-1)
    with pytest.raises(ValueError, match=r"unknown option 'bias'; known: .*attention_layers"):
        RequestOptions.from_config({"bias": 1})


def test_equal_biases_share_a_salt_and_others_do_not():
    salt = RequestOptions(visual_bias=1).cache_salt
    assert salt == RequestOptions(visual_bias=1.0, attention_scores="tokens").cache_salt
    assert salt != RequestOptions(system_bias=1.0).cache_salt
    assert RequestOptions(visual_bias=0, system_bias=-0.0).cache_salt == ""


def test_visual_roles_are_the_embedded_positions_of_images():
    roles = request.prompt_roles(PROMPT, [_feature("image", (8, 9)), _feature("audio", (10, 10))], CHAT)
    assert (roles == Role.VISUAL).nonzero()[0].tolist() == [8, 9]
    assert roles[:5].tolist() == [Role.SYSTEM] * 5
    assert roles[10] == Role.USER


def test_a_placeholder_without_an_embedding_is_an_error():
    with pytest.raises(ValueError, match="carries no embedding"):
        request.prompt_roles(PROMPT, [_feature("image", (8, 8))], CHAT)


def test_a_bias_on_a_prompt_without_roles_is_refused_and_a_score_is_not(monkeypatch):
    monkeypatch.setattr(request, "chat_tokens", lambda model_config: CHAT)
    with pytest.raises(ValueError, match="no turn starts"):
        request.refuse_bad_request(_engine(), _request({"visual_bias": 1.0}, ids=[20, 21]))
    request.refuse_bad_request(_engine(), _request(None, ids=[20, 21]))


def test_a_request_leaves_with_the_options_that_hold_for_it():
    asked = _request({"attention_scores": "tokens", "other": 1})
    request.refuse_bad_request(_engine(), asked)
    held = RequestOptions(attention_scores="tokens").as_dict()
    assert asked.sampling_params.extra_args == held | {"other": 1}
    assert request.has_options(asked)
    assert not request.has_options(_request({"attention_scores": "tokens"}))


def test_scores_are_refused_beside_stop_strings_only_where_they_were_asked_for():
    with pytest.raises(ValueError, match="give stop_token_ids"):
        request.refuse_bad_request(_engine(), _request({"attention_scores": "summary"}, stop=["."]))
    request.refuse_bad_request(_engine(attention_scores="tokens"), _request(None, stop=["."]))


@pytest.mark.parametrize(
    ("extra_config", "complaint"),
    [
        ({"visual_bias": 99}, "visual_bias must be finite"),
        ({"layers": [0]}, "unknown option 'layers'"),
        ({"attention_layers": [0, 0]}, "attention_layers names a layer twice"),
    ],
)
def test_a_bad_config_of_the_connector_is_one_line_that_names_it(extra_config, complaint):
    engine = _engine()
    engine.kv_transfer_config.kv_connector_extra_config = extra_config
    with pytest.raises(ValueError, match=f"kv_connector_extra_config of VisualAttentionConnector: {complaint}"):
        request.check_engine(engine)


def test_an_engine_without_the_connector_is_not_checked():
    request.check_engine(SimpleNamespace(kv_transfer_config=None))


def test_a_prompt_in_parts_is_refused():
    part = _request(None)
    part.resumable = True
    with pytest.raises(ValueError, match="send the prompt as a whole"):
        request.refuse_bad_request(_engine(), part)


def test_the_engines_default_bias_counts_as_the_requests(monkeypatch):
    monkeypatch.setattr(request, "chat_tokens", lambda model_config: CHAT)
    with pytest.raises(ValueError, match="no turn starts"):
        request.refuse_bad_request(_engine(system_bias=-0.5), _request(None, ids=[20, 21]))


def test_options_without_the_connector_are_refused():
    engine = SimpleNamespace(kv_transfer_config=None)
    with pytest.raises(ValueError, match="runs without the visual-attention connector"):
        request.refuse_bad_request(engine, _request({"visual_bias": 1.0}))
    request.refuse_bad_request(engine, _request({"kv_transfer_params": {}}))


def test_only_our_connector_turns_the_backend_on():
    assert requested(_engine())
    assert not requested(SimpleNamespace(kv_transfer_config=None))
    other = SimpleNamespace(kv_connector="NixlConnector", kv_connector_module_path=None)
    assert not requested(SimpleNamespace(kv_transfer_config=other))


def test_shared_scores_reach_the_reader_and_leave_no_file():
    writer = SharedScores.create("unit-test", 8)
    other = SharedScores.create("unit-test-other", 8)
    reader = SharedScores.open("unit-test")
    writer.array[3] = 7
    assert reader.array[3].tolist() == [7] * COLUMNS
    assert not writer.path.exists()
    other.close()
    assert not list(shared_folder().glob("avar-scores-unit-test*"))


def test_a_file_left_by_a_killed_engine_is_removed_and_a_starting_ones_is_kept():
    abandoned = shared_folder() / "avar-scores-unit-abandoned"
    abandoned.write_bytes(b"")
    starting = SharedScores.create("unit-starting", 1)
    SharedScores.create("unit-next", 1).close()
    assert not abandoned.exists()
    assert starting.path.exists()
    starting.close()


def test_scores_of_an_engine_on_another_machine_are_an_error():
    with pytest.raises(RuntimeError, match="run on one machine"):
        SharedScores.open("unit-elsewhere")
