"""What `hf_ext.register()` tells transformers about our models: their config, their class, their task. All of it reversible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

from hf_ext.pipelines import ood_model, ood_pipeline, tccm, tccm_pipeline
from hf_ext.pipelines.tables import TableFeatureExtractor


_undo: list[Callable[[], None]] = []


def register_models() -> None:
    """Makes our models known to `AutoConfig`, `AutoModel` and `pipeline`; repeating it changes nothing."""
    if _undo:
        return
    try:
        _register(
            tccm.MODEL_TYPE, tccm.TCCMConfig, tccm.TCCMModel, tccm_pipeline.TASK, tccm_pipeline.TabularAnomalyPipeline
        )
        _keep(FEATURE_EXTRACTOR_MAPPING._extra_content, tccm.TCCMConfig)
        AutoFeatureExtractor.register(tccm.TCCMConfig, TableFeatureExtractor, exist_ok=True)
        _register(
            ood_model.MODEL_TYPE, ood_model.OODConfig, ood_model.OODModel, ood_pipeline.TASK, ood_pipeline.OODPipeline
        )
    except BaseException:
        unregister_models()
        raise


def unregister_models() -> None:
    """Puts back what `register_models()` replaced, the same objects."""
    while _undo:
        _undo.pop()()


def _register(model_type: str, config: Any, model: Any, task: str, pipeline: Any) -> None:
    _keep(CONFIG_MAPPING._extra_content, model_type)
    _keep(MODEL_MAPPING._extra_content, config)
    _keep(PIPELINE_REGISTRY.supported_tasks, task)
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=pipeline, pt_model=AutoModel, type="multimodal")
    # Otherwise a saved pipeline carries a copy of its file, and asks its readers to trust it.
    del pipeline._registered_impl


def _keep(table: dict, key: Any) -> None:
    """Remembers an entry of a table, to be put back."""
    missing = object()
    before = table.get(key, missing)

    def undo() -> None:
        if before is missing:
            table.pop(key, None)
        else:
            table[key] = before

    _undo.append(undo)
