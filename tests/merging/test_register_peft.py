"""`OSD` as a type of PEFT: made known once, taken back, and never half of it."""

import copy
import pickle

import pytest
from peft.utils import PeftType

import hf_ext
from hf_ext.merging.osd_config import OSDConfig
from hf_ext.registration import register_peft


@pytest.fixture(autouse=True)
def _unregistered():
    hf_ext.unregister()
    yield
    hf_ext.unregister()


def test_registering_is_idempotent_and_undone():
    from peft import mapping

    tables = [mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING]
    tables.append(mapping.PEFT_TYPE_TO_PREFIX_MAPPING)
    before = list(PeftType)
    assert "OSD" not in PeftType.__members__
    assert not any("OSD" in table for table in tables)
    assert OSDConfig().peft_type == "OSD"
    assert type(OSDConfig().peft_type) is str
    for _ in range(2):
        register_peft()
        hf_ext.register()
    assert list(PeftType) == [*before, PeftType.OSD]
    assert PeftType("OSD") is PeftType.OSD
    assert pickle.loads(pickle.dumps(PeftType.OSD)) is copy.deepcopy(PeftType.OSD) is PeftType.OSD
    assert OSDConfig().peft_type is PeftType.OSD
    assert all(PeftType.OSD in table for table in tables)
    hf_ext.unregister()
    assert list(PeftType) == before
    assert not hasattr(PeftType, "OSD")
    with pytest.raises(ValueError, match="not a valid PeftType"):
        PeftType("OSD")
    assert not any("OSD" in table for table in tables)
    register_peft()
    with hf_ext.registered():
        pass
    assert "OSD" in PeftType.__members__


def test_a_method_of_peft_with_our_name_is_not_replaced(monkeypatch):
    monkeypatch.setattr("hf_ext.registration.PEFT_METHOD", "lora")
    with pytest.raises(RuntimeError, match="method LORA of its own"):
        register_peft()


@pytest.mark.parametrize("error", [KeyError("taken"), KeyboardInterrupt()])
def test_a_registration_that_fails_leaves_nothing_half_registered(monkeypatch, error):
    from transformers.generation import configuration_utils

    def fail(**kwargs):
        raise error

    before, names = list(PeftType), configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    monkeypatch.setattr("peft.utils.register_peft_method", fail)
    for call in (register_peft, hf_ext.register):
        with pytest.raises(type(error)):
            call()
        assert list(PeftType) == before
        assert not hasattr(PeftType, "OSD")
        assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS is names
    monkeypatch.undo()
    hf_ext.register()
    assert PeftType("OSD") is PeftType.OSD
    assert "packed" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
