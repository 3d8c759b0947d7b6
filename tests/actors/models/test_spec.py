"""Settings of a model worker: names of values that have changed."""

from __future__ import annotations

import json

import pytest

from actors.models.spec import LoraSpec
from actors.spec import OldValue


def test_a_value_under_its_old_name_is_read_and_the_new_one_said():
    with pytest.warns(OldValue, match=r"^model\.lora\.expert_impl: 'beside' is now called 'unmerged'"):
        spec = LoraSpec.model_validate({"expert_impl": "beside"}, strict=True)
    assert spec.expert_impl == "unmerged"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["auto", "unmerged", "peft"])
def test_present_names_are_read_in_silence(name):
    assert LoraSpec(expert_impl=name).expert_impl == name


@pytest.mark.parametrize("wrong", ["Beside", 3, ["beside"]])
def test_other_values_are_refused_with_the_present_names(wrong):
    with pytest.raises(ValueError, match=r"'auto', 'unmerged' or 'peft'"):
        LoraSpec.model_validate({"expert_impl": wrong}, strict=True)


def test_the_schema_knows_the_present_names_only():
    schema = LoraSpec.model_json_schema()["properties"]["expert_impl"]
    assert schema["enum"] == ["auto", "unmerged", "peft"]
    assert "beside" not in json.dumps(LoraSpec.model_json_schema())
