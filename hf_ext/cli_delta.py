"""The subcommands of `hf-ext` that work on deltas: `compress`, `inspect`, `restore`, `push`, `pull`.

Each imports what it needs when it runs; see `cli.py` for exit codes.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ext.errors import ArtifactError, ConfigError, MissingPackageError


if TYPE_CHECKING:
    from hf_ext.hub_tools.push import PushReport

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000 ** (power + 1) for power, prefix in enumerate("KMG")}
_UNITS |= {f"{prefix}IB": 1024 ** (power + 1) for power, prefix in enumerate("KMG")}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([a-z]*)", re.IGNORECASE | re.ASCII)
ENDPOINT_HELP = "another hub, or file:///FOLDER for a folder of repositories on this machine"
_EXAMPLE_KEYS = ("input_ids", "attention_mask", "labels")


def add_commands(commands: Any) -> None:
    """Add the subcommands to what `ArgumentParser.add_subparsers` returned."""
    command = commands.add_parser(
        "compress",
        help="what a fine-tune added to its base, in a few kilobytes that PEFT opens",
        description="Compress the difference of two checkpoints (OSD) into a folder of an asked size.",
    )
    command.add_argument("base", metavar="BASE", help="folder or hub id of the model the fine-tune started from")
    command.add_argument("tuned", metavar="TUNED", help="folder or hub id of the fine-tuned model")
    command.add_argument("out", metavar="OUT", help="folder to make")
    budget = command.add_mutually_exclusive_group()
    budget.add_argument(
        "--budget",
        metavar="SIZE",
        help="bytes of the folder, such as 250KB, 1MiB or 250000 (default: a 2,000th of TUNED, at least 20KB)",
    )
    budget.add_argument("--rank", type=int, metavar="R", help="the budget of dense float32 factors of that rank")
    command.add_argument("--codec", default="auto", metavar="C", help="auto, factors, sparse or signs")
    command.add_argument(
        "--values", default="auto", metavar="V", help="auto, fp32, bf16, int8, int4, int3, int2, int1"
    )
    command.add_argument("--mode", default="default", metavar="M", help='"paper" is the published form; needs --rank')
    command.add_argument(
        "--calibration",
        metavar="FILE",
        help='training texts of the fine-tune: .txt, one a line, or .jsonl with "text" or "input_ids"',
    )
    command.add_argument("--lora", type=int, metavar="RANK", help="also write a plain LoRA of that rank to OUT/lora")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    command.set_defaults(handler=_compress)

    command = commands.add_parser("inspect", help="what is in a compressed fine-tune, tensor by tensor")
    command.add_argument("source", metavar="REPO", help="folder or hub id")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    command.set_defaults(handler=_inspect)

    command = commands.add_parser("restore", help="a plain checkpoint from a compressed fine-tune and its base")
    command.add_argument("source", metavar="OUT", help="folder or hub id of the compressed fine-tune")
    command.add_argument("--to", required=True, metavar="DIR", help="folder to make")
    command.add_argument("--base", metavar="BASE", help="folder or hub id (default: the one named in OUT)")
    command.add_argument("--force", action="store_true", help="do not check that the base is the right one")
    command.set_defaults(handler=_restore)

    command = commands.add_parser("push", help="publish a folder on the Hub, with a card made of its measurements")
    command.add_argument("folder", metavar="OUT", help="folder that `hf-ext compress` made")
    command.add_argument("repo_id", metavar="USER/NAME")
    command.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    command.add_argument("--revision", metavar="REV", help="an existing branch")
    command.add_argument("--message", metavar="TEXT", help="commit message")
    command.add_argument("--dry-run", action="store_true", help="show files and card; send nothing")
    command.add_argument("--no-snippet", action="store_true", help="do not run the loading snippet first")
    command.add_argument("--endpoint", metavar="URL", help=ENDPOINT_HELP)
    command.set_defaults(handler=_push)

    command = commands.add_parser("pull", help="fetch from the Hub what `hf-ext push` published")
    command.add_argument("repo_id", metavar="USER/NAME")
    command.add_argument("folder", metavar="DIR", help="folder to make")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit")
    command.add_argument("--force", action="store_true", help="replace DIR if it holds an artifact")
    command.add_argument("--endpoint", metavar="URL", help=ENDPOINT_HELP)
    command.set_defaults(handler=_pull)


def parse_size(text: str) -> int:
    """Bytes in a size typed by a person.

    Args:
        text (`str`): A number and, if any, a unit: `B`, `KB`, `MB`, `GB` (powers of 1,000), `KiB`, `MiB`, `GiB` (of
            1,024), in any case.

    Raises:
        `ConfigError`: it is not a size, or less than one byte.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a size; write 250KB, 1MB, 1MiB or a number of bytes.")
    return size


