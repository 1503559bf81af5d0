"""Parts that a config names: those of the package, one's own, and what each of them goes with."""

from __future__ import annotations

import pytest

from megatron_opd.config import ConfigError
from megatron_opd.plugins import LOSSES
from tests.config.test_config import read

KEYS = ("prune.signal", "loss.kind", "rollout.engine", "data.verifier")


@pytest.mark.parametrize("key", KEYS)
def test_a_name_is_the_packages_or_your_own(key: str) -> None:
    section, name = key.split(".")
    others = {"prompts": "/p.jsonl"} if section == "data" else {}
    assert getattr(getattr(read(**{section: {name: "my.module:Thing"} | others}), section), name) == "my.module:Thing"
    for wrong in ("overlapp", "module:", ":Thing", "my module:Thing", "a:b:c"):
        with pytest.raises(ConfigError, match=rf"{key}: must be one of .*, or your own as MODULE:NAME \(got '{wrong}'"):
            read(**{section: {name: wrong} | others})


def test_options_go_to_a_loss_of_ones_own() -> None:
    assert read(loss={"kind": "mine:Loss", "options": {"alpha": 0.3}}).loss.parameters == {"alpha": 0.3}
    fused = {"loss": {"kind": "generalized_jsd", "jsd_beta": 0.2}, "score": {"mode": "fused"}}
    assert read(**fused).loss.parameters == {"jsd_beta": 0.2}
    with pytest.raises(ConfigError, match="options: are for a loss of your own"):
        read(loss={"options": {"alpha": 0.3}})


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_reads_the_teachers_logits_needs_fused_scoring(kind: str) -> None:
    if kind in ("topk_reverse_kl", "sampled_reverse_kl"):
        read(loss={"kind": kind, "fused_head": True})
    else:
        with pytest.raises(ConfigError, match=f"loss.kind: {kind} reads the teacher's whole distribution"):
            read(loss={"kind": kind})
        with pytest.raises(ConfigError, match="set loss.fused_head: false"):
            read(loss={"kind": kind, "fused_head": True}, score={"mode": "fused"})


def test_who_builds_a_loss_of_ones_own_asks_what_it_goes_with() -> None:
    config = read(loss={"kind": "mine:Loss", "fused_head": True})
    assert config.loss_problems("candidates", fused_head=True) == []
    assert "score.mode: fused" in config.loss_problems("logits", fused_head=True)[0]
    assert "loss.fused_head: false" in config.loss_problems("sampled", fused_head=False)[0]
