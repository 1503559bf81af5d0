"""What cannot run is refused before anything starts, naming the key, the value and what would work."""

import inspect
import json
import sys
from pathlib import Path

import pytest
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_opd.config import ConfigError, ModelConfig, ParallelConfig
from megatron_opd.models.build import check_layout
from megatron_opd.models.specs import refuse_foreign_apex, use_transformer_engine
from megatron_opd.parallel.groups import check_world


@pytest.fixture
def model(tmp_path: Path) -> str:
    """12 heads in 4 groups, 6 layers."""
    shape = {
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tensor": 5}, r"student.parallel.tensor: 5 does not divide the 12 attention heads; .*1, 2, 4"),
        ({"tensor": 3}, r"tensor: 3 does not divide the 4 key/value heads"),
        ({"pipeline": 4}, r"student.parallel.pipeline: 4 \(x virtual_pipeline 1\) does not divide the 6 layers"),
        ({"pipeline": 2, "virtual_pipeline": 2}, r"pipeline: 2 \(x virtual_pipeline 2\) does not divide the 6 layers"),
        ({"expert": 2}, r"student.parallel.expert: 2 does not divide the 0 experts"),
    ],
)
def test_layouts_that_do_not_divide_the_model(model: str, parallel: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout("student", ModelConfig(model=model, parallel=ParallelConfig(**parallel)))


def test_a_layout_that_divides_passes(model: str) -> None:
    check_layout("student", ModelConfig(model=model, parallel=ParallelConfig(tensor=4, pipeline=3)))


def test_a_world_that_the_layout_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"teacher.parallel: tensor 2 x .* = 4 does not divide .* 6; start"):
        check_world("teacher", ParallelConfig(tensor=2, pipeline=2), 6)
    check_world("teacher", ParallelConfig(tensor=2, pipeline=2), 8)
    with pytest.raises(ConfigError, match=r"student.parallel: tensor 2 x .* x context 3 = 6 does not divide .* 8"):
        check_world("student", ParallelConfig(tensor=2, context=3), 8)
    check_world("student", ParallelConfig(tensor=2, context=2), 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fp8": "hybrid"}, "teacher.fp8: hybrid needs a GPU"),
        ({"implementation": "transformer_engine"}, "implementation: transformer_engine needs a GPU"),
    ],
)
def test_what_needs_a_gpu_does_not_fall_back(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        use_transformer_engine("teacher", ModelConfig(model="/m", **values), cpu=True)


def test_auto_is_local_in_fp32_on_a_gpu() -> None:
    assert not use_transformer_engine("teacher", ModelConfig(model="/m", precision="fp32"), cpu=False)


def test_a_model_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="student.model: no directory"):
        check_layout("student", ModelConfig(model=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="has no config.json"):
        check_layout("student", ModelConfig(model=str(tmp_path)))


def test_the_apex_of_pypi_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(RuntimeError, match="is not NVIDIA's apex"):
        refuse_foreign_apex()


def test_private_names_that_we_override_still_exist() -> None:
    """parallel/schedule.py overrides the shape exchange, models/cached.py swaps the linear layers' function."""
    assert callable(P2PCommunicator._communicate_shapes)
    for layer in (ColumnParallelLinear, RowParallelLinear):
        assert "self._forward_impl" in inspect.getsource(layer)
