"""Thirteen research methods as plugins for transformers, peft, accelerate, datasets and the Hub."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# In a checkout the areas are siblings of this folder; the wheel puts them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "cache_impls").is_dir():
    __path__.append(str(_checkout))

_EXPORTS = {
    "AdapterStateError": "hf_ext.errors",
    "ArtifactError": "hf_ext.errors",
    "BlobError": "hf_ext.errors",
    "CacheStateError": "hf_ext.errors",
    "CheckpointError": "hf_ext.errors",
    "ConfigError": "hf_ext.errors",
    "DataError": "hf_ext.errors",
    "DeltaError": "hf_ext.errors",
    "HfExtError": "hf_ext.errors",
    "HubError": "hf_ext.errors",
    "HybridKVCache": "hf_ext.cache_impls.hybridkv",
    "HybridKVConfig": "hf_ext.cache_impls.hybridkv",
    "MedixConfig": "hf_ext.pipelines.medix",
    "MedixFilter": "hf_ext.pipelines.medix",
    "MissingPackageError": "hf_ext.errors",
    "NonFiniteGradientError": "hf_ext.errors",
    "OODConfig": "hf_ext.pipelines.ood_model",
    "OODModel": "hf_ext.pipelines.ood_model",
    "OODTrainer": "hf_ext.pipelines.ood_trainer",
    "OODTrainingArguments": "hf_ext.pipelines.ood_trainer",
    "OSDArtifact": "hf_ext.merging.osd_artifact",
    "OSDConfig": "hf_ext.merging.osd_config",
    "OjaKVCache": "hf_ext.cache_impls.ojakv",
    "OjaKVConfig": "hf_ext.cache_impls.ojakv",
    "PackedCache": "hf_ext.cache_impls.packed",
    "SGCAdamW": "hf_ext.trainers.sgc_optimizer",
    "SGCConfig": "hf_ext.trainers.sgc_trainer",
    "SGCConfigMixin": "hf_ext.trainers.sgc_trainer",
    "SGCMixin": "hf_ext.trainers.sgc_trainer",
    "SGCTrainer": "hf_ext.trainers.sgc_trainer",
    "SentenceKVCache": "hf_ext.cache_impls.sentencekv",
    "SentenceKVConfig": "hf_ext.cache_impls.sentencekv",
    "TCCMConfig": "hf_ext.pipelines.tccm",
    "TCCMDetector": "hf_ext.pipelines.tccm_detector",
    "TCCMModel": "hf_ext.pipelines.tccm",
    "TCCMPipeline": "hf_ext.pipelines.tccm_pipeline",
    "UnsupportedModelError": "hf_ext.errors",
    "compress_delta": "hf_ext.merging.compress",
    "load_adapter": "hf_ext.merging.adapters",
    "ood_metrics": "hf_ext.pipelines.ood_metrics",
    "pull_artifact": "hf_ext.hub_tools.push",
    "push_artifact": "hf_ext.hub_tools.push",
    "register": "hf_ext.registration",
    "registered": "hf_ext.registration",
    "restore": "hf_ext.merging.osd_artifact",
    "sentence_boundary_ids": "hf_ext.cache_impls.sentences",
    "unregister": "hf_ext.registration",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from hf_ext.cache_impls.hybridkv import HybridKVCache as HybridKVCache
    from hf_ext.cache_impls.hybridkv import HybridKVConfig as HybridKVConfig
    from hf_ext.cache_impls.ojakv import OjaKVCache as OjaKVCache
    from hf_ext.cache_impls.ojakv import OjaKVConfig as OjaKVConfig
    from hf_ext.cache_impls.packed import PackedCache as PackedCache
    from hf_ext.cache_impls.sentencekv import SentenceKVCache as SentenceKVCache
    from hf_ext.cache_impls.sentencekv import SentenceKVConfig as SentenceKVConfig
    from hf_ext.cache_impls.sentences import sentence_boundary_ids as sentence_boundary_ids
    from hf_ext.errors import AdapterStateError as AdapterStateError
    from hf_ext.errors import ArtifactError as ArtifactError
    from hf_ext.errors import BlobError as BlobError
    from hf_ext.errors import CacheStateError as CacheStateError
    from hf_ext.errors import CheckpointError as CheckpointError
    from hf_ext.errors import ConfigError as ConfigError
    from hf_ext.errors import DataError as DataError
    from hf_ext.errors import DeltaError as DeltaError
    from hf_ext.errors import HfExtError as HfExtError
    from hf_ext.errors import HubError as HubError
    from hf_ext.errors import MissingPackageError as MissingPackageError
    from hf_ext.errors import NonFiniteGradientError as NonFiniteGradientError
    from hf_ext.errors import UnsupportedModelError as UnsupportedModelError
    from hf_ext.hub_tools.push import pull_artifact as pull_artifact
    from hf_ext.hub_tools.push import push_artifact as push_artifact
    from hf_ext.merging.adapters import load_adapter as load_adapter
    from hf_ext.merging.compress import compress_delta as compress_delta
    from hf_ext.merging.osd_artifact import OSDArtifact as OSDArtifact
    from hf_ext.merging.osd_artifact import restore as restore
    from hf_ext.merging.osd_config import OSDConfig as OSDConfig
    from hf_ext.pipelines.medix import MedixConfig as MedixConfig
    from hf_ext.pipelines.medix import MedixFilter as MedixFilter
    from hf_ext.pipelines.ood_metrics import ood_metrics as ood_metrics
    from hf_ext.pipelines.ood_model import OODConfig as OODConfig
    from hf_ext.pipelines.ood_model import OODModel as OODModel
    from hf_ext.pipelines.ood_trainer import OODTrainer as OODTrainer
    from hf_ext.pipelines.ood_trainer import OODTrainingArguments as OODTrainingArguments
    from hf_ext.pipelines.tccm import TCCMConfig as TCCMConfig
    from hf_ext.pipelines.tccm import TCCMModel as TCCMModel
    from hf_ext.pipelines.tccm_detector import TCCMDetector as TCCMDetector
    from hf_ext.pipelines.tccm_pipeline import TCCMPipeline as TCCMPipeline
    from hf_ext.registration import register as register
    from hf_ext.registration import registered as registered
    from hf_ext.registration import unregister as unregister
    from hf_ext.trainers.sgc_optimizer import SGCAdamW as SGCAdamW
    from hf_ext.trainers.sgc_trainer import SGCConfig as SGCConfig
    from hf_ext.trainers.sgc_trainer import SGCConfigMixin as SGCConfigMixin
    from hf_ext.trainers.sgc_trainer import SGCMixin as SGCMixin
    from hf_ext.trainers.sgc_trainer import SGCTrainer as SGCTrainer


def __getattr__(name: str) -> Any:
    try:
        module = _EXPORTS[name]
    except KeyError:
        raise AttributeError(f"module 'hf_ext' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
