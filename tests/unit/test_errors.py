from semantic_ep.errors import explain, nearest


def test_a_message_says_where_what_got_allowed_and_do():
    message = explain(
        "not a valid value", where="--flag", got=7, allowed=[1, 2], do="Set --flag to one of them"
    )
    assert message == "--flag: not a valid value (got 7). Allowed: 1, 2. Set --flag to one of them."


def test_a_question_keeps_its_mark():
    assert explain("unknown key", do="Did you mean x?").endswith("Did you mean x?")


def test_nearest_finds_a_typo_and_nothing_far_away():
    assert nearest("ep_sise", ["ep_size", "scope"]) == "ep_size"
    assert nearest("zebra", ["ep_size", "scope"]) is None
