import argparse
import json

import pytest

from semantic_ep import config
from semantic_ep.config import SemanticEPConfig, add_arguments, settings
from semantic_ep.errors import ConfigError


def resolve(section=None, flags=(), **environment):
    args = add_arguments(argparse.ArgumentParser()).parse_args(list(flags))
    return SemanticEPConfig.resolve(json_section=section, args=args, environment=environment)


def test_flag_beats_variable_beats_json_beats_default():
    assert resolve().groups.ep_size == "auto"
    section = {"groups": {"ep_size": 2}}
    variable = {"SEMANTIC_EP_GROUPS_EP_SIZE": "4"}
    assert resolve(section).groups.ep_size == 2
    assert resolve(section, **variable).groups.ep_size == 4
    assert resolve(section, ["--semantic-ep-groups-ep-size", "8"], **variable).groups.ep_size == 8


def test_a_switch_needs_no_value_and_accepts_one():
    assert resolve(flags=["--semantic-ep-enabled"]).enabled
    assert not resolve({"enabled": True}, ["--semantic-ep-enabled", "false"]).enabled


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.json_path)
def test_each_setting_reads_its_default_from_all_three_spellings(setting):
    default = setting.default
    section = default
    for name in reversed(setting.path):
        section = {name: section}
    text = str(default).lower() if isinstance(default, bool) else str(default)
    expected = SemanticEPConfig()
    assert resolve(section) == expected
    assert resolve(flags=[setting.flag, text]) == expected
    assert resolve(**{setting.variable: text}) == expected


def test_all_mistakes_are_reported_at_once_each_with_its_place():
    with pytest.raises(ConfigError) as error:
        resolve(
            {"enabeld": True, "groups": {"scope": "rack"}},
            ["--semantic-ep-groups-ep-size", "0"],
            SEMANTIC_EP_DISPATCH_BACKEND="nccl",
            SEMANTIC_EP_GROUP_SCOPE="node",
        )
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    text = str(error.value)
    assert "semantic_ep.enabeld: unknown key. Allowed: dispatch" in text
    assert 'Did you mean "enabled"?' in text
    assert (
        'JSON "semantic_ep.groups.scope": not a valid value (got rack). Allowed: node, global'
        in text
    )
    assert (
        "--semantic-ep-groups-ep-size: not a valid value (got 0). Allowed: auto or integer > 0"
        in text
    )
    assert "SEMANTIC_EP_DISPATCH_BACKEND: not a valid value (got nccl)" in text
    assert "Did you mean SEMANTIC_EP_GROUPS_SCOPE?" in text


@pytest.mark.parametrize("key", ["sematic_ep", "semantic-ep", "SemanticEP".lower(), "semantic_EP"])
def test_a_near_miss_of_the_section_is_an_error_because_deepspeed_would_ignore_it(key):
    with pytest.raises(ConfigError, match='Write it as "semantic_ep"'):
        SemanticEPConfig.from_deepspeed({"train_batch_size": 8, key: {}})


def test_deepspeeds_own_keys_are_left_alone():
    keys = ["optimizer", "scheduler", "zero_optimization", "expert_parallel", "tensor_parallel"]
    assert SemanticEPConfig.from_deepspeed(dict.fromkeys(keys)) == SemanticEPConfig()


@pytest.mark.parametrize("section", [[], "yes", 3, {"groups": 4}, {"groups": {"ep_size": []}}])
def test_wrong_types_are_config_errors(section):
    with pytest.raises(ConfigError):
        resolve(section)


def test_ep_size_that_does_not_divide_names_the_valid_ones():
    groups = resolve({"groups": {"ep_size": 6}}).groups
    with pytest.raises(ConfigError) as error:
        groups.check_divides(64, layer=3)
    assert str(error.value) == (
        "semantic_ep.groups.ep_size = 6 does not divide num_experts = 64 (layer 3). "
        'Valid: 1, 2, 4, 8, 16, 32, 64. Set "groups.ep_size" or --semantic-ep-groups-ep-size.'
    )
    groups.check_divides(48, layer=3)


def test_the_schema_and_the_table_name_every_setting():
    schema = config.json_schema()
    json.dumps(schema)
    table = config.markdown_table()
    for setting in settings():
        assert setting.description, setting
        for spelling in (setting.json_path, setting.flag, setting.variable):
            assert f"`{spelling}`" in table
    assert set(schema["properties"]["semantic_ep"]["properties"]) == set(
        SemanticEPConfig.model_fields
    )
