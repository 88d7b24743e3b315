"""Make a checkpoint of a published OLMoE, for train.py and evaluate.py.

python scripts/import_hf.py --from OLMoE-1B-7B-0924 --to runs/olmoe-0924 --config configs/1b7b_standard.yaml
"""

from __future__ import annotations

from spattn_olmoe import trust
from spattn_olmoe.collector import modules_kept
from spattn_olmoe.errors import Parser, quiet, user_errors


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--from", dest="source", required=True, help="a folder of safetensors with config and tokenizer"
    )
    parser.add_argument("--to", required=True, help="the checkpoint to write; it must not exist")
    parser.add_argument("--config", required=True, help="a YAML file of the same model, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    trust.add_argument(parser)
    args = parser.parse_intermixed_args()
    with user_errors():
        with modules_kept():
            quiet()
            from spattn_olmoe.model.hf.importing import import_published
            from spattn_olmoe.train.config import load_experiment

        experiment = load_experiment(args.config, args.overrides)
        import_published(args.source, args.to, experiment.as_config_dict(), experiment.model, yaml=args.config)
        print(f"{args.source} -> {args.to} (dense attention, no optimiser state)")


if __name__ == "__main__":
    main()
