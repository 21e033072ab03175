"""Speed and memory of the delta codec: decoding, opening, and a 7B-shaped model streamed from disk.

    python benchmarks/delta_speed.py [--layers 1] [--out benchmarks/results/delta_speed.json]

Decoding is measured from the bytes of a blob to float32 factors, or to places and values of signs, in megabytes of output
a second of processor time on one thread, and as a ratio to copying the same output. Opening is what stands between a
folder of one megabyte and a `PeftModel` that runs, without the base. The 7B-shaped model has 224 random matrices of
Llama-2-7B in bfloat16; `--layers` of its 32 layers are written to disk, compressed by the default command and
extrapolated by their number (the search for low rank, two matrices of each kind whatever the depth, weighs more in few
layers than in all); the peak of the process's resident memory is read from the operating system.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from hf_ext.merging.blob import Delta, decode, encode
from hf_ext.merging.compress import compress_delta
from hf_ext.merging.fit import Spectrum, fit_factors, fit_signs
from hf_ext.merging.osd_config import OSDConfig
from hf_ext.table import Row, write_rows


RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 5
SHAPES_7B = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
LAYERS_7B = 32


def decode_rows() -> list[Row]:
    """Megabytes a second of decoded output, by form."""
    generator = torch.Generator().manual_seed(0)
    n, d, k, rows = 4096, 4096, 64, []
    spectrum = Spectrum(torch.randn(n, k, generator=generator), torch.ones(k), torch.randn(d, k, generator=generator))
    small = torch.randn(n, d, generator=generator)
    forms = {
        f"factors, {bits} bits": fit_factors(small, spectrum, [bits] * k, 0) for bits in (1, 2, 3, 4, 8, 16, 32)
    } | {"signs, a tenth of the places": fit_signs(small, 0.1, 0, 1e9)}
    for form, terms in forms.items():
        blob = encode({f"m{i}": Delta((n, d), terms) for i in range(4)})
        speeds, ratios = [], []
        for _ in range(ROUNDS):
            start = time.process_time()
            outputs = [part for delta in decode(blob).values() for part in (*delta.factors(), *delta.signs())]
            seconds = time.process_time() - start
            start = time.process_time()
            copies = [part.copy() for part in outputs]
            copying = time.process_time() - start
            size = sum(part.nbytes for part in copies)
            speeds.append(size / seconds / 1e6)
            ratios.append(seconds / max(copying, 1e-9))
        setting = f"decode, {form}"
        rows.append(
            Row("osd", "osd", setting, "output", float(np.mean(speeds)), "MB/s", ROUNDS, float(np.std(speeds)))
        )
        rows.append(
            Row("osd", "osd", setting, "time over a copy", float(np.mean(ratios)), "x", ROUNDS, float(np.std(ratios)))
        )
    return rows


def open_rows() -> list[Row]:
    """Seconds of processor time to put a folder of one megabyte onto a model in memory."""
    import warnings

    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    import hf_ext

    config = AutoConfig.for_model("llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                  num_attention_heads=9, num_key_value_heads=3, vocab_size=2048)  # fmt: skip
    torch.manual_seed(0)
    base, tuned = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    tuned.load_state_dict(base.state_dict())
    for weight in tuned.parameters():
        weight.data += 1e-4 * torch.randn_like(weight)
    seconds = []
    with tempfile.TemporaryDirectory() as folder, hf_ext.registered(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compress_delta(base, tuned, OSDConfig(budget=1_000_000), progress=False).save_pretrained(folder)
        for _ in range(ROUNDS):
            start = time.process_time()
            model = PeftModel.from_pretrained(base, folder)
            seconds.append(time.process_time() - start)
            base = model.unload()
    return [Row("osd", "osd", "opening 1 MB, 210 matrices", "PeftModel.from_pretrained", float(np.mean(seconds)), "s",
                ROUNDS, float(np.std(seconds)))]  # fmt: skip


def big_rows(layers: int) -> list[Row]:
    """Minutes and resident memory of a 7B-shaped model, `layers` of it measured."""
    with tempfile.TemporaryDirectory() as folder:
        for which in ("base", "tuned"):
            for layer in range(layers):
                generator = torch.Generator().manual_seed(layer)
                tensors = {}
                for name, shape in SHAPES_7B.items():
                    weight = 0.02 * torch.randn(shape, generator=generator)
                    if which == "tuned":
                        weight += 2e-4 * torch.randn(shape, generator=generator)
                    tensors[f"model.layers.{layer}.{name}.weight"] = weight.bfloat16()
                path = Path(folder) / which
                path.mkdir(exist_ok=True)
                save_file(tensors, path / f"model-{layer}.safetensors")
            index = {"weight_map": {
                f"model.layers.{layer}.{name}.weight": f"model-{layer}.safetensors"
                for layer in range(layers) for name in SHAPES_7B
            }}  # fmt: skip
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        rows = []
        for label, settings in (("default", {}), ("signs", {"codec": "signs"})):
            code = (
                "import json, resource, sys, time, torch\n"
                "torch.set_num_threads(2)\n"
                "from hf_ext.merging.compress import compress_delta\n"
                "from hf_ext.merging.osd_config import OSDConfig\n"
                "start = time.time()\n"
                f"artifact = compress_delta('base', 'tuned', OSDConfig(budget={layers} * 200_000, **{settings!r}), progress=False)\n"
                "artifact.save_pretrained('out')\n"
                "print(json.dumps([time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))\n"
            )
            done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
            seconds, peak = json.loads(done.stdout.strip().splitlines()[-1])
            setting = f"7B-shaped, {label}, {layers} of {LAYERS_7B} layers measured"
            rows.append(
                Row("osd", "osd", setting, "whole model, extrapolated", seconds / layers * LAYERS_7B / 60, "min")
            )
            rows.append(Row("osd", "osd", setting, "peak resident memory", peak / 1e6, "GB"))
    return rows


def main() -> None:
    """Measure all, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=1, help="layers of the 7B-shaped model that are really compressed"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "delta_speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for part in (decode_rows, open_rows, partial(big_rows, arguments.layers)):
        found = part()
        rows += found
        for row in found:
            print(row.setting, row.metric, round(row.value, 3), row.unit, flush=True)
        write_rows(arguments.out, rows)
    print(write_rows(arguments.out, rows))


if __name__ == "__main__":
    main()
