"""The warning that responses are trained on by their length."""

from __future__ import annotations

import json

from megatron_opd.rollout.lengths import FIRST, WINDOW, Lengths


def test_means_of_started_and_trained_responses() -> None:
    lengths = Lengths()
    lengths.start(0, 3)
    lengths.train(0, 0, 10)
    lengths.train(0, 0, 20)
    # The third has 60 tokens so far: 90 in 3 responses; two of 30 tokens together were trained on.
    assert lengths.metrics(0, [(0, 60)]) == {"length_started": 30, "length_trained": 15}
    lengths.start(1, 1)
    lengths.train(1, 0, 80)
    assert lengths.metrics(1, [(1, 0)]) == {"length_started": 110 / 4, "length_trained": 110 / 3}
    assert lengths.take_warning() == ""


def test_what_drifts_apart_is_said_once_and_survives_a_resume() -> None:
    lengths = Lengths()
    for step in range(FIRST + 3):
        lengths.start(step, 2)
        lengths.train(step, step, 10)
        under_way = [(s, 40) for s in range(step + 1)]
        lengths.metrics(step, under_way)
        warning = lengths.take_warning()
        assert bool(warning) is (step == FIRST)
        if warning:
            assert "10 tokens on average, those that were started 25" in warning
        again = Lengths()
        again.load_state_dict(json.loads(json.dumps(lengths.state_dict())))
        lengths = again


def test_old_steps_are_forgotten() -> None:
    lengths = Lengths()
    for step in range(WINDOW + 5):
        lengths.start(step, 1)
        lengths.train(step, step, step)
    mean = sum(range(5, WINDOW + 5)) / WINDOW
    assert lengths.metrics(WINDOW + 4, []) == {"length_started": mean, "length_trained": mean}
