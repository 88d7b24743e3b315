"""Turn text into token shards: python scripts/prepare_data.py --config configs/data/quickstart.yaml [key=value ...]

After any interruption, run the same command again: it resumes. On several machines give each its --part i/n, then run once
more with --merge.
"""

from __future__ import annotations

import logging
import os
import signal

from rich.console import Console

from spattn_olmoe import trust
from spattn_olmoe.data import load_config, prepare
from spattn_olmoe.data.parts import merge
from spattn_olmoe.data.summary import progress_bar, summary_table, warnings
from spattn_olmoe.errors import Parser, fail, user_errors


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, see configs/data/")
    parser.add_argument("--part", metavar="i/n", help="prepare only this part, counted from 0 (same as part=i/n)")
    parser.add_argument("--merge", action="store_true", help="write one manifest over all finished parts")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. output=/data/dclm sources[0].field=content"
    )
    trust.add_argument(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for library in ("HF_HUB", "DATASETS"):  # each retry would be two lines; the last failure is ours to tell
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs would ignore the first
        signal.signal(number, signal.default_int_handler)
    console = Console(stderr=True)
    with user_errors():
        try:
            config = load_config(args.config, [*args.overrides, *([f"part={args.part}"] if args.part else [])])
            if args.merge:
                manifest = merge(config.output)
            else:
                with progress_bar(console) as report:
                    manifest = prepare(config, report)
        except KeyboardInterrupt:
            fail("stopped; run the same command again to resume", 1)
    console.print(summary_table(manifest))
    for warning in warnings(manifest):
        console.print(f"warning: {warning}", soft_wrap=True)


if __name__ == "__main__":
    main()
