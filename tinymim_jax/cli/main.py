"""The `tinymim` command: its subcommands, and how their errors are shown."""

import argparse
import errno
import os
import re
import sys
import traceback

from tinymim_jax.cli import (
    advise,
    analyze,
    bench,
    chain,
    convert,
    demo,
    distill,
    evaluate,
    export,
    knn,
    plan,
    predict,
    prepare,
    probe,
    replay,
    report,
    status,
    sweep,
    train,
)
from tinymim_jax.runtime import exits
from tinymim_jax.runtime.parent import end_with_parent_of_environment
from tinymim_jax.runtime.startup import start_logging

# In the order of `tinymim --help`. Each module has HELP, add_arguments(parser) and run(options) -> exit status.
COMMANDS = (
    *(distill, advise, train, chain, sweep, status, report, analyze, replay, plan, evaluate, knn, probe, predict),
    *(convert, export, bench, prepare, demo),
)

# Their result is all that they write to standard output, for other programs to read; the log goes to standard error.
_RESULT_ALONE = ("evaluate", "knn", "probe", "predict")

# What a user can mend: shown as one message without a traceback.
_USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError, ImportError, RuntimeError)

_DESCRIPTION = """\
Distil a masked-image-modelling ViT into a small one by its token relations (TinyMIM, arXiv 2301.01296).

  tinymim prepare imagenet2012
  tinymim convert --from mae --input mae_pretrain_vit_large.pth --output teachers/mae_vit_large
  tinymim train --config configs/distill_b.py --workdir runs/b distill.teacher.path=teachers/mae_vit_large
  tinymim train --config configs/finetune_b.py --workdir runs/b_finetuned init=runs/b
"""


_EPILOG = """\
exit status of all commands:
  0    done
  1    error
  2    wrong options
  75   stopped with everything saved: the same command resumes it
  86   stalled: nothing was finished for --stall_minutes
  130  ended by Ctrl-C; a training saves after the first one and exits with 75
  143  ended by SIGTERM or SIGHUP; a training saves and exits with 75
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits with one of the statuses that `tinymim --help` lists."""
    end_with_parent_of_environment()
    _open_closed_streams()
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    start_logging(to_stderr=options.command in _RESULT_ALONE)
    why = ""
    try:
        code = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code, why = exits.INTERRUPTED, "ended by Ctrl-C"
    except _USER_ERRORS as error:
        code, why = exits.ERROR, f"{type(error).__name__}: {error}"
        if isinstance(error, BrokenPipeError) and exits.stdout_closed():
            pass
        # XLA's errors are RuntimeErrors too, but only their traceback says where they come from.
        elif options.debug or type(error).__name__ == "JaxRuntimeError":
            traceback.print_exc()
            if exits.process_label():
                print(
                    f"tinymim {options.command}{exits.process_label()}: see above; if a peer has ended, see its log",
                    file=sys.stderr,
                )
        else:
            print(f"tinymim {options.command}{exits.process_label()}: {error}{_remedy(error)}", file=sys.stderr)
    if code == exits.ERROR and arguments is None:
        # Threads and worker processes of the input pipeline can abort the interpreter's shutdown, with status 134.
        exits.exit_at_once(code, why)
    exits.exit_process(code, why)


def _open_closed_streams() -> None:
    """Sends what is printed to nowhere where the caller has closed standard output or error (`>&-`): both are None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, for the life of the process


def _remedy(error: Exception) -> str:
    """What to do about an error of the operating system, which does not say so itself."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ". The disk is full, or a quota: free some space, or write elsewhere, and run the command again"
    return ""


def _parse(words: list[str]) -> argparse.Namespace:
    """Parses the command line. KEY=VALUE words may stand anywhere, which argparse does not support by itself."""
    overrides = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word)]
    parser = _parser()
    options = parser.parse_args([word for word in words if word not in overrides])
    if overrides and not hasattr(options, "overrides"):
        parser.error(f"{options.command} takes no KEY=VALUE: {' '.join(overrides)}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinymim",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name, about = module.__name__.rpartition(".")[2], module.HELP
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser
