"""A run's settings: what is refused, in one line that says where, before anything is sent."""

import pytest
import yaml

from verl_avar.errors import ConfigError
from verl_avar.synthesis.config import load

SECRET = "sk-secret-of-this-test-1234567"


def valid():
    return {
        "name": "n", "out": "o", "sources": [{"path": "rows.parquet"}],
        "endpoints": {"e": {"base_url": "http://127.0.0.1:1/v1"}},
        "stages": {name: {"endpoint": "e", "model": "m"} for name in ("describe", "reason", "anchor")},
    }  # fmt: skip


@pytest.fixture
def loaded(tmp_path):
    """loaded({"a.b.0.c": value, …}, *overrides): the settings of a yaml that differs in these places from a valid one.

    A value `...` takes the place out.
    """

    def read(changes=None, *overrides):
        given = valid()
        for place, value in (changes or {}).items():
            *way, last = (int(part) if part.isdigit() else part for part in place.split("."))
            node = given
            for part in way:
                node = node[part] if isinstance(node, list) else node.setdefault(part, {})
            if value is ...:
                del node[last]
            else:
                node[last] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(given))
        return load(path, overrides)

    return read


def test_a_valid_config_has_the_defaults_and_overrides_count_more(loaded, tmp_path):
    config = loaded({"budget.tokens": 5, "stages.reason.prompt": "mine/reason.jinja"}, "budget.tokens=7", "seed=3")
    assert (config.budget.tokens, config.seed, config.endpoints.e.attempts) == (7, 3, 8)
    assert config.stages.describe.images and not config.stages.reason.images and config.outputs == ["sft"]
    assert config.stages.reason.prompt == str(tmp_path / "mine" / "reason.jinja")  # beside the yaml
    assert config.stages.anchor.prompt is None
    assert loaded({"stages.reason.prompt": "/elsewhere/r.jinja"}).stages.reason.prompt == "/elsewhere/r.jinja"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nam": "x"}, "Key 'nam' not in 'Synthesis'"),
        ({"stages.reason.modl": "x"}, "at stages.reason.modl"),
        ({"stages.reflect": {"model": "m"}}, "at stages.reflect"),
        ({"checks.anchor.min_anchor": 2}, "at checks.anchor.min_anchor"),
        ({"endpoints.e.concurrency": "many"}, "at endpoints.e.concurrency"),
        ({"sources.0.limit": "all"}, "Value 'all' .*at limit"),
        ({"name": ...}, "no value for name"),
        ({"sources": ...}, "no value for sources"),
        ({"stages.anchor": ...}, "no value for stages.anchor.endpoint, stages.anchor.model"),
        ({"endpoints.e.base_url": ..., "endpoints.e.timeout_s": 3}, "no value for endpoints.e.base_url"),
        ({"endpoints.e.base_url": "127.0.0.1:8000/v1"}, r"endpoints.e.base_url is '127.0.0.1:8000/v1'; wanted http"),
        ({"endpoints.e.concurrency": 0}, "endpoints.e.concurrency must be positive, it is 0"),
        ({"endpoints.e.attempts": -1}, "endpoints.e.attempts must be positive, it is -1"),
        ({"endpoints.e.timeout_s": 0}, "endpoints.e.timeout_s must be positive"),
        ({"endpoints.e.backoff_s": -1}, "endpoints.e.backoff_s must not be negative"),
        ({"endpoints.e.backoff_max_s": -1}, "endpoints.e.backoff_max_s must not be negative"),
        ({"endpoints.e.requests_per_minute": 0}, "endpoints.e.requests_per_minute must be positive"),
        ({"endpoints.e.tokens_per_minute": -5}, "endpoints.e.tokens_per_minute must be positive"),
        ({"stages.anchor.endpoint": "f"}, "stages.anchor.endpoint is 'f'; endpoints are e"),
        ({"stages.anchor.keep": "best"}, "stages.anchor.keep is 'best'; known are first, .*, most_anchors, attention"),
        (
            {"stages.reason.keep": "most_anchors"},
            "stages.reason.keep is 'most_anchors'; known are first, sh.*, longest$",
        ),
        ({"stages.reason.candidates": 0}, "stages.reason.candidates must be at least 1, it is 0"),
        ({"stages.describe.images": False}, "stages.describe.images is false, but a description needs the images"),
        ({"stages.anchor.keep": "attention"}, "stages.anchor.keep is attention; name the student in attention.model"),
        ({"outputs": ["sft", "csv"]}, "outputs has 'csv'; known are sft, rl, sharegpt, dataset"),
        ({"sources": []}, "sources is empty"),
        ({"attention.keep": 0}, r"attention.keep must be in \(0, 1\], it is 0"),
        ({"attention.keep": 1.5}, r"attention.keep must be in \(0, 1\], it is 1.5"),
        ({"endpoints.e.base_url": "${oc.env:AVAR_NO_SUCH_URL}/v1"}, "AVAR_NO_SUCH_URL"),
        ({"stages.reason.sampling": {"n": 4}}, "stages.reason.sampling.n: it can't be set there"),
        ({"stages.reason.sampling": {"model": "m"}}, "stages.reason.sampling.model: "),
        ({"stages.reason.sampling": {"stream": True}}, "stages.reason.sampling.stream: "),
        (
            {"stages.reason.sampling": {"extra_body": {"top_k": 3}}},
            "sampling.extra_body: write what it holds right below",
        ),
        ({"stages.reason.sampling": {"seed": 5}}, "sampling has seed, but each call is sent its own"),
        ({"budget.cost": 5}, "budget.cost is 5, but no stage has a price"),
        ({"endpoints.e.base_url": "https:///v1"}, "endpoints.e.base_url is 'https:///v1'; wanted http"),
        ({"endpoints.e.proxy": "ftp://proxy:21"}, "endpoints.e.proxy is 'ftp://proxy:21'; wanted http"),
    ],
)
def test_what_the_settings_can_not_be_is_refused_with_its_place(loaded, changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        loaded(changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"endpoints.e.api_key": SECRET},
        {"endpoints.e.API_KEY": SECRET},
        {"stages.reason.sampling": {"extra_headers": {"Authorization": f"Bearer {SECRET}"}}},
        {"sources": [{"path": "p", "columns": {"token": SECRET}}]},
        {"endpoints.e.base_url": f"https://someone:{SECRET}@api.example/v1"},
        {"endpoints.e.base_url": f"https://api.example/v1?key={SECRET}"},
        {"endpoints.e.proxy": f"http://someone:{SECRET}@proxy.example:3128"},
    ],
)
def test_keys_in_the_file_or_an_override_are_refused_without_being_repeated(loaded, changes):
    with pytest.raises(ConfigError, match="keys don't go into files") as error:
        loaded(changes)
    assert SECRET not in str(error.value)
    ((place, value),) = changes.items()
    if isinstance(value, str):
        with pytest.raises(ConfigError, match="keys don't go into files") as error:
            loaded({}, f"{place}={value}")
        assert SECRET not in str(error.value)


def test_a_key_among_an_overrides_samplings_is_refused(loaded):
    with pytest.raises(ConfigError, match=r"stages\.reason\.sampling\.extra_headers\.Authorization") as error:
        loaded({}, f"stages.reason.sampling.extra_headers.Authorization={SECRET}")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no config "),
        ("- a\n- b\n", "not a yaml of settings"),
        ("just words", "Key .just words. not in"),
        ("a: [", "is not a yaml file"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load(path)
    assert "config.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [("budget.cost", "'budget.cost' is not an override"), ("budget.coast=3", "budget.coast"), ("seed=x", "seed")],
)
def test_an_override_that_sets_nothing_is_refused(loaded, override, words):
    with pytest.raises(ConfigError, match=words) as error:
        loaded({}, override)
    assert "\n" not in str(error.value)
