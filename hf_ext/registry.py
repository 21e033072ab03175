"""The one table of methods. The command line, the docs index and the common tests read it; adding a method adds a row.

A row says where a method comes from, where it plugs in and whether it is built. A planned row has no config, entry or
bench: nothing may look finished that is not. Thirteen rows have a paper; a row without one is a method of our own.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from hf_ext.errors import ConfigError


AREAS = {
    "cache_impls": "key/value caches for generate",
    "trainers": "Trainer subclasses and optimizers",
    "merging": "deltas between checkpoints",
    "pipelines": "methods on datasets, no language model needed",
}


@dataclass(frozen=True)
class MethodCard:
    """One row of the table.

    Args:
        id (`str`): Name in the command line, in tags and of the source file.
        title (`str`): What it is, in a few words.
        arxiv (`str`, *optional*): arXiv number of the paper; `None` for a method that comes from none.
        area (`str`): A key of `AREAS`.
        plugs_into (`str`): The host library's call it works through.
        config (`str`, *optional*): `"module:Class"` of the settings. The three paths are set exactly when it is built.
        entry (`str`, *optional*): `"module:Class"` of the thing a user makes.
        bench (`str`, *optional*): Module with `run(seeds) -> list[Row]`.
    """

    id: str
    title: str
    arxiv: str | None
    area: str
    plugs_into: str
    config: str | None = None
    entry: str | None = None
    bench: str | None = None

    def __post_init__(self) -> None:
        if self.area not in AREAS:
            raise ConfigError(f"method {self.id!r} has area={self.area!r}; expected one of {', '.join(AREAS)}.")
        paths = (self.config, self.entry, self.bench)
        if any(paths) and not all(paths):
            raise ConfigError(f"method {self.id!r} is half registered: give config, entry and bench, or none of them.")

    @property
    def status(self) -> str:
        """`"available"` or `"planned"`."""
        return "available" if self.entry else "planned"

    @property
    def paper_url(self) -> str | None:
        """Page of the paper, if there is one."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


def build_table(*cards: MethodCard) -> dict[str, MethodCard]:
    """Cards by id; a `ConfigError` when two share an id."""
    table: dict[str, MethodCard] = {}
    for card in cards:
        if card.id in table:
            raise ConfigError(f"method id {card.id!r} is registered twice; ids are unique, rename one of the rows.")
        table[card.id] = card
    return table


def load(path: str) -> Any:
    """The object behind `"module:Name"`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


METHODS = build_table(
    MethodCard(
        "ojakv",
        "Context-aware online low-rank KV cache",
        "2509.21623",
        "cache_impls",
        'generate(cache_implementation="ojakv")',
        config="hf_ext.cache_impls.ojakv:OjaKVConfig",
        entry="hf_ext.cache_impls.ojakv:OjaKVCache",
        bench="hf_ext.benches.ojakv",
    ),
    MethodCard(
        "sentencekv",
        "Sentence-level semantic KV cache",
        "2504.00970",
        "cache_impls",
        'generate(cache_implementation="sentencekv")',
        config="hf_ext.cache_impls.sentencekv:SentenceKVConfig",
        entry="hf_ext.cache_impls.sentencekv:SentenceKVCache",
        bench="hf_ext.benches.sentencekv",
    ),
    MethodCard(
        "hybridkv",
        "Retrieved tokens exactly, all others by low-rank codes",
        None,
        "cache_impls",
        'generate(cache_implementation="hybridkv")',
        config="hf_ext.cache_impls.hybridkv:HybridKVConfig",
        entry="hf_ext.cache_impls.hybridkv:HybridKVCache",
        bench="hf_ext.benches.hybridkv",
    ),
    MethodCard(
        "sgc",
        "Sparse gradient compression of optimizer state",
        "2502.00311",
        "trainers",
        "Trainer, any training loop",
        config="hf_ext.trainers.sgc_trainer:SGCConfig",
        entry="hf_ext.trainers.sgc_optimizer:SGCAdamW",
        bench="hf_ext.benches.sgc",
    ),
    MethodCard("ofmu", "Bi-level, penalty-based unlearning", "2509.22483", "trainers", "Trainer.compute_loss"),
    MethodCard("influence", "Influence functions on masked gradients", "2509.15651", "trainers", "a trained Trainer"),
    MethodCard(
        "osd",
        "Sparse low-rank deltas of checkpoints",
        "2511.02681",
        "merging",
        "two checkpoints, PEFT",
        config="hf_ext.merging.osd_config:OSDConfig",
        entry="hf_ext.merging.osd_artifact:OSDArtifact",
        bench="hf_ext.benches.osd",
    ),
    MethodCard("rmm", "Reversible merging of low-rank weights", "2510.14163", "merging", "several adapters, PEFT"),
    MethodCard(
        "tccm",
        "Contraction matching for tabular anomalies",
        "2510.18328",
        "pipelines",
        "datasets.Dataset, scikit-learn",
        config="hf_ext.pipelines.tccm:TCCMConfig",
        entry="hf_ext.pipelines.tccm:TCCMModel",
        bench="hf_ext.benches.tccm",
    ),
    MethodCard(
        "medix",
        "Median filtering of wild data for OOD detection",
        "2510.06505",
        "pipelines",
        "Trainer, Dataset",
        config="hf_ext.pipelines.medix:MedixConfig",
        entry="hf_ext.pipelines.medix:MedixFilter",
        bench="hf_ext.benches.medix",
    ),
    MethodCard(
        "measurements", "Data measurements for choosing sellers", "2406.04257", "pipelines", "datasets.Dataset"
    ),
    MethodCard("graph_valuation", "Graph valuation by blind message passing", "2408.12659", "pipelines", "Dataset"),
    MethodCard("federated", "Dictator clients in federated learning", "2510.22149", "pipelines", "nn.Module, Dataset"),
    MethodCard("curation", "Recursive retraining under two curators", "2511.12804", "pipelines", "preference Dataset"),
)
