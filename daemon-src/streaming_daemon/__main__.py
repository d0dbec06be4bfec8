"""Command line: ``python3 -m streaming_daemon --config FILE``. Arguments, and nothing else."""

from __future__ import annotations

import argparse
import os
import sys

from . import __version__


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m streaming_daemon",
        description="Streams language model answers to HTTP clients that Apache hands over.",
        epilog='"python3 -m streaming_daemon top" shows what the running service is doing; see "top --help".',
    )
    parser.add_argument("--config", metavar="FILE", help="configuration file (TOML)")
    parser.add_argument("--check", action="store_true", help="check the configuration file and exit with 0 or 2")
    parser.add_argument(
        "--socket",
        metavar="PATH[,TYPE]",
        help="listen here instead of on systemd's socket; TYPE is seqpacket (default) or stream",
    )
    parser.add_argument(
        "--control", metavar="PATH", help="socket for --reload (default: control.sock in $RUNTIME_DIRECTORY)"
    )
    parser.add_argument("--reload", action="store_true", help="ask the running supervisor to start new workers")
    parser.add_argument("--wait", action="store_true", help="with --reload: exit with 1 if they were refused")
    parser.add_argument("--version", action="version", version=f"streaming_daemon {__version__}")
    # From supervisor to worker, see worker.py.
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--channel", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--listen", type=int, action="append", default=[], help=argparse.SUPPRESS)
    for name in ("--board", "--slot", "--roster", "--metrics"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    if sys.argv[1:2] == ["top"]:
        # Imported here: no service needs what draws a screen.
        from . import top  # noqa: PLC0415

        return top.main(sys.argv[2:])
    parser = _arguments()
    # A worker may have been started by a supervisor that is newer than itself: what it does not know is not for it.
    args, unknown = parser.parse_known_args()
    if unknown and not args.worker:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # Imported where they are used: a reload must work, and fail cleanly, whatever is wrong with the rest of a release.
    if args.reload:
        from . import control  # noqa: PLC0415

        return control.reload(args.control or control.default_path(os.environ), args.wait)
    if args.wait:
        parser.error("--wait goes with --reload")
    if args.config is None:
        parser.error("--config FILE is missing")
    if args.worker:
        from . import worker  # noqa: PLC0415

        inherited = worker.Inherited(args.channel, args.listen, args.board, args.slot, args.roster, args.metrics)
        return worker.run(args.config, inherited)
    from . import service  # noqa: PLC0415

    if args.check:
        return service.check(args.config)
    return service.start(args.config, args.socket, args.control)


if __name__ == "__main__":
    sys.exit(main())