def read_examples(path: str | os.PathLike) -> list[Any]:
    """Calibration examples of a file.

    Args:
        path (`str` or `os.PathLike`): `.txt`, a text a line; or `.jsonl`, an object a line with `"text"` or `"input_ids"`
            (and `"attention_mask"`, `"labels"`). Empty lines are skipped.

    Returns:
        `list`: texts, and dicts of lists.

    Raises:
        `ConfigError`: no such file, another kind of file, or a line that is not an example.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"--calibration {path} ends in {path.suffix!r}; give a .txt or a .jsonl file.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {path} cannot be read: {error}; give a UTF-8 text file.") from None
    lines_with_text = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines_with_text:
        raise ConfigError(f"--calibration {path} is empty; give training texts of the fine-tune.")
    if path.suffix == ".txt":
        return [line for _, line in lines_with_text]
    return list(_json_examples(path, lines_with_text))


def _json_examples(path: Path, lines: list[tuple[int, str]]) -> Iterator[Any]:
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}.") from None
        if isinstance(row, dict) and isinstance(row.get("input_ids"), list):
            yield {key: row[key] for key in _EXAMPLE_KEYS if row.get(key) is not None}
        elif isinstance(row, dict) and isinstance(row.get("text"), str):
            yield row["text"]
        else:
            raise ConfigError(f'{path}, line {number} has neither "text" (a string) nor "input_ids" (a list).')


def _need_peft() -> None:
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise MissingPackageError(
            "compressed fine-tunes are PEFT adapters, and peft is not installed; install it with: pip install "
            "'hf-ext[peft]'"
        )


def _compress(arguments: argparse.Namespace) -> int:
    budget = None if arguments.budget is None else parse_size(arguments.budget)
    examples = None if arguments.calibration is None else read_examples(arguments.calibration)
    if arguments.lora is not None and arguments.lora < 1:
        raise ConfigError(f"--lora {arguments.lora} must be at least 1; leave it out for no LoRA.")
    out = Path(arguments.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ArtifactError(f"{out} exists and is not an empty folder; give another one.")
    _need_peft()
    from rich.table import Table

    from hf_ext.cli import make_console
    from hf_ext.merging.compress import compress_delta
    from hf_ext.merging.osd_config import OSDConfig

    settings = {name: getattr(arguments, name) for name in ("rank", "codec", "values", "mode", "seed")}
    config = OSDConfig(budget=budget, **settings)
    artifact = compress_delta(arguments.base, arguments.tuned, config, examples)
    artifact.save_pretrained(out, lora_rank=arguments.lora)

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("form", artifact.form)
    table.add_row("other tensors", artifact.choice or "-")
    for item in artifact.measured():
        value = f"{item.value:,}" if item.unit == "bytes" else f"{item.value:g}"
        table.add_row(item.what, f"{value} {item.unit}".rstrip())
    if artifact.bytes_before:
        table.add_row("times smaller", f"{artifact.bytes_before / artifact.nbytes():,.0f}")
    make_console().print(table, markup=False)
    print(f"\nwrote {out}; look inside with `hf-ext inspect {out}`, publish with `hf-ext push {out} USER/NAME`")
    if arguments.lora is not None:
        size = sum(path.stat().st_size for path in (out / "lora").iterdir())
        print(f"wrote {out / 'lora'}, a plain LoRA of rank {arguments.lora}: {size:,} bytes more")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    _need_peft()
    from rich.table import Table

    from hf_ext.artifact import MANIFEST_NAME
    from hf_ext.cli import make_console
    from hf_ext.merging.osd_artifact import ADAPTER_CONFIG, WEIGHTS_NAME, OSDArtifact, local_folder

    folder = local_folder(arguments.source, arguments.revision, None)
    artifact = OSDArtifact.from_pretrained(folder)
    lines = artifact.table()
    table = Table(box=None, pad_edge=False)
    columns = ("tensor", "shape", "form", "rank", "density", "bits", "bytes", "relative error")
    for name in columns:
        table.add_column(name, no_wrap=True, justify="left" if name in ("tensor", "shape", "form") else "right")
    for line in lines:
        error = "-" if line["error"] is None else f"{line['error']:.3f}"
        rank = str(line["rank"]) if line["rank"] else "-"
        cells = (line["tensor"], line["shape"], line["form"], rank, f"{line['density']:.3f}", line["bits"])
        table.add_row(*cells, f"{line['bytes']:,}", error)
    console = make_console()
    console.print(table, markup=False, soft_wrap=True)
    inside = sum(line["bytes"] for line in lines)
    names = (ADAPTER_CONFIG, WEIGHTS_NAME, MANIFEST_NAME)
    files = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    print(f"\n{len(lines)} tensors, {inside:,} bytes; with headers and settings {files:,} bytes")
    if artifact.bytes_before:
        print(
            f"the fine-tuned checkpoint: {artifact.bytes_before:,} bytes, {artifact.bytes_before / files:,.0f} times as many"
        )
    if artifact.recovery is not None:
        print(f"recovery of predictions on the calibration data: {artifact.recovery:.4f}")
    print(f"base: {artifact.config.base_model_name_or_path or 'not named'}")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    _need_peft()
    from hf_ext.merging.osd_artifact import restore

    folder = restore(arguments.source, arguments.to, base=arguments.base, force=arguments.force)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {folder}, {size:,} bytes")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from hf_ext.hub_tools.push import push_artifact

    report = push_artifact(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private or None,
        revision=arguments.revision,
        commit_message=arguments.message,
        dry_run=arguments.dry_run,
        run_snippet=not arguments.no_snippet,
        endpoint=arguments.endpoint,
    )
    print("\n".join(listing(report)))
    if report.dry_run:
        print(f"\n{report.card}\nNothing was sent.")
    else:
        print(f"pushed: {report.url}")
    return 0


def listing(report: "PushReport") -> list[str]:
    """The files of a push, a line each, and their sum."""
    where = report.repo_id if report.revision is None else f"{report.repo_id}, branch {report.revision}"
    lines = [f"{name:32s} {size:>12,} bytes" for name, size in report.files.items()]
    return [*lines, f"{f'{where}:':32s} {report.nbytes:>12,} bytes"]


def _pull(arguments: argparse.Namespace) -> int:
    from hf_ext.hub_tools.push import pull_artifact

    folder = pull_artifact(
        arguments.repo_id,
        arguments.folder,
        revision=arguments.revision,
        force=arguments.force,
        endpoint=arguments.endpoint,
    )
    print(f"wrote {folder}; look inside with `hf-ext inspect {folder}`")
    return 0
