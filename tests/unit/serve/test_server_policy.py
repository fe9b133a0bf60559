"""Which policy a server's settings mean."""

import pytest

from semantic_ep.config import SemanticEPConfig
from semantic_ep.errors import ConfigError
from semantic_ep.serve.scheduling.of_server import policy_of


def settings(**section):
    return SemanticEPConfig.resolve(json_section=section, environment={})


@pytest.mark.parametrize(
    ("section", "has_plan", "policy"),
    [
        ({}, True, "semantic"),
        ({}, False, "least-loaded"),
        ({"schedule": {"mode": "off"}}, True, "least-loaded"),
        ({"serve": {"attention": "tp"}}, True, "least-loaded"),
        ({"serve": {"policy": "round-robin"}}, True, "round-robin"),
        ({"serve": {"policy": "semantic-window"}}, True, "semantic-window"),
    ],
)
def test_a_policy_is_chosen_by_what_there_is(section, has_plan, policy):
    assert policy_of(settings(**section), has_plan=has_plan) == policy


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"serve": {"policy": "semantic"}}, "there is no plan"),
        ({"serve": {"policy": "semantic", "attention": "tp"}}, "all ranks serve every request"),
        (
            {"serve": {"policy": "semantic-window"}, "schedule": {"mode": "off"}},
            "schedule.mode is off",
        ),
    ],
)
def test_a_policy_that_lacks_what_it_looks_at_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        policy_of(settings(**section), has_plan=False)
