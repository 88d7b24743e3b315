"""Continue a prompt with a trained checkpoint, through the KV cache.

python scripts/generate.py --checkpoint runs/quickstart-spattention --prompt "Return the"
"""

from __future__ import annotations

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, real, user_errors, whole
from spattn_olmoe.text import visible


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or a run's folder for its newest one")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=whole(1, 2**24), default=64)
    parser.add_argument("--temperature", type=real(0, 1000), default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
    parser.add_argument("--no-cache", action="store_true", help="attend anew to everything at each token")
    trust.add_argument(parser)
    args = parser.parse_args()
    with user_errors():
        with modules_kept():
            quiet()
            from spattn_olmoe.model.checkpoint import Checkpoint, generate

        text = generate(
            Checkpoint.open(args.checkpoint),
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            use_cache=not args.no_cache,
        )
        print(visible(text))


if __name__ == "__main__":
    main()
