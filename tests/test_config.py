"""Configuration: what is unknown, mistyped or does not fit is refused by name; what is written reads back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cldf_fast.config import Config, load_config, make_config, save_config
from cldf_fast.errors import ConfigError
from cldf_fast.pipeline import CLDF, build_classifier, build_unet


def test_the_defaults_build_a_whole_that_fits_together() -> None:
    config = Config()
    cldf = CLDF(config, build_unet(config.cdm.network, 1, 1), build_classifier(config, 1, 1))
    assert len(cldf.features.channels) >= len(config.features.downsample)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evidenc": {}}, r"evidenc: there is no such key; did you mean evidence\?"),
        ({"evidence": {"sigmaa": 1}}, r"evidence\.sigmaa: there is no such key; did you mean sigma\?"),
        (
            {"cdm": {"optimisation": {"lr": 1e-3}}},
            r"cdm\.optimisation\.lr: there is no such key; expected one of steps, ",
        ),
        ({"cdm": {"optimisation": {"steps": "many"}}}, r"cdm\.optimisation\.steps: .*integer.*got 'many'"),
        ({"cdm": {"optimisation": {"steps": 0}}}, r"cdm\.optimisation\.steps: .*greater than 0, got 0"),
        ({"cdm": {"optimisation": {"learning_rate": float("nan")}}}, r"cdm\.optimisation\.learning_rate: "),
        ({"cdm": {"network": {"channel_mult": []}}}, r"cdm\.network\.channel_mult: "),
        ({"cdm": {"network": {"channel_mult": [-1, 2]}}}, r"cdm\.network\.channel_mult\.0: .*greater than 0, got -1"),
        ({"evidence": {"percentile": 0}}, r"evidence\.percentile: .*greater than 0, got 0"),
        ({"diffusion": {"level_unit": "alpha_bar"}}, r"evidence\.noise_levels: expected alpha-bars above 0 with"),
        (
            {"diffusion": {"level_unit": "alpha_bar"}, "evidence": {"noise_levels": [0.9]}},
            r"features\.noise_levels: expected alpha-bars above 0 with diffusion.level_unit alpha_bar .*got \(0.01,\)",
        ),
        ({"features": {"noise_levels": [0.1, 1.2]}}, r"features\.noise_levels\.1: .*got 1\.2"),
        ({"features": {"noise_levels": []}}, r"features\.noise_levels: "),
        ({"decoder": {"variant": "triplet"}}, r"decoder\.variant: .*got 'triplet'"),
        ({"diffusion": "linear"}, r"diffusion: .*got 'linear'"),
        ({"seed": -1}, r"seed: .*got -1"),
        ({"seed": 2**63}, r"seed: "),
        ({"data": {"size": 50}}, r"data\.size: expected a multiple of 16 \(cdm's depth\), got 50$"),
        (
            {"data": {"size": 34}, "cdm": {"network": {"channel_mult": [1]}}, "features": {"downsample": [2]}},
            r"data\.size: expected a multiple of 8 \(classifier's depth\), got 34$",
        ),
        ({"features": {"downsample": [4, 1]}}, r"features\.downsample: .*\[2, 4, 8, 16\].*got 1$"),
        ({"evidence": {"cam_downsample": 16}}, r"evidence\.cam_downsample: .*\[1, 2, 4, 8\].*got 16$"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_what_does_not_fit_is_named_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_config(values, source="my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert "\n" not in str(caught.value)


def test_yaml_round_trip(tiny_config: Config, tmp_path: Path) -> None:
    for config in (Config(), tiny_config, make_config({"data": {"options": {"modalities": ["t1", "flair"]}}})):
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config


def test_overrides_win_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 5\ncdm: {optimisation: {steps: 7, learning_rate: 1e-3}}\n", encoding="utf-8")
    config = load_config(path, {"cdm": {"optimisation": {"steps": 9}}, "data": {"size": 32}})
    assert (config.seed, config.data.size) == (5, 32)
    assert (config.cdm.optimisation.steps, config.cdm.optimisation.learning_rate) == (9, 1e-3)


def test_the_null_condition_may_be_written_as_yaml_s_null(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("features: {condition: null}", encoding="utf-8")
    assert load_config(tmp_path / "c.yaml").features.condition == "null"
    (tmp_path / "c.yaml").write_text("features: {condition: label}", encoding="utf-8")
    assert load_config(tmp_path / "c.yaml", {"features": {"condition": None}}).features.condition == "null"


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n", encoding="utf-8")
    assert load_config(path) == Config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: [1", "not valid YAML"),
        (b"- 1\n- 2\n", "expected a mapping of sections, got list"),
        (b"\xff\xfe\x00", "can't be read"),
        (None, "can't be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"broken\.yaml.*{message}|{message}.*broken\.yaml"):
        load_config(path)


def test_a_configuration_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]
