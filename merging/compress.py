"""`compress_delta`: from two checkpoints to an `OSDArtifact` of an asked size.

One pass over the delta takes four numbers of each tensor. They decide which tensors become signs, which factors, and which
are left out. Factors need a decomposition, once; signs only a second look at the delta. The parts are then fitted to the
bytes that headers and configs leave, counted on the encoded files themselves. With calibration data, the forms that come
into question are each put on the base model and measured by the divergence of its predictions from the fine-tuned ones.

Shapes: as in `osd.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_ext.errors import ConfigError
from hf_ext.log import get_logger, warn_once
from hf_ext.merging import osd
from hf_ext.merging.blob import Delta
from hf_ext.merging.calibrate import Calibration
from hf_ext.merging.codes import VALUE_BITS
from hf_ext.merging.deltas import Checkpoint, delta_entries, fingerprint, iter_deltas
from hf_ext.merging.fit import Spectrum, fit_factors, fit_signs, fit_sparse
from hf_ext.merging.osd_artifact import OSDArtifact, TensorReport
from hf_ext.merging.osd_config import OSDConfig


_logger = get_logger(__name__)

DEFAULT_SHARE = 2000  # of the checkpoint's bytes, when no budget is given
AUTO_BITS = (1, 2, 3, 4)
MOST_COLUMNS = 256
# Norms and biases are coded without data when they take no more than this share of the budget.
OTHER_SHARE = 0.03
# With data: when leaving them out costs this share of the whole divergence, which goes with the square of a change.
OTHER_DIVERGENCE = 0.001
# Kinds of layers whose deltas factors hold to this share of their energy become factors without data.
CAPTURED = 0.75
MOSTLY_ZERO = 0.5
EMBEDDINGS = (
    *("embed_tokens", "embed_in", "wte", "word_embeddings", "shared", "lm_head", "embed_out"),
    *("wpe", "embed_positions", "position_embeddings", "token_type_embeddings"),
)


@dataclass(frozen=True)
class TensorStats:
    """Of one delta `d` beside its base weight `w`: `E|d|`, `E d^2`, the share of zeros in `d`, and `E w^2`."""

    name: str
    shape: tuple[int, ...]
    kind: str
    mean_abs: float
    mean_square: float
    zeros: float
    weight_square: float

    @property
    def size(self) -> int:
        """Entries."""
        return int(torch.Size(self.shape).numel())

    @property
    def is_other(self) -> bool:
        """Whether it is a norm, a bias or an embedding, and not a matrix inside the network."""
        return len(self.shape) < 2 or self.kind in EMBEDDINGS

    @property
    def sides(self) -> tuple[int, int]:
        """`(n, d)` of the tensor as a matrix."""
        return self.shape[0], self.size // self.shape[0]


@dataclass
class Form:
    """One way to spend the budget: which tensors are signs and which are factors."""

    label: str
    signs: list[TensorStats]
    factors: list[TensorStats]
    fitted: dict[tuple, tuple] = field(default_factory=dict)


def compress_delta(
    base: str | os.PathLike | torch.nn.Module,
    tuned: str | os.PathLike | torch.nn.Module,
    config: OSDConfig | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    base_revision: str | None = None,
    progress: bool = True,
) -> OSDArtifact:
    """Compress what a fine-tune added to its base into a few bytes (OSD, arXiv 2511.02681).

    Args:
        base, tuned (`str`, `os.PathLike` or `nn.Module`): Folders, Hub ids or models of one architecture. Folders are
            read tensor by tensor.
        config (`OSDConfig`, *optional*): Budget and codec.
        calibration (`Iterable`, *optional*): Training texts of the fine-tune, never those it is judged on: strings,
            mappings with `input_ids` (and `attention_mask`, `labels`), a `datasets.Dataset` or a `DataLoader` of such.
            With it both models are loaded and the codec is chosen by measured divergence. Padding is cut off, and examples
            with nothing to predict are skipped.
        base_revision (`str`, *optional*): Revision of the base on the Hub.
        progress (`bool`): Show progress bars.

    Returns:
        `OSDArtifact`: at most `config.budget` bytes once saved.

    Raises:
        `DeltaError`: the checkpoints have no usable difference, or it is not finite. `ConfigError`: a setting that cannot
            work for these checkpoints, such as a budget below one entry, or a data-driven score without data.
    """
    config = config or OSDConfig()
    if config.needs_gradients and calibration is None:
        raise ConfigError(
            f"OSDConfig.importance={config.importance!r} needs calibration data; pass calibration=... or take "
            '"magnitude" or "energy".'
        )
    job = _Compression(base, tuned, config, base_revision, progress)
    measure = None
    if calibration is not None:
        measure = Calibration(
            base, tuned, calibration, config.calibration_samples, job.base.source, progress, base_revision
        )
    return job.run(measure)


class _Compression:
    def __init__(self, base, tuned, config: OSDConfig, revision: str | None, progress: bool) -> None:
        self.base = Checkpoint.open(base, revision=revision)
        self.tuned = Checkpoint.open(tuned)
        self.config, self.progress = config, progress
        self.entries = {entry.name: entry for entry in delta_entries(self.base, self.tuned)}
        self.positions = {name: position for position, name in enumerate(self.entries)}
        self.loading = _loading(tuned)
        self.stats = self._walk()
        self.spectra: dict[str, Spectrum] = {}
        self.gradients: dict[str, Tensor] = {}
        self.fingerprints: dict[tuple[str, ...], dict[str, str]] = {}

    def run(self, measure: Calibration | None) -> OSDArtifact:
        config = self.config
        matrices = [item for item in self.stats if not item.is_other and self._is_wanted(item.name)]
        if not any(item.mean_abs for item in self.stats):
            return self._finish({}, Form("nothing changed", [], []), measure)
        moved = [item for item in matrices if item.mean_abs]
        budget = self._budget(moved)
        others, choice = self._others(moved, measure, budget)
        if measure is not None and config.codec == "sparse" and config.importance not in ("magnitude", "energy"):
            score = "taylor" if config.importance == "auto" else config.importance
            self.gradients = measure.gradients([item.name for item in moved], score)
        forms = self._forms(moved, others, budget, measure is not None)
        artifacts = [(form, self._fill(form, budget, choice)) for form in forms]
        if measure is not None:
            artifacts = [self._best(artifacts, measure)]
        form, deltas = artifacts[0]
        artifact = self._finish(deltas, form, measure, choice)
        if config.mode == "paper" or (over := artifact.nbytes() - budget) <= 0:
            return artifact
        # The measured numbers are longer than usual ones.
        return self._finish(self._fill(form, budget - over - 8, choice), form, measure, choice)

    def _is_wanted(self, name: str) -> bool:
        wanted = self.config.target_modules
        module = name.rpartition(".")[0]
        return wanted is None or any(module == end or module.endswith("." + end) for end in wanted)

    def _bar(self, items: Iterable, total: int, what: str) -> Iterable:
        return tqdm(items, total=total, desc=what, disable=None if self.progress else True, leave=False)

    def _walk(self) -> list[TensorStats]:
        found = []
        for entry, delta in self._bar(iter_deltas(self.base, self.tuned), len(self.entries), "reading"):
            plain = entry.name.rpartition(".")[2] in ("weight", "bias")
            if delta.dim() == 0 or delta.numel() == 0 or not plain:
                if delta.numel() and bool((delta != 0).any()):
                    warn_once(
                        _logger,
                        f"{entry.name} of shape {tuple(delta.shape)} is left out of the delta: PEFT opens weights and "
                        "biases of modules alone.",
                    )
                continue
            weight = self.base.tensor(entry.name).float()
            numbers = (
                delta.abs().mean(dtype=torch.float64),
                delta.pow(2).mean(dtype=torch.float64),
                1 - torch.count_nonzero(delta) / delta.numel(),
                weight.pow(2).mean(dtype=torch.float64),
            )
            found.append(TensorStats(entry.name, entry.shape, entry.kind, *map(float, numbers)))
        return found

    def _budget(self, moved: list[TensorStats]) -> int:
        """Bytes of the whole artifact; in paper mode, of the factors alone."""
        config = self.config
        if config.budget is not None:
            return config.budget
        if config.rank is not None:
            smallest = min((min(item.sides) for item in moved), default=1)
            if config.rank > smallest:
                raise ConfigError(
                    f"OSDConfig.rank={config.rank} exceeds {smallest}, the smaller side of a matrix; use a rank up to it."
                )
            return sum(4 * config.rank * sum(item.sides) for item in moved)
        return max(self.tuned.total_bytes() // DEFAULT_SHARE, 20_000)

    def _changed_others(self) -> list[TensorStats]:
        return [item for item in self.stats if item.is_other and item.mean_abs and self._is_wanted(item.name)]

    def _others(
        self, moved: list[TensorStats], measure: Calibration | None, budget: int
    ) -> tuple[list[TensorStats], str]:
        """Norms, biases and embeddings to code, and a line that says why."""
        others = self._changed_others()
        if not others:
            return [], "no norm, bias or embedding changed"
        if self.config.other_tensors == "drop" or not moved:
            return (
                ([], "norms, biases and embeddings left out, as asked") if moved else (others, "nothing else changed")
            )
        if self.config.other_tensors == "code":
            return others, "norms, biases and embeddings coded, as asked"
        groups = {"embeddings": [i for i in others if i.kind in EMBEDDINGS]}
        groups["norms and biases"] = [i for i in others if i.kind not in EMBEDDINGS]
        kept, said = [], []
        for what, group in groups.items():
            if not group:
                continue
            if measure is not None:
                share = measure.cost_of_leaving_out([item.name for item in group])
                use, why = share > OTHER_DIVERGENCE, f"without them {100 * share:.2g} % of the divergence remains"
            elif what == "embeddings":
                use, why = True, "no data to tell what they are worth"
            else:
                share = sum(item.size for item in group) / 4 / budget
                use, why = share <= OTHER_SHARE, f"two bits for each entry are {100 * share:.2g} % of the budget"
            said.append(f"{what} {'coded' if use else 'left out'}: {why}")
            kept += group if use else []
        return kept, "; ".join(said)

    def _forms(self, moved: list[TensorStats], others: list[TensorStats], budget: int, both: bool) -> list[Form]:
        """The ways to spend the budget that come into question, the likeliest first; one, unless `both`."""
        codec = self.config.codec
        # Signs at random places say little of a table most of whose rows did not move, and nothing for a vector.
        aside = [item for item in others if len(item.shape) < 2 or item.zeros > MOSTLY_ZERO]
        everything = moved + [item for item in others if item not in aside]
        # Beside factors, what the others are worth a byte decides; nothing has to be left out beforehand.
        rest = [item for item in self._changed_others() if self.config.other_tensors != "drop"]
        signs = Form("signs", everything, aside)
        factors = Form("sparse factors" if codec == "sparse" else "factors", [], moved + rest)
        if codec != "auto":
            return [signs if codec == "signs" else factors]
        low = self._low_rank_kinds(everything, budget)
        if low:
            as_signs = [item for item in everything if item.kind not in low]
            first = Form("signs and factors", as_signs, [i for i in everything if i.kind in low] + aside)
            first = first if as_signs else factors
            return [first, *([] if first is factors else [factors]), signs] if both else [first]
        return [signs, factors] if both else [signs]

    def _low_rank_kinds(self, everything: list[TensorStats], budget: int) -> set[str]:
        """Kinds of layers whose deltas fit into factors of two bits at the bytes they get, judged on two of each."""
        whole = sum(item.size for item in everything)
        kinds: dict[str, list[TensorStats]] = {}
        for item in everything:
            kinds.setdefault(item.kind, []).append(item)
        asked = {}
        for group in kinds.values():
            for item in {group[len(group) // 3], group[2 * len(group) // 3]}:
                columns = int(4 * budget * item.size / whole / sum(item.sides))
                if columns:
                    asked[item.name] = (item, min(columns, MOST_COLUMNS))
        captured: dict[str, list[float]] = {}
        for entry, delta in self._bar(iter_deltas(self.base, self.tuned, asked), len(asked), "looking for low rank"):
            item, columns = asked[entry.name]
            matrix = delta.reshape(item.sides)
            sigma = osd.truncated_svd(matrix, columns, power_iterations=self.config.power_iterations)[1]
            share = float(sigma.pow(2).sum()) / (item.mean_square * item.size)
            captured.setdefault(item.kind, []).append(share * (1 - osd.DISTORTION[2]) ** 2)
        return {kind for kind, shares in captured.items() if min(shares) >= CAPTURED}

    def _best(self, forms: list[tuple[Form, dict[str, Delta]]], measure: Calibration) -> tuple[Form, dict[str, Delta]]:
        """The first form, unless another one leaves less than half of its measured divergence.

        Divergence counts the noise of signs in full, also where it changes no answer, and so leans to factors.
        """
        found = [(measure.divergence(deltas), form, deltas) for form, deltas in forms]
        best = min(found, key=lambda item: item[0])
        best = found[0] if 2 * best[0] > found[0][0] else best
        for divergence, form, _ in found:
            _logger.info("%s: divergence %.4f", form.label, divergence)
        return best[1:]

    def _fill(self, form: Form, budget: int, choice: str) -> dict[str, Delta]:
        """Deltas whose artifact has at most `budget` bytes, and as many of them as there are uses for."""
        if self.config.mode == "paper":
            return self._encode(form, budget)
        # Numbers of the usual length take the place of those of the final report.
        filler = tuple(TensorReport(item.name, item.kind, 1.0, 0.5) for item in self.stats if item.mean_abs)
        known = {"reports": filler, "recovery": 0.9999}
        empty = self._artifact({}, form, choice, **known).nbytes()
        room, low, high, best, largest = budget - empty, 0, budget, None, 0
        for _ in range(14 if room > 0 else 0):
            deltas = self._encode(form, room)
            size = self._artifact(deltas, form, choice, **known).nbytes()
            if size <= budget:
                low = room
                if deltas and size > largest:
                    best, largest = deltas, size
            else:
                high = room
            if 0.995 * budget <= size <= budget or high - low < 16:
                break
            room += budget - size
            if not low < room < high:
                room = (low + high) // 2
        if not best:
            raise ConfigError(
                f"OSDConfig.budget={budget} bytes does not hold a single entry: headers and configs take {empty} bytes, "
                f"and a column of factors what its layer asks for; use at least {empty + 1000}."
            )
        return best

    def _encode(self, form: Form, room: int) -> dict[str, Delta]:
        """Deltas of about `room` bytes."""
        config = self.config
        sign_size = sum(item.size for item in form.signs)
        factor_size = sum(item.size for item in form.factors if len(item.shape) >= 2)
        vector_bytes = sum(6 + item.size // 2 for item in form.factors if len(item.shape) < 2)
        sign_room = (room - vector_bytes) * sign_size / max(sign_size + factor_size, 1) if sign_size else 0.0
        plan = self._plan_factors(form.factors, room - int(sign_room))
        density = max(8 * (sign_room - 14 * len(form.signs)), 0) / max(sign_size, 1)
        wanted = {item.name: item for item in form.signs if density} | {
            item.name: item for item in form.factors if plan.get(item.name)
        }
        order = [name for name in self.entries if name in wanted]
        deltas = {}
        as_signs = {item.name for item in form.signs}
        missing = [name for name in order if name in as_signs or (name, repr(plan[name])) not in form.fitted]
        fresh = {}
        if missing:
            for entry, delta in self._bar(iter_deltas(self.base, self.tuned, missing), len(missing), form.label):
                item = wanted[entry.name]
                matrix = delta.reshape(item.sides)
                if entry.name in as_signs:
                    fresh[entry.name] = fit_signs(
                        matrix, density, self._seed(entry.name), _noise_limit(config, item), config.strength
                    )
                else:
                    form.fitted[entry.name, repr(plan[entry.name])] = self._fit(item, matrix, plan[entry.name])
        for name in order:
            terms = fresh[name] if name in as_signs else form.fitted[name, repr(plan[name])]
            if terms:
                deltas[name] = Delta(wanted[name].shape, terms)
        return deltas

    def _seed(self, name: str) -> int:
        """Of a tensor's places: the position of its name, so that tensors of one shape do not share places."""
        return (self.config.seed + 7919 * self.positions[name]) % 2**32

    def _plan_factors(self, items: list[TensorStats], room: int) -> dict[str, Any]:
        """By tensor: bits of its columns, or bytes if factors are sparse."""
        if not items or room <= 0:
            return {}
        config = self.config
        ends = {item.name: sum(item.sides) for item in items}
        if config.codec == "sparse":
            self._decompose(items, room)
            whole = sum(ends.values())
            return {name: room * end // whole for name, end in ends.items()}
        bits = AUTO_BITS if config.values == "auto" else (VALUE_BITS[config.values],)
        self._decompose(items, room)
        gains = {item.name: self.spectra[item.name].sigma.pow(2) for item in items}
        # Steps of the two sides, and about ten bytes for a term of its own.
        if config.scope == "global":
            return osd.allocate(gains, ends, room, bits, column_bytes=6)
        whole = sum(ends.values())
        plan: dict[str, Any] = {}
        for name, end in ends.items():
            plan |= osd.allocate({name: gains[name]}, {name: end}, room * end // whole, bits, column_bytes=6)
        return plan

    def _decompose(self, items: list[TensorStats], room: int) -> None:
        missing = [item.name for item in items if item.name not in self.spectra]
        if not missing:
            return
        config = self.config
        whole = sum(sum(item.sides) for item in items)
        narrow = 32 if config.mode == "paper" else VALUE_BITS.get(config.values, 2)
        columns = int(8 * room / (whole * narrow)) + 1
        most = max(min(max(5 * columns, 8), MOST_COLUMNS), self.config.rank or 0)
        if config.relaxation is not None:
            most = columns + config.relaxation
        for entry, delta in self._bar(iter_deltas(self.base, self.tuned, missing), len(missing), "decomposing"):
            matrix = delta.reshape(entry.shape[0], -1)
            self.spectra[entry.name] = Spectrum(
                *osd.truncated_svd(
                    matrix, most, config.svd == "exact", config.power_iterations, seed=self._seed(entry.name)
                )
            )

    def _fit(self, item: TensorStats, matrix: Tensor, plan: Any) -> tuple:
        config, spectrum = self.config, self.spectra[item.name]
        if config.codec != "sparse":
            return fit_factors(matrix, spectrum, plan, config.refit_steps)
        score = "taylor" if config.importance == "auto" else config.importance
        if item.name not in self.gradients and score not in ("magnitude", "energy"):
            score = "magnitude"  # without data, and for embeddings
        return fit_sparse(
            matrix,
            spectrum,
            plan,
            "int4" if config.values == "auto" else config.values,
            None if config.relaxation is None else [config.relaxation],
            score,
            self.gradients.get(item.name),
            config.selection == "joint",
            config.refit_steps,
            flat_index=config.mode == "paper",
        )

    def _artifact(self, deltas: dict[str, Delta], form: Form, choice: str, **measured: Any) -> OSDArtifact:
        """The object; modules with a matrix are its `target_modules`, embeddings, norms and the rest `extra_modules`."""
        tied = {
            alias.rpartition(".")[0]: name.rpartition(".")[0]
            for alias, name in self.base.tied.items()
            if name in deltas
        }
        names = list(deltas) or list(self.entries)[:1]
        others = {item.name for item in self.stats if item.is_other}
        matrices = {name.rpartition(".")[0] for name in names if name not in others}
        extra = {name.rpartition(".")[0] for name in names if name in others} - matrices
        if form.label == "factors" and self.config.other_tensors != "drop" and (changed := self._changed_others()):
            coded = sum(item.name in deltas for item in changed)
            choice = (
                f"{coded} of {len(changed)} norms, biases and embeddings coded: by energy a byte, beside the matrices"
            )
        config = replace(
            self.config,
            target_modules=_endings(matrices),
            extra_modules=_endings(extra) or None,
            tied=tied or None,
            base_fingerprint=self._fingerprint(tuple(names)),
            base_model_name_or_path=self.base.source,
            **self.loading,
            revision=self.base.revision,
            inference_mode=True,
        )
        return OSDArtifact(deltas, config, form.label, choice, bytes_before=self.tuned.total_bytes(), **measured)

    def _fingerprint(self, names: tuple[str, ...]) -> dict[str, str]:
        if names not in self.fingerprints:
            self.fingerprints[names] = fingerprint((name, self.base.tensor(name)) for name in names)
        return self.fingerprints[names]

    def _finish(
        self, deltas: dict[str, Delta], form: Form, measure: Calibration | None, choice: str = ""
    ) -> OSDArtifact:
        """The artifact with the error of what it decodes to."""
        reports = []
        for entry, delta in self._bar(iter_deltas(self.base, self.tuned), len(self.entries), "checking"):
            total = float(delta.pow(2).sum(dtype=torch.float64))
            error = total
            if entry.name in deltas:
                error = float((delta - torch.from_numpy(deltas[entry.name].dense())).pow(2).sum(dtype=torch.float64))
            if total:
                reports.append(TensorReport(entry.name, entry.kind, total, error))
        recovery = None if measure is None or not deltas else 1 - measure.divergence(deltas) / measure.base_divergence
        artifact = self._artifact(deltas, form, choice, reports=tuple(reports), recovery=recovery)
        _logger.info("%s; %s", form.label, choice)
        return artifact


def _loading(tuned: Any) -> dict[str, Any]:
    """What PEFT's auto classes need to know: the task, or the class of a model of another one."""
    if isinstance(tuned, torch.nn.Module):
        name, module = type(tuned).__name__, type(tuned).__module__.split(".")[0]
    else:
        path, module = Path(tuned) / "config.json", "transformers"
        if Path(tuned).is_dir():
            settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        elif Path(tuned).is_file():
            settings = {}
        else:
            from transformers import PretrainedConfig

            settings = PretrainedConfig.get_config_dict(os.fspath(tuned))[0]
        name = (settings.get("architectures") or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return {"task_type": "CAUSAL_LM"}
    return {"auto_mapping": {"base_model_class": name, "parent_library": module}} if name else {}


def _noise_limit(config: OSDConfig, item: TensorStats) -> float:
    """Root mean square a delta of signs may have; a base of zeros says nothing about it."""
    return config.noise_limit * item.weight_square**0.5 if item.weight_square else float("inf")


def _endings(modules: set[str]) -> list[str]:
    """Names as PEFT matches them: the last part of each, which few modules share a hundred times; digits say nothing."""
    last = {module: module.rpartition(".")[2] for module in modules}
    return sorted({module if end.isdigit() else end for module, end in last.items()})
